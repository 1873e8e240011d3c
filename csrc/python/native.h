/* The native hot path: the C types below the reader, the writer, the connection and the hub.
 *
 * What happens for every request happens here, without an interpreted frame: taking views of what
 * has arrived, waiting for more, waking. What happens seldom stays in Python: each type here is
 * the base of a Python class (Reader, BaseWriter, Core, Hub, Connection), has the fields that both
 * sides use as members, and calls the class's methods by name for everything else.
 *
 *   file             type       base of
 *   block.c          Block      -                   received bytes, behind the views
 *   reader.c         Reader     nocopy.Reader       the window, and the calls that look in it
 *   writer.c         Writer     BaseWriter          collecting output
 *   core.c           Core       Endpoint            asking the core for input
 *   life.c                                          opening and closing it
 *   stream.c         Stream     Connection          the same calls, for short
 *   hub.c            Hub        _loop.hub.Hub       who waits, and the event loop
 *   dispatch.c                                      waking those whose wait is over
 *   turn.c                                          what a loop calls that drives its poller
 *   operation.c      Operation  -                   the awaitable: a call that may have to wait
 *   reading.c                                       arguments and results of the reader's calls
 *   receive.c                                       receive() straight from the socket
 *   send.c                                          send() and flush()
 *   drive.c          Drive      -                   between a task and a handler, which it resumes
 *   drive_asyncio.c                                 the same, if it is asyncio's task
 *   drive_trio.c                                    the same, if it is Trio's
 *   rest.c                                          handlers that let the loop have a round
 *   workers.c        Workers    _loop.workers       drives that make the calls of request mode
 *   worker.c                                        one of these, and its job
 *   requests.c       Requests   _connection.requests   one connection in request mode
 *   inside.c                                        what is used of others' inside
 *   coroutine.c                                     what operations and drives share as coroutines
 *   future.c                                        and as futures, for asyncio
 *
 * core, hub, operation and drive have their types (methods, members, what they keep alive) in files
 * of their own: core_type.c and so on. types.h has the structs.
 *
 * Everything here runs with the GIL: the core's calls do not block, and getting the GIL back would
 * take milliseconds if another thread computes. It is released only where the loop would go to
 * sleep instead (turn.c), and while a descriptor is closed (life.c).
 */
#ifndef ANYPOLL_PYTHON_NATIVE_H
#define ANYPOLL_PYTHON_NATIVE_H

#include "types.h"

extern PyTypeObject *Block_Type, *Reader_Type, *Writer_Type, *Core_Type, *Hub_Type, *Stream_Type,
    *Operation_Type, *Drive_Type, *Requests_Type, *Workers_Type;

/* ---- names and objects of Python's ------------------------------------- */

/* clang-format off */
#define NAMES(X) \
    X(_abort) X(_as_bytes) X(_attempt_delivery_of_any_pending_cancel) X(_await) X(_before_reading) \
    X(_check_unread) X(_checkpoint_and_raise) X(_close) X(_closed_error) X(_conclude) X(_count) X(_drain) \
    X(_drive_trap) X(_drop_sent) X(_end_if_drained) X(_ended) X(_finish_flushing) X(_finish_sending) X(_item) \
    X(_ki_protected) X(_loan_is_over) X(_make_handle) X(_max_bytes) X(_next_message) X(_not_found) \
    X(_raise_first) X(_refuse) X(_report) X(_resume_rested) X(_seal) \
    X(_stands_high) X(_step_on) X(_stopping) X(_tell_last) X(_trap) X(_work) X(_until_arguments) X(_wake_later) X(_write_error) \
    X(abandon) X(abort_func) X(address) X(batch) X(call_soon) X(cancel) X(cancelling) X(check) \
    X(checkpoint) X(close) X(consume) X(context) X(copy) X(cut) X(dispatch_one) \
    X(f_locals) X(fill) X(fill_nowait) X(find) X(flush) X(join) X(obj) X(receive) X(run) X(send) \
    X(task) X(throw) X(uncancel) X(unwrap) X(value) X(why_unwritable)
