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
 * Trio lends no names for this. What is used of its inside is looked up once
 * (_loop/trio_hub.py), and without it handlers are resumed by their tasks. A foreign trap
 * cannot wait for the task's next turn, because its waker may come before; so the task is blocked
 * in it at once, as Trio's own loop would do it. While the handler runs in the name of its task
 * there is no abort function, or a handler that cancels itself would have the running task
 * rescheduled; the pending cancellation is looked for when it has parked again.
 */
#include "native.h"

PyTypeObject *Drive_Type;

enum { D_NEW, D_RUNNING, D_PARKED, D_LEAVING, D_PASSING, D_OVER };

struct Drive {
    PyObject_HEAD uint8_t state;
    int8_t blocking;  /* as of an Operation */
    bool cancelled;   /* PARKED: the task is told so when it asks for the result */
    bool must_cancel; /* while the handler ran in the name of the task */
    bool ended;       /* LEAVING: outcome is the handler's result */
    Hub *hub;
    PyObject *inner; /* the handler's coroutine */
    PyObject *task;
    PyObject *wake;      /* asyncio: the task's wake-up, while it waits for the drive */
    PyObject *context;   /* asyncio: what it runs in */
    PyObject *outcome;   /* LEAVING: what the handler has yielded, or its result; or NULL */
    PyObject *exception; /* LEAVING: what it has raised; or NULL */
    PyObject *message;   /* of the cancellation */
};

/* ---- stepping the handler -------------------------------------------------- */

static void park(Drive *drive, Operation *op)
{
    drive->state = D_PARKED;
    op->blocking = -1;
    replace(&op->wake, (PyObject *)drive);
}

static bool is_ours(Drive *drive, PyObject *yielded)
{
    if (Py_TYPE(yielded) != Operation_Type)
        return false;
    Operation *op = (Operation *)yielded;
    return op->state == ARMED && op->core->hub == drive->hub && !op->wake;
}

static PySendResult step_inner(Drive *drive, PyObject *value, PyObject **result)
{
    Hub *hub = drive->hub;
    Drive *outer = hub->stepping;
    PyObject *inner = Py_NewRef(drive->inner);
    drive->state = D_RUNNING;
    hub->stepping = drive;
    PySendResult how = PyIter_Send(inner, value, result);
    hub->stepping = outer;
    Py_DECREF(inner);
    return how;
}

static PySendResult finish(Drive *drive, PySendResult how)
{
    drive->state = D_OVER;
    Py_CLEAR(drive->inner);
    Py_CLEAR(drive->task);
    Py_CLEAR(drive->context);
    Py_CLEAR(drive->wake);
    return how;
}

/* What the task is to wait for while the handler is parked. */
static PySendResult wait_for_drive(Drive *drive, PyObject **result)
{
    if (drive->hub->trio) {
        *result = PyObject_CallMethodObjArgs((PyObject *)drive->hub, n__drive_trap,
                                             (PyObject *)drive, NULL);
        return *result ? PYGEN_NEXT : PYGEN_ERROR;
    }
    drive->blocking = 1;
    *result = Py_NewRef((PyObject *)drive);
    return PYGEN_NEXT;
}

/* The handler has been stepped by its task. */
static PySendResult stepped_by_task(Drive *drive, PySendResult how, PyObject **result)
{
    if (how != PYGEN_NEXT)
        return finish(drive, how);
    if (!is_ours(drive, *result)) {
        drive->state = D_PASSING;
        return PYGEN_NEXT;
    }
    park(drive, (Operation *)*result);
    Py_CLEAR(*result);
    return wait_for_drive(drive, result);
}

/* ---- asyncio: handing over to the task --------------------------------------- */

