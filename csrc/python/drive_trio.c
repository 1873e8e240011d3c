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

/* ---- Trio's tasks ------------------------------------------------------------ */

PyObject *trio_get(Hub *hub, PyObject *task, enum task_slot slot)
{
    PyObject *descriptor = PyTuple_GetItem(hub->task_slots, slot);
    descrgetfunc function = (descrgetfunc)PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get);
    return function(descriptor, task, NULL);
}

int trio_set(Hub *hub, PyObject *task, enum task_slot slot, PyObject *value)
{
    PyObject *descriptor = PyTuple_GetItem(hub->task_slots, slot);
    descrsetfunc function = (descrsetfunc)PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_set);
    return function(descriptor, task, value);
}

int trio_count_point(Hub *hub, PyObject *task, enum task_slot slot)
{
    PyObject *count = trio_get(hub, task, slot);
    PyObject *more = count ? PyLong_FromLongLong(PyLong_AsLongLong(count) + 1) : NULL;
    int rc = more ? trio_set(hub, task, slot, more) : -1;
    Py_XDECREF(count);
    Py_XDECREF(more);
    return rc;
}

static int deliver_cancellation(Drive *drive)
{
    PyObject *status = trio_get(drive->hub, drive->task, CANCEL_STATUS), *none = NULL;
    bool cancelled = status && native_is_true(status, n_effectively_cancelled);
    Py_XDECREF(status);
    if (!cancelled)
        return PyErr_Occurred() ? -1 : 0;
    none = PyObject_CallMethodObjArgs(drive->task, n__attempt_delivery_of_any_pending_cancel, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

/* Blocks the task with that abort function, as Trio's own loop does. */
static int block_trio_task(Drive *drive, PyObject *abort)
{
    Hub *hub = drive->hub;
    PyObject *task = drive->task;
    if (trio_set(hub, task, ABORT_FUNC, abort) < 0 ||
        trio_count_point(hub, task, CANCEL_POINTS) < 0 ||
        trio_count_point(hub, task, SCHEDULE_POINTS) < 0)
        return -1;
    return deliver_cancellation(drive);
}

/* ---- after a step ----------------------------------------------------------- */

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
        return trio_count_point(drive->hub, drive->task, SCHEDULE_POINTS);
    if (drive->state == D_PARKED) {
        if (!drive->abort)
            drive->abort = PyObject_GetAttr((PyObject *)drive, n__abort);
        return drive->abort ? block_trio_task(drive, drive->abort) : -1;
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

static int after_step(Drive *drive, bool went_well)
{
    if (went_well)
        return left_to_trio(drive);
    bool has_run = drive->state != D_PARKED || drive->has_run;
    if (has_run || !PyErr_ExceptionMatches(PyExc_Exception))
        return interrupted(drive);
    PyErr_Clear(); /* the context could not be entered */
    return drive_resume_soon(drive);
}

/* ---- a step ------------------------------------------------------------------ */

/* A task that is not protected from KeyboardInterrupt runs in a frame that says so: Trio looks for
 * one from the innermost on, and that of the task is not among them. */
static bool step(Drive *drive)
{
    PyObject *context = trio_get(drive->hub, drive->task, CONTEXT);
    if (!context)
        return false;
    bool went_well =
        drive_step_in(drive, context, drive->is_protected ? NULL : drive->hub->unprotected);
    Py_DECREF(context);
    return went_well;
}

int drive_resume_on_trio(Drive *drive)
{
    PyObject *current = drive->hub->tasks, *task = Py_NewRef(drive->task);
    PyObject *before = Py_XNewRef(PyDict_GetItemWithError(current, n_task)); /* the hub's own */
    int rc = -1;
    if (before && trio_set(drive->hub, task, ABORT_FUNC, Py_None) == 0 &&
        PyDict_SetItem(current, n_task, task) == 0) {
        bool went_well = step(drive);
        PyObject *exception = went_well ? NULL : native_take_exception();
        rc = PyDict_SetItem(current, n_task, before);
        if (exception)
            PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
        Py_XDECREF(exception);
        if (after_step(drive, went_well) < 0)
            rc = -1;
    }
    Py_XDECREF(before);
    Py_DECREF(task);
    return rc;
}

/* Whether somebody may watch every step of tasks, or it is not known. Trio keeps its instruments in
 * a dict by hook, with one more entry for all of them. */
bool drive_is_watched(Drive *drive)
{
    Py_ssize_t hooks = PyObject_Size(drive->hub->instruments);
    if (hooks < 0)
        PyErr_Clear();
    return hooks != 1;
}

/* Trio's abort function: the task is to be cancelled while the handler is parked. */
PyObject *drive_abort(PyObject *self, PyObject *raise_cancel)
{
    Drive *drive = (Drive *)self;
    if (drive->state == D_RESTING) /* its task has seen it rest; it will go on by itself */
        return Py_NewRef(drive->hub->abort_failed);
    drive->state = D_LEAVING; /* Trio reschedules the task: the hub comes too late */
    return Py_NewRef(drive->hub->abort_succeeded);
}