/* clang-format on */

#define DECLARE(name) extern PyObject *n_##name;
NAMES(DECLARE)
#undef DECLARE

extern PyObject *BusyResourceError, *EndOfStream, *CancelledError, *InvalidStateError;
extern PyObject *running_loop, *enter_task, *leave_task; /* asyncio's C functions */
extern PyObject *empty_bytes, *empty_view;
extern PyObject *coroutine_type; /* of `async def` functions */
extern PyObject *usual_most;     /* of receive() */

/* PyContext_Enter() and PyContext_Exit(), which the limited API lacks. */
extern int (*enter_context)(PyObject *context);
extern int (*exit_context)(PyObject *context);

/* Attributes that every request looks at, by their descriptors (_SLOTS in _loop/trio_hub.py and
 * _loop/asyncio_hub.py): the search for a name would take longer than all else. */
enum trio_slot {
    ABORT_FUNC, /* of tasks */
    CANCEL_POINTS,
    SCHEDULE_POINTS,
    CONTEXT,
    CANCEL_STATUS,
    EFFECTIVELY_CANCELLED, /* of that */
    KI_PENDING,            /* of the runner */
};
enum anyio_slot {
    CANCEL_SCOPE,  /* of the state of a task */
    CANCEL_CALLED, /* of scopes */
    SHIELD,
    PARENT_SCOPE,
};
PyObject *slot_get(Hub *hub, PyObject *object, int slot);
int slot_set(Hub *hub, PyObject *object, int slot, PyObject *value);
bool slot_is_true(Hub *hub, PyObject *object, int slot);
int inside_init(void);

/* Sets a field to a borrowed object. */
static inline void replace(PyObject **field, PyObject *value)
{
    PyObject *old = *field;
    *field = Py_XNewRef(value);
    Py_XDECREF(old);
}

/* ---- between the files -------------------------------------------------- */

/* Takes over the reference. */
PyObject *Block_new(ap_block *block, uint32_t size);
/* The bytes of a Block, or of a memoryview, as a view and as a copy. */
PyObject *window_slice(PyObject *view, long long start, long long stop);
PyObject *window_whole(PyObject *view);
PyObject *window_bytes(PyObject *view, long long start, long long stop);

/* The method, which a Stream has too. */
PyObject *reader_until(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names);
/* Closes the window, and lets go of its block; for good. */
void window_drop(Reader *reader);
void window_close(Reader *reader);

/* These return 0, and op->state says how it stands (ARMED, INNER or OPEN), or -1 with an exception.
 */
int core_begin(Core *core, Operation *op);
int core_ask(Core *core, Operation *op);
int core_resume(Core *core, Operation *op);
int core_reopen(Core *core, Operation *op); /* after receive()'s checkpoint */
int core_refuse(Core *core);                /* always -1: it is closed */
int core_check_open(Core *core);            /* raises RuntimeError if it never was */
int core_ended(Core *core, int64_t code);   /* always -1: as the core has answered */
void core_raise_from(Core *core, PyObject *method,
                     PyObject *argument); /* what the method returns */
/* In nanoseconds of CLOCK_MONOTONIC; 0: never; -1: an exception. */
int64_t core_deadline(PyObject *timeout);
/* Whether output of earlier calls is still Python's to keep. 1, 0, -1. */
int core_owes(Core *core);
int core_skip(Core *core, Operation *op);
/* Asks for the next call of request mode, with the output that goes along; as ap_conn_request().
 * INT64_MIN: an exception. */
int64_t core_request(Core *core, bool fresh);
bool core_is_armed(int64_t result);
/* Opens the window as the core has answered. */
int core_open_window(Core *core, int64_t result);
/* The same on a new block. */
int core_show(Core *core);
void core_stop_waiting(Core *core);
/* Methods; life.c. */
PyObject *core_open(PyObject *self, PyObject *const *args, Py_ssize_t n);
PyObject *core_end(PyObject *self, PyObject *const *args, Py_ssize_t n);
PyObject *core_may_close(PyObject *self, PyObject *unused);
PyObject *core_traffic(PyObject *self, PyObject *unused);
PyObject *core_handle(PyObject *self, void *closure);
/* A function. */
PyObject *core_register_all(PyObject *module, PyObject *cores);

