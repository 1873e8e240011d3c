/* Between the task of a handler and the handler: resumes the handler directly.
 *
 * A handler that waits for its connection need not be resumed by its task: the scheduler's part
 * (a future with its callbacks, a handle, a round of the event loop) costs more than all that the
 * core does for a request. So the server awaits a drive, which awaits the handler. While the
 * handler waits for one of our operations, the task waits for the drive, once; the hub resumes the
 * handler in the name of the task (asyncio's enter_task and leave_task, the task's context), and
 * the task never notices. Whatever else the handler waits for goes to the task as it is.
 *
 *   state   | the handler                   | the task                | send()    | the hub
 *   NEW     | has not begun                 | awaits the drive        | begins    | -
 *   RUNNING | runs                          | runs, or is represented | -         | -
 *   PARKED  | waits for an operation        | waits for the drive     | goes on   | resumes it
 *   RESTING | lets the loop have a round, | waits for the drive     | goes on   | resumes it
 *           | which the hub calls (rest.c)  |                         |           | in that
 *   IDLE    | a worker's: there is none     | waits for the drive     | looks for | gives it
 *           |                               |                         | a job     | a job
 *   LEAVING | has yielded something else,   | is about to run         | hands     | does
 *           | has ended, or is to be        |                         | that over | nothing
 *           | cancelled                     |                         |           |
 *   PASSING | waits for something else      | waits for the same      | goes on   | -
 *   OVER    | has ended                     |                         | raises    | -
 *
 * Cancellation. asyncio's Task.cancel() asks what the task waits for to cancel itself. PARKED, the
 * drive has the task woken with the cancellation, which throws it into the handler. While the
 * handler runs in the name of the task, the drive is what the task seems to wait for; the
 * cancellation is kept, and made the task's own (cancel and uncancel: the request has been counted)
 * before anything else is handed to it.
 *
 * The drive of a worker (workers.c) has one coroutine after another, and ends only with its task.
 *
 * drive_asyncio.c and drive_trio.c have what differs between the loops.
 */
#include "native.h"

/* ---- stepping the handler -------------------------------------------------- */

static void park(Drive *drive, Operation *op)
{
    op->blocking = -1;
    if (op->state == YIELDED) {
        hub_rest(drive);
        return;
    }
    drive->state = D_PARKED;
    replace(&op->wake, (PyObject *)drive);
}

static bool is_ours(Drive *drive, PyObject *yielded)
{
    if (Py_TYPE(yielded) != Operation_Type)
        return false;
    Operation *op = (Operation *)yielded;
    return (op->state == ARMED || op->state == YIELDED) && op->core->hub == drive->hub && !op->wake;
}

/* What the task is given that the handler has yielded. What lies between the handler and one of our
 * operations may have closed the connection by now: to asyncio's task that is a future that is
 * done, but Trio would not know it. There the task has a round instead. */
static PyObject *for_the_task(Drive *drive, PyObject *yielded)
{
    if (!drive->hub->trio || Py_TYPE(yielded) != Operation_Type ||
        ((Operation *)yielded)->state != READY)
        return yielded;
    Py_DECREF(yielded);
    return Py_NewRef(drive->hub->shielded);
}

bool drive_takes_rests(Hub *hub)
{
    return hub->stepping && hub->can_rest;
}

void drive_unlist(Drive *drive)
{
    if (drive->state == D_RESTING)
        hub_end_rest(drive);
    else if (drive->state == D_IDLE)
        worker_unlist(drive);
}

void drive_leave(Drive *drive)
{
    drive_unlist(drive);
    if (drive->pool && !drive->job)
        workers_look_later(drive);
    drive->state = D_LEAVING;
}

static PySendResult step_inner(Drive *drive, PyObject *value, PyObject **result)
{
    Hub *hub = drive->hub;
    Drive *outer = hub->stepping;
    PyObject *inner = Py_XNewRef(drive->inner);
    drive->state = D_RUNNING;
    hub->stepping = drive;
    PySendResult how =
        drive->pool ? worker_send(drive, value, result) : PyIter_Send(inner, value, result);
    hub->stepping = outer;
    Py_XDECREF(inner);
    return how;
}

static PySendResult finish(Drive *drive, PySendResult how)
{
    drive->state = D_OVER;
    if (drive->pool)
        worker_end(drive);
    Py_CLEAR(drive->inner);
    Py_CLEAR(drive->task);
    Py_CLEAR(drive->context);
    Py_CLEAR(drive->wake);
    Py_CLEAR(drive->abort);
    Py_CLEAR(drive->scopes);
    return how;
}