static int wake_task(Drive *drive)
{
    PyObject *wake = drive->wake, *context = Py_XNewRef(drive->context), *none;
    drive->wake = NULL;
    if (!wake) {
        Py_XDECREF(context);
        return 0;
    }
    none = context ? PyObject_CallMethodObjArgs(context, n_run, wake, (PyObject *)drive, NULL)
                   : PyObject_CallFunctionObjArgs(wake, (PyObject *)drive, NULL);
    Py_DECREF(wake);
    Py_XDECREF(context);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

static int wake_task_soon(Drive *drive)
{
    PyObject *wake = drive->wake;
    if (!wake)
        return 0; /* add_done_callback will find that it is LEAVING */
    drive->wake = NULL;
    int rc = hub_call_soon(drive->hub, wake, (PyObject *)drive, drive->context);
    Py_DECREF(wake);
    return rc;
}

static int cancel_parked(Drive *drive, PyObject *message)
{
    drive->state = D_LEAVING;
    drive->cancelled = true;
    replace(&drive->message, message);
    return wake_task_soon(drive);
}

/* Makes the cancellation that came while the handler ran the task's own. */
static int pass_on_cancellation(Drive *drive)
{
    if (!drive->must_cancel)
        return 0;
    drive->must_cancel = false;
    PyObject *message = drive->message ? drive->message : Py_None;
    PyObject *done = PyObject_CallMethodObjArgs(drive->task, n_cancel, message, NULL);
    PyObject *left = done ? PyObject_CallMethodObjArgs(drive->task, n_uncancel, NULL) : NULL;
    Py_XDECREF(done);
    Py_XDECREF(left);
    return left ? 0 : -1;
}

/* ---- Trio ---------------------------------------------------------------------- */

static int count_point(PyObject *task, PyObject *name)
{
    PyObject *count = PyObject_GetAttr(task, name), *one = PyLong_FromLong(1), *more = NULL;
    if (count && one)
        more = PyNumber_Add(count, one);
    int rc = more ? PyObject_SetAttr(task, name, more) : -1;
    Py_XDECREF(count);
    Py_XDECREF(one);
    Py_XDECREF(more);
    return rc;
}

/* Blocks the task with that abort function, as Trio's own loop does. */
static int block_trio_task(Drive *drive, PyObject *abort)
{
    PyObject *task = drive->task;
    if (PyObject_SetAttr(task, n__abort_func, abort) < 0 ||
        count_point(task, n__cancel_points) < 0 || count_point(task, n__schedule_points) < 0)
        return -1;
    PyObject *none =
        PyObject_CallMethodObjArgs(task, n__attempt_delivery_of_any_pending_cancel, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

static int reschedule(Drive *drive)
{
    PyObject *none =
        PyObject_CallFunctionObjArgs(drive->hub->reschedule, drive->task, drive->hub->value, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

/* The handler has yielded a trap of somebody else's: the task is blocked in it. */
static int block_in_foreign_trap(Drive *drive, PyObject *trap)
{
    PyObject *kind = (PyObject *)Py_TYPE(trap);
    if (kind == drive->hub->wait_trap) {
        drive->state = D_PASSING;
        PyObject *abort = PyObject_GetAttr(trap, n_abort_func);
        int rc = abort ? block_trio_task(drive, abort) : -1;
        Py_XDECREF(abort);
        return rc;
    }
    drive->state = D_LEAVING;
    replace(&drive->outcome, trap);
    return reschedule(drive);
}

/* ---- resumed by the hub --------------------------------------------------------- */

static void keep_exception(Drive *drive)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    drive->exception = value;
}

/* Called within the task's context. Leaves in drive->state how it stands. */
static PyObject *step_method(PyObject *self, PyObject *unused)
{
    Drive *drive = (Drive *)self;
    PyObject *result = NULL;
    PySendResult how = step_inner(drive, Py_None, &result);
    if (how == PYGEN_NEXT && is_ours(drive, result)) {
        park(drive, (Operation *)result);
        Py_DECREF(result);
        Py_RETURN_NONE;
    }
    drive->state = D_LEAVING;
    drive->ended = how == PYGEN_RETURN;
    drive->outcome = result;
    if (how == PYGEN_ERROR)
        keep_exception(drive);
    Py_RETURN_NONE;
}

static int resume_on_asyncio(Drive *drive)
{
    PyObject *loop = hub_loop(drive->hub), *none;
    none = PyObject_CallFunctionObjArgs(enter_task, loop, drive->task, NULL);
    if (!none) { /* a task is running: it cannot be helped here */
        Py_DECREF(loop);
        PyErr_Clear();
        drive->state = D_LEAVING;
        return wake_task_soon(drive);
    }
    Py_DECREF(none);
    PyObject *step = PyObject_GetAttr((PyObject *)drive, n__step);
    none = step ? PyObject_CallMethodObjArgs(drive->context, n_run, step, NULL) : NULL;
    Py_XDECREF(step);
    PyObject *left = PyObject_CallFunctionObjArgs(leave_task, loop, drive->task, NULL);
    Py_DECREF(loop);
    Py_XDECREF(left);
    if (!none || !left) {
        Py_XDECREF(none);
        return -1;
    }
    Py_DECREF(none);
    if (drive->state == D_LEAVING)
        return wake_task(drive);
    if (drive->must_cancel && drive->state == D_PARKED) {
        drive->must_cancel = false;
        PyObject *message = Py_NewRef(drive->message ? drive->message : Py_None);
        int rc = cancel_parked(drive, message);
        Py_DECREF(message);
        return rc;
    }
    return 0;
}

static int left_to_trio(Drive *drive)
{
    if (drive->state == D_PARKED) {
        PyObject *abort = PyObject_GetAttr((PyObject *)drive, n__abort);
        int rc = abort ? block_trio_task(drive, abort) : -1;
        Py_XDECREF(abort);
        return rc;
    }
    if (drive->state != D_LEAVING)
        return 0;
    if (!drive->outcome || drive->ended)
        return reschedule(drive);
    PyObject *trap = drive->outcome;
    drive->outcome = NULL;
    int rc = block_in_foreign_trap(drive, trap);
    Py_DECREF(trap);
    return rc;
}

static int resume_on_trio(Drive *drive)
{
    PyObject *cell = drive->hub->run_context, *task = Py_NewRef(drive->task), *none = NULL;
    PyObject *before = PyObject_GetAttr(cell, n_task); /* the hub's own */
    PyObject *context = before ? PyObject_GetAttr(task, n_context) : NULL;
    PyObject *step = context ? PyObject_GetAttr((PyObject *)drive, n__step) : NULL;
    if (step && PyObject_SetAttr(task, n__abort_func, Py_None) == 0 &&
        PyObject_SetAttr(cell, n_task, task) == 0) {
        none = PyObject_CallMethodObjArgs(context, n_run, step, NULL);
        if (PyObject_SetAttr(cell, n_task, before) < 0)
            Py_CLEAR(none);
    }
    int rc = none ? left_to_trio(drive) : -1;
    Py_XDECREF(none);
    Py_XDECREF(step);
    Py_XDECREF(context);
    Py_XDECREF(before);
    Py_DECREF(task);
    return rc;
}

/* Whether somebody may watch every step of tasks. Trio keeps its instruments in a dict by hook,
 * with one more entry for all of them. */
static int is_watched(Drive *drive)
{
    PyObject *runner = PyObject_GetAttr(drive->task, n__runner);
    PyObject *instruments = runner ? PyObject_GetAttr(runner, n_instruments) : NULL;
    Py_ssize_t hooks = instruments ? PyObject_Size(instruments) : -1;
    int watched = hooks < 0 ? -1 : hooks > 1;
    Py_XDECREF(runner);
    Py_XDECREF(instruments);
    return watched;
}

int drive_resume(Drive *drive)
{
    if (drive->state != D_PARKED)
        return 0; /* the task has been woken for another reason, and will go on itself */
    if (!drive->hub->trio)
        return drive->wake && drive->context ? resume_on_asyncio(drive) : drive_resume_soon(drive);
    int watched = is_watched(drive);
    if (watched < 0)
        return -1;
    return watched ? drive_resume_soon(drive) : resume_on_trio(drive);
}

int drive_resume_soon(Drive *drive)
{
    if (drive->state != D_PARKED)
        return 0;
    drive->state = D_LEAVING;
    return drive->hub->trio ? reschedule(drive) : wake_task_soon(drive);
}

/* ---- the protocol of a coroutine ------------------------------------------------ */

static PySendResult begin(Drive *drive, PyObject **result)
{
    Hub *hub = drive->hub;
    if (hub->trio) {
        drive->task = PyObject_CallNoArgs(hub->current_task);
    } else {
        PyObject *loop = hub_loop(hub);
        drive->task = PyObject_CallFunctionObjArgs(hub->current_task, loop, NULL);
        Py_DECREF(loop);
    }
    if (!drive->task)
        return finish(drive, PYGEN_ERROR);
    PySendResult how = step_inner(drive, Py_None, result);
    return stepped_by_task(drive, how, result);
}

/* LEAVING: the task runs, and gets what there is for it. */
static PySendResult after_abort(Drive *drive, PyObject *value, PyObject **result);

static PySendResult hand_over(Drive *drive, PyObject *value, PyObject **result)
{
    if (pass_on_cancellation(drive) < 0)
        PyErr_Clear();
    PyObject *exception = drive->exception;
    *result = drive->outcome;
    drive->exception = drive->outcome = NULL;
    if (exception) {
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_DECREF(exception);
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

static PySendResult throw_in(Drive *drive, PyObject *const *args, Py_ssize_t n, PyObject **result);

/* On Trio the task is sent outcomes: a cancellation that found the handler parked is one. */
static PySendResult after_abort(Drive *drive, PyObject *value, PyObject **result)
{
    if (value == drive->hub->value || unwrap(value) == 0) {
        PySendResult how = step_inner(drive, Py_None, result);
        return stepped_by_task(drive, how, result);
    }
    keep_exception(drive);
    PyObject *exception = drive->exception;
    drive->exception = NULL;
    PySendResult how = throw_in(drive, &exception, 1, result);
    Py_DECREF(exception);
    return how;
}

static PySendResult send(PyObject *self, PyObject *value, PyObject **result)
{
    Drive *drive = (Drive *)self;
    PySendResult how;
    *result = NULL;
    switch (drive->state) {
    case D_NEW: return begin(drive, result);
    case D_PARKED:
    case D_PASSING:
        how = step_inner(drive, drive->state == D_PASSING ? value : Py_None, result);
        return stepped_by_task(drive, how, result);
    case D_LEAVING: return hand_over(drive, value, result);
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
    if (!inner) {
        drive->state = D_OVER;
        native_raise(args, n);
        return PYGEN_ERROR;
    }
    drive->state = D_RUNNING;
    drive->cancelled = false;
    Py_CLEAR(drive->outcome);
    Py_CLEAR(drive->exception);
    hub->stepping = drive;
    PySendResult how = native_throw(inner, args, n, result);
    hub->stepping = outer;
    Py_DECREF(inner);
    return stepped_by_task(drive, how, result);
}

static PyObject *send_method(PyObject *self, PyObject *value)
{
    PyObject *result;
    PySendResult how = send(self, value, &result);
    return native_as_iterator(how, result);
}

static PyObject *iternext(PyObject *self)
{
    return send_method(self, Py_None);
}

static PyObject *throw_method(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (n < 1 || n > 3) {
        PyErr_SetString(PyExc_TypeError, "throw() takes an exception");
        return NULL;
    }
    PyObject *result = NULL;
    PySendResult how = throw_in((Drive *)self, args, n, &result);
    return native_as_iterator(how, result);
}

static PyObject *close_method(PyObject *self, PyObject *unused)
{
    Drive *drive = (Drive *)self;
    PyObject *inner = drive->inner;
    drive->inner = NULL;
    drive->state = D_OVER;
    PyObject *none = inner ? PyObject_CallMethodObjArgs(inner, n_close, NULL) : Py_NewRef(Py_None);
    Py_XDECREF(inner);
    return none;
}

/* ---- the protocol of a future ------------------------------------------------------ */

static PyObject *add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                   PyObject *names)
{
    Drive *drive = (Drive *)self;
    PyObject *context = names && PyTuple_Size(names) == 1 ? args[n] : NULL;
    if (n != 1 || drive->wake) {
        PyErr_SetString(PyExc_RuntimeError, "only a task can wait for this, and only one");
        return NULL;
    }
    replace(&drive->context, context);
    if (drive->state != D_PARKED) {
        if (hub_call_soon(drive->hub, args[0], self, context) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    drive->wake = Py_NewRef(args[0]);
    Py_RETURN_NONE;
}

static PyObject *remove_done_callback(PyObject *self, PyObject *callback)
{
    Drive *drive = (Drive *)self;
    int same = drive->wake ? PyObject_RichCompareBool(drive->wake, callback, Py_EQ) : 0;
    if (same < 0)
        return NULL;
    if (same)
        Py_CLEAR(drive->wake);
    return PyLong_FromLong(same);
}

static PyObject *cancel(PyObject *self, PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"msg", NULL};
    Drive *drive = (Drive *)self;
    PyObject *message = Py_None;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "|O", keywords, &message))
        return NULL;
    switch (drive->state) {
    case D_PARKED:
        if (cancel_parked(drive, message) < 0)
            return NULL;
        Py_RETURN_TRUE;
    case D_RUNNING:
        drive->must_cancel = true;
        replace(&drive->message, message);
        Py_RETURN_TRUE;
    case D_LEAVING:
        drive->cancelled = true;
        replace(&drive->message, message);
        Py_RETURN_TRUE;
    default: Py_RETURN_FALSE;
    }
}

static PyObject *result_method(PyObject *self, PyObject *unused)
{
    Drive *drive = (Drive *)self;
    if (drive->cancelled) {
        if (drive->message == Py_None || !drive->message)
            PyErr_SetNone(CancelledError);
        else
            PyErr_SetObject(CancelledError, drive->message);
        return NULL;
    }
    if (drive->state == D_PARKED || drive->state == D_RUNNING) {
        PyErr_SetString(InvalidStateError, "the handler is waiting");
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyObject *is_done(PyObject *self, PyObject *unused)
{
    uint8_t state = ((Drive *)self)->state;
    return PyBool_FromLong(state == D_LEAVING || state == D_OVER);
}

static PyObject *is_cancelled(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(((Drive *)self)->cancelled);
}

static PyObject *get_loop(PyObject *self, PyObject *unused)
{
    return hub_loop(((Drive *)self)->hub);
}

static PyObject *get_blocking(PyObject *self, void *closure)
{
    int8_t blocking = ((Drive *)self)->blocking;
    return Py_NewRef(blocking < 0 ? Py_None : blocking ? Py_True : Py_False);
}

static int set_blocking(PyObject *self, PyObject *value, void *closure)
{
    int truth = value ? PyObject_IsTrue(value) : 0;
    if (truth < 0)
        return -1;
    ((Drive *)self)->blocking = (int8_t)truth;
    return 0;
}

/* Trio's abort function: the task is to be cancelled while the handler is parked. */
static PyObject *abort_method(PyObject *self, PyObject *raise_cancel)
{
    Drive *drive = (Drive *)self;
    drive->state = D_LEAVING; /* Trio reschedules the task: the hub comes too late */
    return Py_NewRef(drive->hub->abort_succeeded);
}

/* ---- life -------------------------------------------------------------------------- */

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *hub, *inner;
    if (!PyArg_ParseTuple(args, "O!O", Hub_Type, &hub, &inner))
        return NULL;
    Drive *drive = (Drive *)PyType_GenericNew(type, NULL, NULL);
    if (!drive)
        return NULL;
    drive->blocking = -1;
    drive->hub = (Hub *)Py_NewRef(hub);
    drive->inner = Py_NewRef(inner);
    return (PyObject *)drive;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Drive *drive = (Drive *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)drive->hub);
    Py_VISIT(drive->inner);
    Py_VISIT(drive->task);
    Py_VISIT(drive->wake);
    Py_VISIT(drive->context);
    Py_VISIT(drive->outcome);
    Py_VISIT(drive->exception);
    Py_VISIT(drive->message);
    return 0;
}

static int clear(PyObject *self)
{
    Drive *drive = (Drive *)self;
    drive->state = D_OVER;
    Py_CLEAR(drive->inner);
    Py_CLEAR(drive->task);
    Py_CLEAR(drive->wake);
    Py_CLEAR(drive->context);
    Py_CLEAR(drive->outcome);
    Py_CLEAR(drive->exception);
    Py_CLEAR(drive->message);
    Py_CLEAR(drive->hub);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *itself(PyObject *self)
{
    return Py_NewRef(self);
}

static PyObject *repr(PyObject *self)
{
    static const char *const STATE[] = {"new", "running", "waiting", "woken", "waiting", "over"};
    Drive *drive = (Drive *)self;
    if (!drive->inner)
        return PyUnicode_FromString("<handler over>");
    return PyUnicode_FromFormat("<handler %R %s>", drive->inner, STATE[drive->state]);
}

static PyMethodDef methods[] = {
    {"send", send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void (*)(void))throw_method, METH_FASTCALL, NULL},
    {"close", close_method, METH_NOARGS, NULL},
    {"add_done_callback", (PyCFunction)(void (*)(void))add_done_callback,
     METH_FASTCALL | METH_KEYWORDS, NULL},
    {"remove_done_callback", remove_done_callback, METH_O, NULL},
    {"cancel", (PyCFunction)(void (*)(void))cancel, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", result_method, METH_NOARGS, NULL},
    {"exception", result_method, METH_NOARGS, NULL},
    {"done", is_done, METH_NOARGS, NULL},
    {"cancelled", is_cancelled, METH_NOARGS, NULL},
    {"get_loop", get_loop, METH_NOARGS, NULL},
    {"_step", step_method, METH_NOARGS, NULL},
    {"_abort", abort_method, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"cr_await", T_OBJECT, offsetof(Drive, inner), READONLY, NULL}, /* for debuggers */
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"_asyncio_future_blocking", get_blocking, set_blocking, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Awaits a handler, and lets the hub resume it directly."},
    {Py_tp_new, make},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_repr, repr},
    {Py_tp_iter, itself},
    {Py_tp_iternext, iternext},
    {Py_am_await, itself},
    {Py_am_send, send},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Drive_spec = {
    .name = "anypoll._native.Drive",
    .basicsize = sizeof(Drive),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
