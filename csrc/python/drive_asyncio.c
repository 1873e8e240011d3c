/* A drive whose task is asyncio's: cancellation, and handing over to the task.
 *
 * asyncio's Task.cancel() asks what the task waits for to cancel itself. PARKED, the drive has the
 * task woken with the cancellation, which throws it into the handler. While the handler runs in the
 * name of the task, the drive is what the task seems to wait for; the cancellation is kept, and
 * made the task's own (cancel and uncancel: the request has been counted) before anything else is
 * handed to it.
 */
#include "native.h"

static int cancel_parked(Drive *drive, PyObject *message)
{
    drive_leave(drive);
    drive->cancelled = true;
    replace(&drive->message, message);
    return future_wake_soon((Future *)drive, drive->hub);
}

/* Whether the handler is still to be cancelled, which is asked once: from 3.13 on asyncio's tasks
 * forget a cancellation that has been taken back (uncancel) before it was delivered. */
static bool take_must_cancel(Drive *drive)
{
    bool must = drive->must_cancel;
    drive->must_cancel = false;
    if (!must || Py_Version < 0x030d0000)
        return must;
    PyObject *count = PyObject_CallMethodObjArgs(drive->task, n_cancelling, NULL);
    must = !count || PyObject_IsTrue(count) != 0;
    Py_XDECREF(count);
    PyErr_Clear();
    return must;
}

/* Makes the cancellation that came while the handler ran the task's own. */
int drive_pass_on_cancellation(Drive *drive)
{
    if (!take_must_cancel(drive))
        return 0;
    PyObject *message = drive->message ? drive->message : Py_None;
    PyObject *done = PyObject_CallMethodObjArgs(drive->task, n_cancel, message, NULL);
    PyObject *left = done ? PyObject_CallMethodObjArgs(drive->task, n_uncancel, NULL) : NULL;
    Py_XDECREF(done);
    Py_XDECREF(left);
    return left ? 0 : -1;
}

/* The cancellation comes between the handler's step and the task's. What the handler has yielded is
 * what is cancelled, and if it has ended, whatever the task does next. */
bool drive_postpones_cancellation(Drive *drive, PyObject *exception)
{
    bool has_news = drive->outcome || drive->exception || drive->ended;
    if (drive->state != D_LEAVING || drive->hub->trio || !has_news ||
        !PyErr_GivenExceptionMatches(exception, CancelledError))
        return false;
    drive->must_cancel = true;
    drive->cancelled = false;
    return true;
}

static int after_step(Drive *drive)
{
    if (drive->state == D_LEAVING)
        return future_wake((Future *)drive, drive->hub);
    bool waits = drive->state == D_PARKED || drive->state == D_IDLE;
    if (!waits || !take_must_cancel(drive))
        return 0;
    PyObject *message = Py_NewRef(drive->message ? drive->message : Py_None);
    int rc = cancel_parked(drive, message);
    Py_DECREF(message);
    return rc;
}

/* ---- the current task ----------------------------------------------------------- */

/* From one handler to the next the entry in asyncio's dict is only replaced. If it is kept
 * elsewhere (CPython 3.14), a task is entered and left each time. */
static bool has_dict(const Hub *hub)
{
    return hub->tasks && PyDict_CheckExact(hub->tasks);
}

static int call(PyObject *function, Hub *hub, PyObject *task)
{
    PyObject *loop = hub_loop(hub);
    PyObject *none = PyObject_CallFunctionObjArgs(function, loop, task, NULL);
    Py_DECREF(loop);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

static int enter(Hub *hub, PyObject *task)
{
    if (!has_dict(hub) || !hub->entered) {
        if (call(enter_task, hub, task) < 0)
            return -1;
    } else {
        PyObject *loop = hub_loop(hub);
        int rc = PyDict_SetItem(hub->tasks, loop, task);
        Py_DECREF(loop);
        if (rc < 0)
            return -1;
    }
    replace(&hub->entered, task);
    return 0;
}

int hub_leave_task(Hub *hub)
{
    PyObject *task = hub->entered;
    hub->entered = NULL;
    int rc = task ? call(leave_task, hub, task) : 0;
    Py_XDECREF(task);
    return rc;
}

/* The handler was the current task's at its end, too; otherwise -1 with an exception. */
static int check_current(Hub *hub, PyObject *task)
{
    if (!has_dict(hub))
        return hub_leave_task(hub);
    PyObject *loop = hub_loop(hub), *current = PyDict_GetItemWithError(hub->tasks, loop);
    Py_DECREF(loop);
    return current == task ? 0 : hub_leave_task(hub);
}

/* ---- a step ------------------------------------------------------------------------ */

int drive_resume_on_asyncio(Drive *drive)
{
    Hub *hub = drive->hub;
    if (drive->by_task || !drive->wake || !drive->context)
        return drive_resume_soon(drive);
    if (drive->must_cancel && take_must_cancel(drive)) { /* it came while the handler rested */
        drive->state = D_LEAVING;
        drive->cancelled = true;
        return future_wake((Future *)drive, hub);
    }
    PyObject *task = Py_NewRef(drive->task);
    bool has_run = enter(hub, task) == 0 && drive_step_in(drive, drive->context);
    if (!has_run) /* another task is running, or the context is entered: its task will run it */
        PyErr_Clear();
    if (hub->entered)
        check_current(hub, task);
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback); /* the handler was not the current task at its end */
    int rc = has_run ? after_step(drive) : drive_resume_soon(drive);
    if (rc == 0 && type) {
        PyErr_Restore(type, value, traceback);
        rc = -1;
    } else {
        Py_XDECREF(type);
        Py_XDECREF(value);
        Py_XDECREF(traceback);
    }
    Py_DECREF(task);
    return rc;
}

/* ---- the protocol of a future ------------------------------------------------------ */

PyObject *drive_add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                  PyObject *names)
{
    Drive *drive = (Drive *)self;
    bool over = drive->state != D_PARKED && drive->state != D_RESTING && drive->state != D_IDLE;
    return future_listen((Future *)drive, drive->hub, over, args, n, names);
}

PyObject *drive_cancel(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Drive *drive = (Drive *)self;
    PyObject *message = future_message(args, kwargs);
    if (!message)
        return NULL;
    switch (drive->state) {
    case D_PARKED:
    case D_IDLE:
        if (cancel_parked(drive, message) < 0)
            return NULL;
        Py_RETURN_TRUE;
    case D_RUNNING:
    case D_RESTING:
        drive->must_cancel = true;
        replace(&drive->message, message);
        Py_RETURN_TRUE;
    case D_LEAVING:
        drive->cancelled = true;
        replace(&drive->message, message);
        if (future_wake_soon((Future *)drive, drive->hub) < 0) /* if that has failed before */
            return NULL;
        Py_RETURN_TRUE;
    default: Py_RETURN_FALSE;
    }
}

PyObject *drive_result(PyObject *self, PyObject *unused)
{
    Drive *drive = (Drive *)self;
    bool over = drive->state == D_LEAVING || drive->state == D_PASSING || drive->state == D_OVER;
    return future_result((Future *)drive, over);
}

PyObject *drive_is_done(PyObject *self, PyObject *unused)
{
    uint8_t state = ((Drive *)self)->state;
    return PyBool_FromLong(state == D_LEAVING || state == D_OVER);
}