/* Whether receive() takes what the core would have to give it piece by piece. */
bool receive_may_go_straight(const Operation *op);
/* Receives, or begins to wait; as core_ask. */
int receive_straight(Core *core, Operation *op);
void receive_put_back(Operation *op);

/* Of kind SEND or FLUSH. */
PyObject *send_new(enum kind kind, Core *core, PyObject *item, int flags);
/* These return 0, and op->state says how it stands (YIELDED, INNER or OPEN), or -1 with an
 * exception. */
int send_begin(Operation *op);
/* Whether the loop is to be asked if the task is in a cancelled scope; on Trio, if not, a point has
 * been counted. */
bool send_may_be_cancelled(Hub *hub);
int send_go_on(Operation *op, PyObject *value); /* after an inner coroutine, which returned value */
/* Sends the objects, or what the writer has; *left is as ap_conn_send returns it, and what the
 * core has queued is kept. */
int core_send(Core *core, PyObject *list, int64_t *left);
int core_send_pending(Core *core, int64_t *left);
/* Holds the pieces, a list, that the core has queued, until it is done with them. left: bytes that
 * are queued now. */
int core_keep(Core *core, PyObject *pieces, int64_t left);

/* Pending output in one piece, left where it is. */
int writer_join(Writer *writer, const char **data, Py_ssize_t *size);
/* What writer_join() has found has been sent. */
int writer_forget(Writer *writer);
/* The same, but its memory is still needed: removes and returns what holds it, as a list. */
PyObject *writer_hand_over(Writer *writer);
/* Removes and returns the pending output as a list; small neighbours are joined. */
PyObject *writer_take(Writer *writer);
/* A list of the pieces, with small bytes joined, but none beyond most bytes. */
PyObject *writer_gather(PyObject *pieces, Py_ssize_t most);

int hub_add_core(Hub *hub, Core *core);
/* Borrowed; NULL: there is none of that number, or no longer. */
Core *hub_find(Hub *hub, unsigned long long number);
void hub_remove_core(Hub *hub, Core *core);
void hub_wait(Core *core, Operation *op);
void hub_forget_wait(Core *core);
Operation *hub_take_wait(Core *core); /* the caller inherits the list's reference */
/* asyncio's loop, or None: it has ended, or is a Trio run. A new reference. */
PyObject *hub_loop(Hub *hub);
/* A new reference; None if there is none. */
PyObject *hub_current_task(Hub *hub);
bool hub_is_current_task(Hub *hub, PyObject *task);
/* Has asyncio's loop call callback(argument) in its next round. */
int hub_call_soon(Hub *hub, PyObject *callback, PyObject *argument, PyObject *context);
/* Raises RuntimeError if __new__ alone has made it. */
int hub_check_attached(Hub *hub);
/* Raises RuntimeError outside of the hub's event loop. */
int hub_check(Hub *hub);
/* What Trio's scheduler is to be given; remembers the task. */
PyObject *hub_trap(Hub *hub, Operation *op);

/* Wakes those that the n tokens name, and those named in what is left if they fill the array, of
 * BATCH. nested: a task calls. Returns 0; 1 if the loop has to go on, because not all has been
 * taken or something else than an operation was told; or -1 with an exception. */
int hub_deliver(Hub *hub, ap_token *tokens, int n, bool nested);
/* Methods of Hub. */
PyObject *hub_dispatch(PyObject *self, PyObject *unused);
PyObject *hub_drive(PyObject *self, PyObject *loan);

