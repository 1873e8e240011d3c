/* One call that may have to wait, as an awaitable.
 *
 * It does nothing until it is awaited, like a coroutine. Its states:
 *
 *   state    | what it waits for                        | send()              | throw()
 *   NEW      | to be awaited                            | begins              | OVER
 *   INNER    | a coroutine of Python's: what is seldom  | passed on           | passed on
 *   ARMED    | the core's word                          | asks again          | disarms, OVER
 *   READY    | the task's turn: the wait is over, or    | looks what is there | disarms, OVER
 *            | the event loop has cancelled it          |                     |
 *   YIELDED  | the next round of the event loop         | goes on             | OVER
 *   OPEN     | nothing: the window is open on the bytes; the result is taken at once
 *   OVER     | nothing                                  | RuntimeError        | raises it
 *
 * On asyncio it yields itself, and is what the task takes for a future: the task leaves its
 * wake-up (add_done_callback), asks for the result, and cancels. It differs from a Future in one
 * way, that its wake-up may be called at once. cancel() returns True whenever it has not gone on
 * yet, also the second time: AnyIO repeats the cancellation until the task has run, and a False
 * would make the task be cancelled once more later. On Trio it yields what makes the scheduler
 * wait for reschedule().
 */
#include "native.h"

const char *const operation_names[KINDS] = {
    [FILL] = "fill",
    [PEEK] = "peek",
    [NEXT] = "next",
    [SKIP] = "skip",
    [READ_BYTES] = "read_bytes",
    [UNTIL] = "until",
    [FIND] = "find",
    [RECEIVE] = "receive",
    [SEND] = "send",
    [FLUSH] = "flush",
};

/* ---- life ---------------------------------------------------------------- */

#define SPARE 64

static Operation *spare[SPARE];
static int spare_count;

Operation *operation_new(enum kind kind, Reader *reader, PyObject *argument)
{
    Operation *op;
    if (spare_count > 0) {
        op = spare[--spare_count];
        PyObject_Init((PyObject *)op, Operation_Type);
    } else {
        op = PyObject_GC_New(Operation, Operation_Type);
        if (!op)
            return NULL;
    }
    memset((char *)op + sizeof(PyObject), 0, sizeof *op - sizeof(PyObject));
    op->kind = (uint8_t)kind;
    op->blocking = -1;
    op->reader = (Reader *)Py_XNewRef((PyObject *)reader);
    op->argument = Py_NewRef(argument);
    return op; /* tracked only once it is suspended, or has ended and is kept: most never are */
}

static void track(Operation *op)
{
    if (!PyObject_GC_IsTracked((PyObject *)op))
        PyObject_GC_Track((PyObject *)op);
}

int operation_traverse(PyObject *self, visitproc visit, void *arg)
{
    Operation *op = (Operation *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)op->reader);
    Py_VISIT((PyObject *)op->core);
    Py_VISIT(op->argument);
    Py_VISIT(op->limit);
    Py_VISIT(op->inner);
    return future_visit((Future *)op, visit, arg);
}

/* Lets go of everything, and of the right to read or to write. */
static void release(Operation *op)
{
    op->state = OVER;
    if (op->reading)
        op->core->reading = false;
    if (op->writing)
        op->core->writing = false;
    op->reading = op->writing = false;
    if (op->received)
        receive_put_back(op);
    Py_CLEAR(op->inner);
    future_drop((Future *)op);
    if (Py_REFCNT((PyObject *)op) > 1)
        track(op);
}

static void forget(Operation *op)
{
    Py_CLEAR(op->argument);
    Py_CLEAR(op->limit);
    Py_CLEAR(op->core);
    Py_CLEAR(op->reader);
}

int operation_clear(PyObject *self)
{
    release((Operation *)self);
    forget((Operation *)self);
    return 0;
}

static void warn_unawaited(Operation *op)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (PyErr_WarnFormat(PyExc_RuntimeWarning, 1, "coroutine '%s' was never awaited",
                         operation_names[op->kind]) < 0)
        PyErr_WriteUnraisable((PyObject *)Operation_Type);
    PyErr_Restore(type, value, traceback);
}