/* What the task is to wait for while the handler is parked. */
static PySendResult wait_for_drive(Drive *drive, PyObject **result)
{
    if (drive->hub->trio) {
        *result = drive_trap(drive);
        if (*result && drive->state == D_LEAVING) { /* a signal handler has ended the wait */
            Py_DECREF(*result);
            *result = Py_NewRef(drive->hub->shielded);
        }
        return *result ? PYGEN_NEXT : PYGEN_ERROR;
    }
    drive->blocking = 1;
    *result = Py_NewRef((PyObject *)drive);
    return PYGEN_NEXT;
}

static PySendResult throw_in(Drive *drive, PyObject *const *args, Py_ssize_t n, PyObject **result);

/* The exception that is set is the handler's. */
static PySendResult throw_current(Drive *drive, PyObject **result)
{
    PyObject *exception = native_take_exception();
    PySendResult how = throw_in(drive, &exception, 1, result);
    Py_DECREF(exception);
    return how;
}

/* A worker has nothing to do. */
static bool may_rest(Drive *drive, PySendResult how)
{
    return drive->pool && how == PYGEN_RETURN && worker_rest(drive);
}

/* What is returned at the end. */
static PyObject *result_or_none(PyObject *result)
{
    return result ? result : Py_NewRef(Py_None);
}

/* The handler has been stepped by its task. */
static PySendResult stepped_by_task(Drive *drive, PySendResult how, PyObject **result)
{
    Hub *hub = drive->hub;
    if (how == PYGEN_NEXT && !is_ours(drive, *result)) {
        drive->state = D_PASSING;
        *result = for_the_task(drive, *result);
        return PYGEN_NEXT;
    }
    if (how == PYGEN_NEXT) {
        park(drive, (Operation *)*result);
        Py_CLEAR(*result);
    } else if (!may_rest(drive, how)) {
        if (how == PYGEN_RETURN)
            *result = result_or_none(*result);
        return finish(drive, how);
    }
    if (hub->depth == 0 && hub_ask_for_round(hub) < 0) /* within a callback of the hub it asks */
        return throw_current(drive, result);
    how = wait_for_drive(drive, result);
    return how == PYGEN_ERROR ? throw_current(drive, result) : how; /* of a signal handler, say */
}

/* ---- resumed by the hub --------------------------------------------------------- */

static void step(Drive *drive)
{
    PyObject *result = NULL;
    drive->has_run = drive->by_hub = true;
    PySendResult how = step_inner(drive, Py_None, &result);
    drive->by_hub = false;
    if (how == PYGEN_NEXT && is_ours(drive, result)) {
        park(drive, (Operation *)result);
        Py_DECREF(result);
        return;
    }
    if (may_rest(drive, how))
        return;
    drive->state = D_LEAVING;
    drive->ended = how == PYGEN_RETURN;
    drive->outcome = drive->ended ? result_or_none(result) : result;
    if (how == PYGEN_NEXT)
        drive->outcome = for_the_task(drive, result);
    if (how == PYGEN_ERROR)
        drive->exception = native_take_exception();
}

bool drive_step_in(Drive *drive, PyObject *context)
{
    if (drive->pool) { /* its coroutine runs in the context of a job */
        step(drive);
        return true;
    }
    if (enter_context(context) < 0)
        return false;
    step(drive);
    if (exit_context(context) < 0)
        PyErr_Clear(); /* whoever has entered another one by C, and not left it */
    return true;
}

/* The walk holds each drive meanwhile: the handler may close its task's coroutine, which holds it
 * otherwise. One that is not PARKED has had its task woken for another reason, and goes on by that.
 */
void drive_walk(walk *walk)
{
    if (walk->hub->trio) {
        drive_walk_on_trio(walk);
        return;
    }
    Drive *drive;
    PyObject *outer = walk->hub->entered; /* in which dispatch() has been called */
    walk->hub->entered = NULL;
    while ((drive = walk->next(walk))) {
        if (drive->state == D_PARKED && drive_resume_on_asyncio(drive) < 0)
            hub_keep_exception(walk->left);
        Py_DECREF((PyObject *)drive);
    }
    if (hub_leave_task(walk->hub) < 0)
        hub_keep_exception(walk->left);
    walk->hub->entered = outer;
}

int drive_resume_soon(Drive *drive)
{
    if (drive->state != D_PARKED && drive->state != D_RESTING && drive->state != D_IDLE)
        return 0;
    PyObject *self = Py_NewRef((PyObject *)drive);
    drive_leave(drive);
    int rc = drive->hub->trio ? drive_reschedule_blocked(drive)
                              : future_wake_soon((Future *)drive, drive->hub);
    Py_DECREF(self);
    return rc;
}

static PyObject *refuse_running(void)
{
    PyErr_SetString(PyExc_ValueError, "coroutine already executing");
    return NULL;
}

/* ---- the protocol of a coroutine ------------------------------------------------ */

