/* A drive whose task is Trio's.
 *
 * Trio lends no names for this. What is used of its inside is looked up once
 * (_loop/trio_hub.py), and without it handlers are resumed by their tasks. A foreign trap
 * cannot wait for the task's next turn, because its waker may come before; so the task is blocked
 * in it at once, as Trio's own loop would do it. While the handler runs in the name of its task
 * its abort function fails, or a handler that cancels itself would have the running task
 * rescheduled; the pending cancellation is looked for when it has parked again.
 *
 * KeyboardInterrupt. Trio's signal handler raises it at once if the innermost frame that is marked
 * allows it, and otherwise keeps it for the main task. The hub's own task is marked as protected,
 * so handlers run in a frame that is marked as not: one for all that go on one after another. No
 * other interpreted function is called in it; for what needs one, the frame is left.
 */
#include "native.h"

/* ---- Trio's tasks ------------------------------------------------------------ */

int trio_count_point(Hub *hub, PyObject *task, int slot)
{
    PyObject *count = slot_get(hub, task, slot);
    PyObject *more = count ? PyLong_FromLongLong(PyLong_AsLongLong(count) + 1) : NULL;
    int rc = more ? slot_set(hub, task, slot, more) : -1;
    Py_XDECREF(count);
    Py_XDECREF(more);
    return rc;
}

static bool is_cancelled(Drive *drive)
{
    PyObject *status = slot_get(drive->hub, drive->task, CANCEL_STATUS);
    bool cancelled = status && slot_is_true(drive->hub, status, EFFECTIVELY_CANCELLED);
    Py_XDECREF(status);
    return cancelled;
}