Operation *operation_new(enum kind kind, Reader *reader, PyObject *argument);
extern const char *const operation_names[KINDS];
/* Slots and methods of the type. */
PySendResult operation_send(PyObject *self, PyObject *value, PyObject **result);
PyObject *operation_throw(PyObject *self, PyObject *const *args, Py_ssize_t n);
PyObject *operation_close(PyObject *self, PyObject *unused);
int operation_traverse(PyObject *self, visitproc visit, void *arg);
int operation_clear(PyObject *self);
void operation_dealloc(PyObject *self);
bool operation_finds(const Operation *op); /* a delimiter */
void operation_ready(Operation *op, int64_t end);
int operation_wake(Operation *op);      /* a task; on asyncio it runs here and now */
int operation_wake_soon(Operation *op); /* in the next round of the loop */

/* After the arguments have been looked at: as core_begin(). */
int reading_begin(Operation *op);
/* What the call returns, now that the window is open on op->n bytes. */
PyObject *reading_result(Operation *op);

/* Lists the drive of a handler that goes on in the next round of the loop, and unlists it. */
void hub_rest(Drive *drive);
void hub_end_rest(Drive *drive);
/* At the end of a callback of the hub's in which handlers ran. */
int hub_ask_for_round(Hub *hub);
/* Begins or asks for the round that is due, if any. A turn is a number of handlers. */
void hub_go_round(Hub *hub, int turn, PyObject **left);
/* How much the loop has to run at once, or to do: to stop counts as one; -1: it hides that. */
Py_ssize_t hub_sees_queue(const Hub *hub);
/* Whether it has nothing else to run, as far as that can be seen. */
bool hub_is_alone(const Hub *hub);
/* Nobody will be resumed by the hub any more: the tasks go on themselves. */
void hub_stop_resting(Hub *hub);
PyObject *hub_resume_rested(PyObject *self, PyObject *unused);
/* Adds the exception that is set to the list. */
void hub_keep_exception(PyObject **left);
/* Raises the first, if there is one; the list is given away. */
int hub_raise_first(Hub *hub, PyObject *left);

/* Lists the connection as idle, and unlists it; the latter returns the list's reference, or NULL.
 */
void hub_list_idle(Requests *requests);
Requests *hub_take_idle(Requests *requests);

/* What follows in the step of a connection, now that a coroutine of it has ended so: the next one.
 * NULL: the step is over; or, with an exception, the worker is to end. */
PyObject *requests_next(Requests *requests, PySendResult how);
/* Puts it into the queue. */
int requests_submit(Requests *requests);
/* The call waits for something: earlier answers must not wait with it. */
int requests_suspended(Requests *requests);

/* Has somebody look at the queue, if there is need. */
int workers_rouse(Workers *pool);
/* Has workers look at the queues that are due, now. */
void workers_run_due(Hub *hub, PyObject **left);
/* Unlists one that is due; the caller inherits the list's reference. */
Workers *workers_take_due(Hub *hub);
/* No round will come any more: their tasks look. */
void workers_leave_to_tasks(Hub *hub);
/* The worker has been stepped, or begins. What its coroutine yields; RETURN: it has none, and there
 * is nothing to do; ERROR: it is to end. */
PySendResult worker_send(Drive *worker, PyObject *value, PyObject **result);
PySendResult worker_throw(Drive *worker, PyObject *const *args, Py_ssize_t n, PyObject **result);
/* Lists it as idle, if it is not to end instead. */
bool worker_rest(Drive *worker);
void worker_unlist(Drive *worker);
/* The task is about to end, and others look at the queue. */
void worker_end(Drive *worker);
/* The task's coroutine is being closed. */
int worker_close(Drive *worker);
/* The worker's task will look at the queue; and: it will not any more. */
void workers_look_later(Drive *worker);
void workers_stop_looking(Drive *worker);
/* Puts a job that is not in there into the queue, and has nobody look. */
void workers_push(Workers *pool, Requests *job);
/* The next job; the caller inherits the queue's reference. */
Requests *workers_pop(Workers *pool);

