/* A drive whose task is Trio's.
 *
 * Trio lends no names for this. What is used of its inside is looked up once
 * (_loop/trio_hub.py), and without it handlers are resumed by their tasks. A foreign trap
 * cannot wait for the task's next turn, because its waker may come before; so the task is blocked
 * in it at once, as Trio's own loop would do it. While the handler runs in the name of its task
 * there is no abort function, or a handler that cancels itself would have the running task
 * rescheduled; the pending cancellation is looked for when it has parked again.
 *
 * KeyboardInterrupt. Trio's signal handler raises it at once if the innermost frame that is marked
 * allows it, and otherwise keeps it for the main task. The hub's own task is marked as protected,
 * so the handler runs in a frame that is marked as not.
 */
#include "native.h"

int trio_count_point(PyObject *task, PyObject *name)
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
        trio_count_point(task, n__cancel_points) < 0 ||
        trio_count_point(task, n__schedule_points) < 0)
        return -1;
    PyObject *none =
        PyObject_CallMethodObjArgs(task, n__attempt_delivery_of_any_pending_cancel, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

int drive_reschedule(Drive *drive)
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
    return drive_reschedule(drive);
}

static int left_to_trio(Drive *drive)
{
    if (drive->state == D_RESTING) /* as Trio does for its shielded checkpoint */
        return trio_count_point(drive->task, n__schedule_points);
    if (drive->state == D_PARKED) {
        PyObject *abort = PyObject_GetAttr((PyObject *)drive, n__abort);
        int rc = abort ? block_trio_task(drive, abort) : -1;
        Py_XDECREF(abort);
        return rc;
    }
    if (drive->state != D_LEAVING)
        return 0;
    if (!drive->outcome || drive->ended)
        return drive_reschedule(drive);
    PyObject *trap = drive->outcome;
    drive->outcome = NULL;
    int rc = block_in_foreign_trap(drive, trap);
    Py_DECREF(trap);
    return rc;
}

/* A signal handler has raised an exception (KeyboardInterrupt) just before the handler ran, or just
 * after. It is the handler's: thrown in where it waits, or instead of its result. */
static int interrupted(Drive *drive)
{
    PyObject *exception = native_take_exception();
    if (drive->state == D_LEAVING && (drive->ended || drive->exception)) {
        drive->ended = false;
        Py_CLEAR(drive->outcome);
        replace(&drive->exception, exception);
    } else {
        drive_stop_resting(drive);
        drive->state = D_LEAVING;
        Py_CLEAR(drive->outcome);
        replace(&drive->interrupt, exception);
    }
    Py_XDECREF(exception);
    return drive_reschedule(drive);
}

/* A task that is not protected from KeyboardInterrupt runs in a frame that says so: Trio looks for
 * one from the innermost on, and that of the task is not among them. */
static PyObject *step_in_context(Drive *drive, PyObject *context)
{
    PyObject *step = PyObject_GetAttr((PyObject *)drive, n__step), *none = NULL;
    if (step && drive->is_protected)
        none = PyObject_CallMethodObjArgs(context, n_run, step, NULL);
    else if (step)
        none = PyObject_CallMethodObjArgs(context, n_run, drive->hub->unprotected, step, NULL);
    Py_XDECREF(step);
    return none;
}

static int after_step(Drive *drive, PyObject *none)
{
    if (none)
        return left_to_trio(drive);
    bool has_run = drive->state != D_PARKED || drive->has_run;
    if (has_run || !PyErr_ExceptionMatches(PyExc_Exception))
        return interrupted(drive);
    PyErr_Clear(); /* the context could not be entered */
    return drive_resume_soon(drive);
}

int drive_resume_on_trio(Drive *drive)
{
    PyObject *cell = drive->hub->run_context, *task = Py_NewRef(drive->task), *none = NULL;
    PyObject *before = PyObject_GetAttr(cell, n_task); /* the hub's own */
    PyObject *context = before ? PyObject_GetAttr(task, n_context) : NULL;
    int rc = -1;
    if (context && PyObject_SetAttr(task, n__abort_func, Py_None) == 0 &&
        PyObject_SetAttr(cell, n_task, task) == 0) {
        drive->has_run = false;
        none = step_in_context(drive, context);
        PyObject *exception = none ? NULL : native_take_exception();
        rc = PyObject_SetAttr(cell, n_task, before);
        if (exception)
            PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_XDECREF(exception);
        if (after_step(drive, none) < 0)
            rc = -1;
    }
    Py_XDECREF(none);
    Py_XDECREF(context);
    Py_XDECREF(before);
    Py_DECREF(task);
    return rc;
}

/* Whether somebody may watch every step of tasks, or it is not known. Trio keeps its instruments in
 * a dict by hook, with one more entry for all of them. */
bool drive_is_watched(Drive *drive)
{
    PyObject *runner = PyObject_GetAttr(drive->task, n__runner);
    PyObject *instruments = runner ? PyObject_GetAttr(runner, n_instruments) : NULL;
    Py_ssize_t hooks = instruments ? PyObject_Size(instruments) : -1;
    Py_XDECREF(runner);
    Py_XDECREF(instruments);
    if (hooks < 0)
        PyErr_Clear();
    return hooks != 1;
}

/* Trio's abort function: the task is to be cancelled while the handler is parked. */
PyObject *drive_abort(PyObject *self, PyObject *raise_cancel)
{
    Drive *drive = (Drive *)self;
    drive->state = D_LEAVING; /* Trio reschedules the task: the hub comes too late */
    return Py_NewRef(drive->hub->abort_succeeded);
}