static int deliver_cancellation(Drive *drive)
{
    if (!is_cancelled(drive))
        return PyErr_Occurred() ? -1 : 0;
    PyObject *none =
        PyObject_CallMethodObjArgs(drive->task, n__attempt_delivery_of_any_pending_cancel, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

/* Blocks the task with that abort function, as Trio's own loop does, which then looks whether the
 * task is cancelled. */
static int block_trio_task(Drive *drive, PyObject *abort)
{
    Hub *hub = drive->hub;
    PyObject *task = drive->task;
    return slot_set(hub, task, ABORT_FUNC, abort) < 0 ||
                   trio_count_point(hub, task, CANCEL_POINTS) < 0 ||
                   trio_count_point(hub, task, SCHEDULE_POINTS) < 0
               ? -1
               : 0;
}

/* Borrowed. */
static PyObject *abort_function(Drive *drive)
{
    if (!drive->abort)
        drive->abort = PyObject_GetAttr((PyObject *)drive, n__abort);
    return drive->abort;
}

PyObject *drive_trap(Drive *drive)
{
    PyObject *abort = abort_function(drive), *type = drive->hub->wait_trap;
    if (!abort)
        return NULL;
    return type && type != Py_None
               ? PyObject_CallFunctionObjArgs(type, abort, NULL)
               : PyObject_CallMethodObjArgs((PyObject *)drive->hub, n__drive_trap, abort, NULL);
}

/* As Trio does for its shielded checkpoint, or until the hub resumes it. */
static int wait_again(Drive *drive)
{
    if (drive->state == D_RESTING)
        return trio_count_point(drive->hub, drive->task, SCHEDULE_POINTS);
    PyObject *abort = abort_function(drive);
    return abort ? block_trio_task(drive, abort) : -1;
}

/* ---- after a step ----------------------------------------------------------- */

int drive_reschedule(Drive *drive)
{
    PyObject *none =
        PyObject_CallFunctionObjArgs(drive->hub->reschedule, drive->task, drive->hub->value, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

/* A task that runs, or in whose name the handler runs, is not blocked yet: it would be scheduled
 * twice if it was cancelled then. Whoever is about to block it finds that the drive is LEAVING. */
int drive_reschedule_blocked(Drive *drive)
{
    return hub_is_current_task(drive->hub, drive->task) ? 0 : drive_reschedule(drive);
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
        return rc < 0 ? -1 : deliver_cancellation(drive);
    }
    drive->state = D_LEAVING;
    replace(&drive->outcome, trap);
    return drive_reschedule(drive);
}

static int left_to_trio(Drive *drive)
{
    if (drive->state == D_RESTING)
        return wait_again(drive);
    if (drive->state == D_PARKED || drive->state == D_IDLE)
        return wait_again(drive) < 0 ? -1 : deliver_cancellation(drive);
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
        drive_unlist(drive);
        drive->state = D_LEAVING;
        replace(&drive->interrupt, exception);
    }
    Py_XDECREF(exception);
    return drive_reschedule(drive);
}

/* The same when the handler waits for somebody else, who knows its task and would wake it whatever
 * it does by then. It goes on waiting; the exception ends the run, as when it comes in Trio's own
 * loop. */
static int interrupted_in_trap(Drive *drive)
{
    PyObject *exception = native_take_exception();
    if (left_to_trio(drive) < 0)
        PyErr_WriteUnraisable((PyObject *)drive);
    native_raise_again(exception);
    return -1;
}

static int after_step(Drive *drive, bool went_well)
{
    if (!drive->has_run && drive->state != D_PARKED) /* its task goes on instead */
        return went_well ? 0 : -1;
    if (went_well)
        return left_to_trio(drive);
    if (drive->outcome && !drive->ended)
        return interrupted_in_trap(drive);
    if (drive->has_run || !PyErr_ExceptionMatches(PyExc_Exception))
        return interrupted(drive);
    PyErr_Clear(); /* the context could not be entered */
    return drive_resume_soon(drive);
}

/* Whether somebody may watch every step of tasks. Trio keeps its instruments in a dict by hook,
 * with one more entry for all of them. */
static bool is_watched(const Hub *hub)
{
    return PyDict_Size(hub->instruments) != 1;
}

/* ---- one step after another --------------------------------------------------- */

static Drive *next_of(walk *walk)
{
    Drive *drive;
    while ((drive = walk->next(walk))) {
        bool by_task = drive->by_task || is_watched(walk->hub);
        if (drive->state == D_PARKED && !by_task)
            break;
        if (by_task && drive_resume_soon(drive) < 0)
            hub_keep_exception(walk->left);
        Py_DECREF((PyObject *)drive);
    }
    return drive;
}

static bool step(Drive *drive)
{
    Hub *hub = drive->hub;
    PyObject *context = slot_get(hub, drive->task, CONTEXT);
    bool went_well = context && PyDict_SetItem(hub->tasks, n_task, drive->task) == 0 &&
                     drive_step_in(drive, context);
    Py_XDECREF(context);
    return went_well;
}

/* Whether the task only waits again: for that no interpreted frame is needed, in which a signal
 * handler might raise. */
static bool just_waits(Drive *drive)
{
    bool parked = drive->state == D_PARKED || drive->state == D_IDLE;
    bool waits = drive->state == D_RESTING || (parked && !is_cancelled(drive));
    if (waits && wait_again(drive) == 0)
        return true;
    PyErr_Clear(); /* it is tried again */
    return false;
}

/* What follows the last step is for walk_on(). The first may have been resumed by its task since it
 * was chosen: by what followed the step before, or by a signal handler. */
PyObject *drive_step_on(PyObject *self, PyObject *unused)
{
    walk *walk = ((Hub *)self)->walk;
    while (walk) {
        Drive *drive = walk->drive;
        if (drive->state == D_PARKED && !step(drive))
            return NULL;
        Drive *following = walk->following = next_of(walk);
        if (!following || following->is_protected != drive->is_protected || !just_waits(drive))
            Py_RETURN_NONE;
        walk->drive = following;
        walk->following = NULL;
        following->has_run = false;
        Py_DECREF((PyObject *)drive);
    }
    Py_RETURN_NONE;
}

/* The first one, and those that can follow in the same frame. */
static int walk_on(walk *walk, PyObject *hubs_task)
{
    Hub *hub = walk->hub;
    walk->drive->has_run = false;
    PyObject *none = walk->drive->is_protected
                         ? drive_step_on((PyObject *)hub, NULL)
                         : PyObject_CallFunctionObjArgs(hub->unprotected, hub->stepper, NULL);
    PyObject *exception = none ? NULL : native_take_exception();
    int rc = PyDict_SetItem(hub->tasks, n_task, hubs_task);
    if (exception)
        native_raise_again(exception);
    bool went_well = !exception;
    Py_XDECREF(none);
    return after_step(walk->drive, went_well) < 0 ? -1 : rc;
}

/* A task that is not protected from KeyboardInterrupt runs in a frame that says so: Trio looks for
 * one from the innermost on, and that of the task is not among them. One frame serves for as many
 * as possible. */
void drive_walk_on_trio(walk *walk)
{
    Hub *hub = walk->hub;
    Drive *drive = next_of(walk);
    PyObject *hubs_task = drive ? hub_current_task(hub) : NULL;
    struct walk *outer = hub->walk;
    hub->walk = walk;
    while (drive) {
        walk->drive = drive;
        walk->following = NULL;
        if (walk_on(walk, hubs_task) < 0)
            hub_keep_exception(walk->left);
        Py_DECREF((PyObject *)walk->drive);
        drive = walk->following ? walk->following : next_of(walk);
    }
    hub->walk = outer;
    Py_XDECREF(hubs_task);
}

/* The step is over, and what follows it is not: the task is not blocked yet. */
static bool has_just_run(Drive *drive)
{
    walk *walk = drive->hub->walk;
    return walk && walk->drive == drive && hub_is_current_task(drive->hub, drive->task);
}

/* Trio's abort function: the task is to be cancelled while the handler is parked. */
PyObject *drive_abort(PyObject *self, PyObject *raise_cancel)
{
    Drive *drive = (Drive *)self;
    if (!drive->hub || !drive->hub->trio || hub_check_attached(drive->hub) < 0) {
        PyErr_SetString(PyExc_RuntimeError, "this is no drive of Trio's");
        return NULL;
    }
    /* RUNNING: it is looked for when the handler has parked. RESTING: its task has seen it rest; it
     * will go on by itself. */
    if (drive->state == D_RUNNING || drive->state == D_RESTING || has_just_run(drive))
        return Py_NewRef(drive->hub->abort_failed);
    drive_leave(drive); /* Trio reschedules the task: the hub comes too late */
    return Py_NewRef(drive->hub->abort_succeeded);
}