static PySendResult begin(Drive *drive, PyObject **result)
{
    Hub *hub = drive->hub;
    drive->task = hub_current_task(hub);
    if (!drive->task)
        return finish(drive, PYGEN_ERROR);
    drive->is_protected =
        hub->trio && !drive->by_task && native_is_true(drive->task, n__ki_protected);
    PySendResult how = step_inner(drive, Py_None, result);
    return stepped_by_task(drive, how, result);
}

/* LEAVING: the task runs, and gets what there is for it. */
static PySendResult after_abort(Drive *drive, PyObject *value, PyObject **result);

static PySendResult hand_over(Drive *drive, PyObject *value, PyObject **result)
{
    if (drive_pass_on_cancellation(drive) < 0)
        PyErr_Clear();
    PyObject *exception = drive->exception, *interrupt = drive->interrupt;
    *result = drive->outcome;
    drive->exception = drive->outcome = drive->interrupt = NULL;
    if (interrupt) {
        PySendResult how = throw_in(drive, &interrupt, 1, result);
        Py_DECREF(interrupt);
        return how;
    }
    if (exception) {
        native_raise_again(exception);
        return finish(drive, PYGEN_ERROR);
    }
    if (drive->ended)
        return finish(drive, PYGEN_RETURN);
    if (*result) {
        drive->state = D_PASSING;
        return PYGEN_NEXT;
    }
    if (drive->hub->trio)
        return after_abort(drive, value, result);
    PySendResult how = step_inner(drive, Py_None, result);
    return stepped_by_task(drive, how, result);
}

static int unwrap(PyObject *value)
{
    PyObject *none = PyObject_CallMethodObjArgs(value, n_unwrap, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

/* On Trio the task is sent outcomes: a cancellation that found the handler parked is one. */
static PySendResult after_abort(Drive *drive, PyObject *value, PyObject **result)
{
    if (value == drive->hub->value || unwrap(value) == 0) {
        PySendResult how = step_inner(drive, Py_None, result);
        return stepped_by_task(drive, how, result);
    }
    return throw_current(drive, result);
}

PySendResult drive_send(PyObject *self, PyObject *value, PyObject **result)
{
    Drive *drive = (Drive *)self;
    PySendResult how;
    *result = NULL;
    drive_unlist(drive);
    switch (drive->state) {
    case D_NEW: return begin(drive, result);
    case D_PARKED:
    case D_PASSING:
        how = step_inner(drive, drive->state == D_PASSING ? value : Py_None, result);
        return stepped_by_task(drive, how, result);
    case D_LEAVING: return hand_over(drive, value, result);
    case D_RUNNING: refuse_running(); return PYGEN_ERROR;
    default: break;
    }
    PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
    return PYGEN_ERROR;
}

static PySendResult throw_in(Drive *drive, PyObject *const *args, Py_ssize_t n, PyObject **result)
{
    Hub *hub = drive->hub;
    Drive *outer = hub->stepping;
    PyObject *inner = Py_XNewRef(drive->inner);
    drive_unlist(drive);
    if (!inner) {
        native_raise(args, n);
        return finish(drive, PYGEN_ERROR);
    }
    drive->state = D_RUNNING;
    drive->cancelled = false;
    Py_CLEAR(drive->outcome);
    Py_CLEAR(drive->exception);
    hub->stepping = drive;
    PySendResult how =
        drive->pool ? worker_throw(drive, args, n, result) : native_throw(inner, args, n, result);
    hub->stepping = outer;
    Py_DECREF(inner);
    return stepped_by_task(drive, how, result);
}

PySendResult drive_throw(Drive *drive, PyObject *const *args, Py_ssize_t n, PyObject **result)
{
    if (drive->state == D_RUNNING) {
        refuse_running();
        return PYGEN_ERROR;
    }
    return drive_postpones_cancellation(drive, args[0]) ? hand_over(drive, Py_None, result)
                                                        : throw_in(drive, args, n, result);
}

static PyObject *close_worker(Drive *drive)
{
    drive->state = D_RUNNING;
    int rc = worker_close(drive);
    finish(drive, PYGEN_RETURN);
    if (rc < 0)
        return NULL;
    Py_RETURN_NONE;
}

PyObject *drive_close(PyObject *self, PyObject *unused)
{
    Drive *drive = (Drive *)self;
    if (drive->state == D_RUNNING)
        return refuse_running();
    drive_unlist(drive);
    if (drive->pool)
        return close_worker(drive);
    PyObject *inner = drive->inner;
    drive->inner = NULL;
    drive->state = D_OVER;
    PyObject *none = inner ? PyObject_CallMethodObjArgs(inner, n_close, NULL) : Py_NewRef(Py_None);
    Py_XDECREF(inner);
    return none;
}