/* Whether an operation that only wants a round of the loop may be yielded itself. */
bool drive_takes_rests(Hub *hub);

/* Handlers go on one after another, within a callback of the hub's. */
struct walk {
    Hub *hub;
    Drive *(*next)(walk *walk); /* a new reference; NULL: there are no more */
    PyObject **left;            /* see hub_keep_exception() */
    Drive *drive, *following;   /* Trio: whose turn it is */
};
void drive_walk(walk *walk);
void drive_walk_on_trio(walk *walk);
PyObject *drive_step_on(PyObject *self, PyObject *unused); /* a method of Hub */

/* Slots and methods of the type. */
PySendResult drive_send(PyObject *self, PyObject *value, PyObject **result);
PySendResult drive_throw(Drive *drive, PyObject *const *args, Py_ssize_t n, PyObject **result);
PyObject *drive_close(PyObject *self, PyObject *unused);

/* The handler goes on in the next round. */
int drive_resume_soon(Drive *drive);
/* In that context. Leaves in drive->state how it stands. False, with an exception: it has not run,
 * for the context is entered already. */
bool drive_step_in(Drive *drive, PyObject *context);
/* Removes it from the list of those that rest, or are idle, if it is in one. */
void drive_unlist(Drive *drive);
/* It will be resumed by its task, whatever for. */
void drive_leave(Drive *drive);
int drive_resume_on_asyncio(Drive *drive);
/* asyncio: no task is current any more, before another one runs. */
int hub_leave_task(Hub *hub);
int drive_pass_on_cancellation(Drive *drive);
/* Whether the exception, which is thrown in, is to come after what there is to hand over. */
bool drive_postpones_cancellation(Drive *drive, PyObject *exception);
int drive_reschedule(Drive *drive);
int drive_reschedule_blocked(Drive *drive); /* unless its task is about to wait, and will see it */
int trio_count_point(Hub *hub, PyObject *task, int slot);
/* What Trio's scheduler is given while the drive waits. */
PyObject *drive_trap(Drive *drive);
PyObject *drive_add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                  PyObject *names);
PyObject *drive_cancel(PyObject *self, PyObject *args, PyObject *kwargs);
PyObject *drive_result(PyObject *self, PyObject *unused);
PyObject *drive_is_done(PyObject *self, PyObject *unused);
PyObject *drive_abort(PyObject *self, PyObject *raise_cancel);

/* The task goes on here and now, or in the next round of asyncio's loop. */
int future_wake(Future *future, Hub *hub);
int future_wake_soon(Future *future, Hub *hub);
int future_visit(Future *future, visitproc visit, void *arg);
void future_drop(Future *future);
/* add_done_callback(), given whether the wait is over. */
PyObject *future_listen(Future *future, Hub *hub, bool over, PyObject *const *args, Py_ssize_t n,
                        PyObject *names);
/* The argument of cancel(), borrowed. */
PyObject *future_message(PyObject *args, PyObject *kwargs);
PyObject *future_result(Future *future, bool over);
PyObject *future_remove_done_callback(PyObject *self, PyObject *callback);
PyObject *future_is_cancelled(PyObject *self, PyObject *unused);
PyObject *future_get_blocking(PyObject *self, void *closure);
int future_set_blocking(PyObject *self, PyObject *value, void *closure);

/* The result of send(), for an iterator: what is yielded, or StopIteration. */
PyObject *native_as_iterator(PySendResult how, PyObject *result);
/* Raises what throw() was given. */
void native_raise(PyObject *const *args, Py_ssize_t n);
/* The exception that is set, which it no longer is. */
PyObject *native_take_exception(void);
/* Sets it again, as it is. The reference is given away. */
void native_raise_again(PyObject *exception);
/* Whether the attribute is True; an exception remains set. */
bool native_is_true(PyObject *object, PyObject *name);
/* inner.throw(), with a result like that of PyIter_Send. */
PySendResult native_throw(PyObject *inner, PyObject *const *args, Py_ssize_t n, PyObject **result);

#endif