void operation_dealloc(PyObject *self)
{
    Operation *op = (Operation *)self;
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    if (op->state == NEW)
        warn_unawaited(op);
    if (op->state != OVER)
        release(op);
    forget(op);
    if (spare_count < SPARE)
        spare[spare_count++] = op;
    else
        PyObject_GC_Del(self);
    Py_DECREF(type);
}

/* ---- going on --------------------------------------------------------------- */

static PySendResult go_on(Operation *op, int rc, PyObject **result);

/* Whoever has woken the task still holds the operation when the task goes on, and perhaps forgets
 * its connection: that is not to live as long. */
static void end(Operation *op)
{
    release(op);
    Py_CLEAR(op->core);
    Py_CLEAR(op->reader);
}

static PySendResult fail(Operation *op)
{
    end(op);
    return PYGEN_ERROR;
}

static PySendResult done(Operation *op, PyObject **result)
{
    if (op->reading) /* before the result: views are taken by whoever reads */
        op->core->reading = false;
    op->reading = false;
    *result = op->reader ? reading_result(op) : Py_NewRef(Py_None);
    end(op);
    return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

static PySendResult inner_ended(Operation *op, PyObject *value, PyObject **result)
{
    Py_CLEAR(op->inner);
    op->state = OPEN;
    int rc = 0;
    switch (op->step) {
    case ASK:
        op->suspended = PyObject_IsTrue(value) == 1;
        rc = op->core->closed ? core_refuse(op->core) : core_ask(op->core, op);
        break;
    case SOURCE:
        if (operation_finds(op))
            op->n = PyLong_AsSsize_t(value);
        else
            op->suspended = PyObject_IsTrue(value) == 1;
        rc = PyErr_Occurred() ? -1 : 0;
        break;
    case CHECKED: rc = core_reopen(op->core, op); break;
    default: rc = send_go_on(op, value); break;
    }
    Py_DECREF(value);
    return go_on(op, rc, result);
}

static PySendResult into_inner(Operation *op, PyObject *value, PyObject **result)
{
    PyObject *inner = Py_NewRef(op->inner), *answer = NULL;
    PySendResult how = PyIter_Send(inner, value, &answer);
    Py_DECREF(inner);
    if (how == PYGEN_RETURN)
        return inner_ended(op, answer, result);
    if (how == PYGEN_ERROR)
        return fail(op);
    track(op);
    *result = answer;
    return PYGEN_NEXT;
}

/* Hands the event loop what it waits on. */
static PySendResult suspend(Operation *op, PyObject **result)
{
    track(op);
    Hub *hub = op->core->hub;
    if (!hub->trio || hub->stepping) { /* a drive takes it as it is */
        op->blocking = 1;
        *result = Py_NewRef((PyObject *)op);
        return PYGEN_NEXT;
    }
    *result = hub_trap(hub, op);
    if (*result)
        return PYGEN_NEXT;
    core_stop_waiting(op->core);
    return fail(op);
}

/* Lets the event loop have a round. On Trio this is not cancelled. */
static PySendResult yield_once(Operation *op, PyObject **result)
{
    Hub *hub = op->core->hub;
    track(op);
    op->blocking = 1;
    if (drive_takes_rests(hub))
        *result = Py_NewRef((PyObject *)op);
    else
        *result = Py_NewRef(hub->trio ? hub->shielded : Py_None);
    return PYGEN_NEXT;
}

/* receive() has its bytes: it shuts the window, and opens it again afterwards. */
static PySendResult checkpoint(Operation *op, PyObject **result)
{
    op->end = op->reader->end;
    op->reader->end = SHUT;
    op->step = CHECKED;
    op->state = YIELDED;
    return yield_once(op, result);
}

static int after_yield(Operation *op)
{
    op->state = OPEN;
    if (!op->reader)
        return 0;
    Hub *hub = op->core->hub;
    if (!hub->trio || !send_may_be_cancelled(hub))
        return core_reopen(op->core, op);
    op->inner = PyObject_CallNoArgs(hub->look);
    op->state = INNER;
    return op->inner ? 0 : -1;
}

static PySendResult failed(Operation *op, PyObject **result)
{
    /* An end of stream is a success, to code that turns it into b"": so it is a checkpoint. */
    if (op->kind != RECEIVE || !PyErr_ExceptionMatches(EndOfStream))
        return fail(op);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    release(op);
    PyObject *raised = op->iterates ? PyExc_StopAsyncIteration : value;
    op->inner =
        PyObject_CallMethodObjArgs((PyObject *)op->core, n__checkpoint_and_raise, raised, NULL);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    if (!op->inner)
        return PYGEN_ERROR;
    op->state = INNER;
    op->kind = FILL; /* it will only raise */
    return into_inner(op, Py_None, result);
}

static PySendResult go_on(Operation *op, int rc, PyObject **result)
{
    if (rc < 0)
        return failed(op, result);
    switch (op->state) {
    case ARMED: return suspend(op, result);
    case INNER: return into_inner(op, Py_None, result);
    case YIELDED: return yield_once(op, result);
    default: break;
    }
    if (op->kind == RECEIVE && !op->suspended && op->step != CHECKED)
        return checkpoint(op, result);
    return done(op, result);
}

static PySendResult begin(Operation *op, PyObject **result)
{
    op->state = OPEN;
    return go_on(op, !op->reader && op->core ? send_begin(op) : reading_begin(op), result);
}

/* ---- the protocol of a coroutine ----------------------------------------------- */

static PySendResult resume(Operation *op, PyObject *value, PyObject **result)
{
    Core *core = op->core;
    hub_forget_wait(core); /* nothing, unless somebody else has woken the task */
    Py_CLEAR(op->wake);
    Py_CLEAR(op->context);
    op->blocking = -1;
    if (core->hub->trio && op->state == ARMED && value != Py_None) {
        PyObject *none = PyObject_CallMethodObjArgs(value, n_unwrap, NULL);
        if (!none) {
            core_stop_waiting(core);
            return fail(op);
        }
        Py_DECREF(none);
    }
    return go_on(op, core_resume(core, op), result);
}

PySendResult operation_send(PyObject *self, PyObject *value, PyObject **result)
{
    Operation *op = (Operation *)self;
    *result = NULL;
    switch (op->state) {
    case NEW: return begin(op, result);
    case INNER: return into_inner(op, value, result);
    case ARMED:
    case READY: return resume(op, value, result);
    case YIELDED: return go_on(op, after_yield(op), result);
    default: break;
    }
    PyErr_SetString(PyExc_RuntimeError, "cannot reuse already awaited coroutine");
    return PYGEN_ERROR;
}

static PySendResult throw_into_inner(Operation *op, PyObject *const *args, Py_ssize_t n,
                                     PyObject **result)
{
    PyObject *inner = Py_NewRef(op->inner);
    PySendResult how = native_throw(inner, args, n, result);
    Py_DECREF(inner);
    if (how == PYGEN_RETURN)
        return inner_ended(op, *result, result);
    return how == PYGEN_ERROR ? fail(op) : how;
}

PyObject *operation_throw(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    Operation *op = (Operation *)self;
    if (n < 1 || n > 3) {
        PyErr_SetString(PyExc_TypeError, "throw() takes an exception");
        return NULL;
    }
    if (op->state == INNER) {
        PyObject *result = NULL;
        PySendResult how = throw_into_inner(op, args, n, &result);
        return native_as_iterator(how, result);
    }
    if (op->state == ARMED || op->state == READY)
        core_stop_waiting(op->core); /* nothing was consumed: the buffer has it all */
    release(op);
    native_raise(args, n);
    return NULL;
}

PyObject *operation_close(PyObject *self, PyObject *unused)
{
    Operation *op = (Operation *)self;
    if (op->state == INNER) {
        PyObject *inner = Py_NewRef(op->inner);
        PyObject *none = PyObject_CallMethodObjArgs(inner, n_close, NULL);
        Py_DECREF(inner);
        release(op);
        return none;
    }
    if (op->state == ARMED || op->state == READY)
        core_stop_waiting(op->core);
    release(op);
    Py_RETURN_NONE;
}
