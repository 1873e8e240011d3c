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
 *   hub.c            Hub        _loop.hub.Hub       who waits, and waking them
 *   turn.c                                          what a loop calls that drives its poller
 *   operation.c      Operation  -                   the awaitable: a call that may have to wait
 *   reading.c                                       arguments and results of the reader's calls
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
 * Everything here runs with the GIL: the core's calls do not block, and getting the GIL back would
 * take milliseconds if another thread computes. It is released only where the loop would go to
 * sleep instead (turn.c), and while a descriptor is closed (life.c).
 */
#ifndef ANYPOLL_PYTHON_NATIVE_H
#define ANYPOLL_PYTHON_NATIVE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "anypoll.h"

#include <stdbool.h>
#include <string.h>

#define SHUT (-1)            /* a window's end that no request can satisfy */
#define CLAIMED 1            /* the caller of flush() is the sender already */
#define BATCH 128            /* tokens taken at once */
#define VECTORED (16 * 1024) /* from this size on output is sent by itself, piece by piece */

typedef struct Core Core;
typedef struct Reader Reader;
typedef struct Operation Operation;
typedef struct Requests Requests;
typedef struct Workers Workers;

typedef struct {
    PyObject_HEAD ap_block *block; /* a reference of the core's */
    uint32_t size, first, last;    /* what the next buffer shows */
} Block;

struct Reader {
    PyObject_HEAD PyObject *source; /* a Core, or what else has fill() and find() */
    Core *core;                     /* the same, if it is one that is read here; borrowed */
    PyObject *view;                 /* a Block or a memoryview: the window lies in it */
    long long start, end;
    long budget; /* calls that may follow one another without a checkpoint */
    long long limit;
};

typedef struct {
    PyObject_HEAD PyObject *pieces; /* a list: pending output */
    PyObject *tail;                 /* and what follows it, joined: bytes with room; or NULL */
    Py_ssize_t used;                /* of the tail */
    long long size;                 /* of both, in bytes */
    PyObject *reserved;             /* a list: the open reservation */
    long long reserved_size;
    long long high_water;
    PyObject *sink; /* a Core, or what else has flush(); NULL in a LinkBuffer */
    char shut;
} Writer;

typedef struct Hub Hub;
typedef struct Drive Drive;
typedef struct walk walk;

struct Core {
    PyObject_HEAD ap_conn *conn; /* owned */
    unsigned long long number;
    int kind;
    int failure;
    long budget;
    long long straight; /* bytes that a receive() holds which has not returned yet */
    char closed, draining, reading, writing, flushing;
    char over; /* the descriptor is closed, or given away */
    char held;
    Hub *hub;
    Reader *reader;
    Writer *writer;
    PyObject *limits, *read_timeout, *write_timeout, *idle_timeout;
    PyObject *handle;                     /* for cffi, once it was asked for */
    PyObject *poller, *peer, *raw, *name; /* Python's alone, as are these: */
    PyObject *requests, *watcher, *callbacks;
    PyObject *trap;     /* what Trio's scheduler is given while an operation waits */
    Operation *waiting; /* armed, and listed with the hub */
    Core *next, *prev;  /* in the hub's list */
};

struct Hub {
    PyObject_HEAD ap_hub *hub; /* Python holds the handle */
    char dead;
    char trio;              /* the loop is a Trio run */
    unsigned long thread;   /* the loop's */
    int depth;              /* calls of dispatch() in progress */
    PyObject *loop;         /* a weak reference; asyncio only */
    PyObject *outputs;      /* a dict by number: memory that the core is still sending */
    Drive *stepping;        /* whose handler runs; borrowed */
    PyObject *current_task; /* the loop's function */
    PyObject *tasks;        /* its dict of current tasks, if known: hub_current_task() */
    PyObject *look;         /* the loop's function: raises in a cancelled scope */
    PyObject *states;       /* AnyIO's states of tasks, by weak references; or None */
    PyObject *shielded;     /* Trio's trap for a round of the scheduler that is not cancelled */
    PyObject *reschedule, *value; /* Trio's function, and what tasks are sent */
    PyObject *slots;              /* descriptors of Trio's and AnyIO's attributes; slot_get() */
    PyObject *runner, *wait_trap, *instruments;             /* of Trio's inside; see */
    PyObject *abort_succeeded, *abort_failed, *unprotected; /* drive_trio.c */
    PyObject *stepper;                                      /* Trio: the method _step_on */
    walk *walk;                                             /* for it */
    PyObject *entered; /* asyncio: the task that the walk has made the current one */
    Core **cores;      /* by the index of their slots; borrowed */
    uint32_t room;
    Drive *resting, *last_resting; /* in their order; the list holds them strongly; see rest.c */
    uint32_t rounds_asked, rounds_begun;
    char can_rest;    /* somebody resumes those that rest */
    bool round_due;   /* those that rest now have not asked for theirs yet */
    PyObject *rester; /* Trio: the task that resumes them, while it waits; or None */
    Core *waiting;    /* those with an armed operation; the list holds both strongly */
    Requests *idle;   /* connections in request mode that wait; the list holds them strongly */
    size_t armed;     /* how many wait, in both lists */
    uint32_t jobs;    /* that workers have begun; wraps around */
    Workers *due;     /* look at their queues in the next round; the list holds them strongly */
    bool crowded;     /* the last turn has left something to others that the loop runs */
    PyObject *queue;  /* a weak reference to what the loop will run at once; or None */
    PyObject *frame;  /* of Trio's loop; or None */
};

typedef struct {
    PyObject_HEAD Reader *reader;
} Stream;

/* ---- what asyncio's tasks take for a future: the head of operations and drives ---- */

/* clang-format off */
#define FUTURE_HEAD                                                                     \
    PyObject_HEAD                                                                       \
    int8_t blocking;   /* asyncio's handshake: -1 None, 0 False, 1 True */              \
    bool cancelled;    /* by the task, which is told so when it asks for the result */  \
    bool asked;        /* the task has asked for the result since it was woken */           \
    PyObject *wake;    /* the task's wake-up, while it waits */                         \
    PyObject *context; /* what that runs in, or NULL */                                 \
    PyObject *message; /* of the cancellation */
/* clang-format on */

typedef struct {
    FUTURE_HEAD
} Future;

/* ---- what an operation does, and where it is; operation.c has the table ---- */

enum kind { FILL, PEEK, NEXT, SKIP, READ_BYTES, UNTIL, FIND, RECEIVE, SEND, FLUSH, KINDS };
enum state { NEW, INNER, ARMED, READY, YIELDED, OPEN, OVER };
/* what follows when an inner coroutine has ended; send.c has those from LOOKED on */
enum step { ASK = 1, SOURCE, CHECKED, LOOKED, DRAINED, SENT, FLUSHED, RESTED };

struct Operation {
    FUTURE_HEAD /* wake may be a drive, too, or a task of Trio's */
        uint8_t kind,
        state, step;
    uint8_t flags;      /* AP_SCATTER; of FLUSH: CLAIMED */
    bool suspended;     /* it has waited, or yielded */
    bool iterates;      /* RECEIVE: the end of the stream is that of an iteration */
    bool reading;       /* it holds core->reading */
    bool writing;       /* it holds core->writing */
    Reader *reader;     /* NULL if it sends */
    Core *core;         /* of the reader; NULL if that is no native one */
    PyObject *argument; /* the number as it was given, the delimiter, or what is to be sent */
    PyObject *limit;    /* max_bytes as it was given, or NULL */
    Py_ssize_t n, most; /* bytes wanted, and at most */
    int64_t deadline;
    int64_t end;        /* where the window ends now, as the token said; 0: unknown */
    PyObject *inner;    /* a coroutine of Python's that has to end first */
    PyObject *received; /* bytes straight from the socket, not returned yet */
};

/* ---- a handler and its task; drive.c has the table ------------------------ */

enum drive_state { D_NEW, D_RUNNING, D_PARKED, D_RESTING, D_IDLE, D_LEAVING, D_PASSING, D_OVER };

struct Drive {
    FUTURE_HEAD
    uint8_t state;
    bool must_cancel;  /* while the handler ran in the name of the task */
    bool has_run;      /* in this resumption */
    bool by_hub;       /* is being stepped by it, not by the task */
    bool is_protected; /* Trio: the task, from KeyboardInterrupt */
    bool ended;        /* LEAVING: outcome is the handler's result */
    Hub *hub;
    PyObject *inner; /* the handler's coroutine */
    PyObject *task;
    PyObject *outcome;     /* LEAVING: what the handler has yielded, or its result; or NULL */
    PyObject *exception;   /* LEAVING: what it has raised; or NULL */
    PyObject *interrupt;   /* LEAVING: what is to be thrown into it; or NULL */
    PyObject *abort;       /* Trio: the method _abort, once it was needed */
    PyObject *scopes;      /* asyncio: AnyIO's TaskState of the task, once it was needed */
    Drive *prev, *next;    /* RESTING: in the hub's list; IDLE: in that of its workers */
    uint32_t round;        /* RESTING: goes on in that one */
    bool by_task;          /* is resumed by its task, always */
    bool looking;          /* counts in pool->looking */
    Workers *pool;         /* a worker: whose jobs it does, one after another; or NULL */
    Requests *job;         /* whose step the coroutine is part of */
    PyObject *job_context; /* that runs in it */
};

/* ---- request mode; requests.c has the table -------------------------------- */

enum phase { P_BEGIN, P_BEFORE, P_CALL, P_END };

struct Requests {
    PyObject_HEAD Core *core;
    PyObject *conn;     /* the argument of calls */
    PyObject *function; /* what is called */
    PyObject *before;   /* what a worker calls first of all; or NULL */
    PyObject *owner;    /* decides what becomes of the connection */
    PyObject *call;     /* of the owner: calls the function; or None */
    PyObject *context;  /* steps run in copies of it */
    Workers *pool;
    Requests *next, *prev; /* in the hub's list of idle ones; next: in the queue of the pool */
    uint8_t phase;
    bool idle, queued;
    char fresh;    /* the unread input is new to the function */
    char due;      /* as far as the core knows, a call has begun */
    char over;     /* no call will begin any more */
    char carries;  /* output of earlier calls is still pending */
    char taskless; /* it has begun, and no step is running */
};

struct Workers {
    PyObject_HEAD Hub *hub;
    PyObject *start;        /* starts a task that runs an async function; returns whether it can */
    Requests *ready, *last; /* the queue; holds them strongly */
    Drive *idle;            /* without a job; the list holds them strongly */
    int parked;             /* how many they are */
    int looking;    /* workers whose tasks will look at the queue, including those being started */
    int starting;   /* those whose tasks have not begun */
    bool is_due;    /* in the hub's list */
    bool is_walked; /* the hub will look at it again in this walk */
    Workers *next_due;
};

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
/* A method of Hub. */
PyObject *hub_drive(PyObject *self, PyObject *loan);

Operation *operation_new(enum kind kind, Reader *reader, PyObject *argument);
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
