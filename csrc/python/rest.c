/* Handlers that let the event loop have a round: a checkpoint under a drive.
 *
 * send() after its write and receive() that found its bytes yield once. A task would do that by
 * itself, a handle and a step of the task each time. Under a drive they yield the operation; the
 * drive is listed here, and one callback resumes all that rest: on asyncio a handle that is asked
 * for (call_soon) when the callback of the hub in which they ran ends; on Trio a system task
 * (TrioHub._rest), which is rescheduled then. So whatever they have made ready runs before they go
 * on, as with checkpoints of their own. A handler that was stepped by its task asks for the round
 * itself, and goes on without its task; on Trio, which mixes the order of a round, it joins one
 * that has been asked for.
 *
 * Each callback is a round. A handler is listed for the round that is asked for next, so one that
 * rests again within a round is not resumed twice in it. What exceeds a turn goes on in the next.
 * While a round is asked for, the next one is not: it is when that has begun. Otherwise the
 * handlers would spread over ever more rounds, each with a callback of its own.
 *
 * A round in which the loop would run nothing else need not be asked for: if its queue can be seen,
 * and is empty (on Trio also the batch that is under way), the next one begins within the same
 * callback, unless the loop is to stop. That happens a few times only, or what the loop has yet to
 * find out, by its timers and descriptors, would wait for long.
 *
 * A cancellation finds the handler when its round comes, as it finds a task at a checkpoint. On
 * Trio resting is shielded; receive() looks for a cancelled scope afterwards.
 */
#include "native.h"

#define TURN 256 /* handlers resumed before the loop gets its turn */
#define ROUNDS 8 /* of a loop that has nothing else to run */

/* ---- the list ---------------------------------------------------------------- */

void hub_rest(Drive *drive)
{
    Hub *hub = drive->hub;
    bool joins = hub->trio && hub->depth == 0 && hub->rounds_begun != hub->rounds_asked;
    Py_INCREF((PyObject *)drive);
    drive->state = D_RESTING;
    drive->round = hub->rounds_asked + !joins;
    drive->next = NULL;
    drive->prev = hub->last_resting;
    if (drive->prev)
        drive->prev->next = drive;
    else
        hub->resting = drive;
    hub->last_resting = drive;
    hub->round_due |= !joins;
}

void hub_end_rest(Drive *drive)
{
    Hub *hub = drive->hub;
    if (drive->prev)
        drive->prev->next = drive->next;
    else
        hub->resting = drive->next;
    if (drive->next)
        drive->next->prev = drive->prev;
    else
        hub->last_resting = drive->prev;
    drive->prev = drive->next = NULL;
    drive->state = D_PARKED; /* it waits for nothing but its step */
    Py_DECREF((PyObject *)drive);
}

void hub_stop_resting(Hub *hub)
{
    hub->can_rest = false;
    while (hub->resting)
        if (drive_resume_soon(hub->resting) < 0)
            PyErr_Clear(); /* the loop is closed */
    workers_leave_to_tasks(hub);
}

/* ---- rounds --------------------------------------------------------------------- */

static int wake_rester(Hub *hub)
{
    PyObject *task = hub->rester;
    if (!task || task == Py_None)
        return 0; /* it runs, or will: it goes on until all rounds are done */
    hub->rester = NULL;
    PyObject *none = PyObject_CallFunctionObjArgs(hub->reschedule, task, NULL);
    Py_DECREF(task);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

static int call_soon(Hub *hub)
{
    PyObject *method = PyObject_GetAttr((PyObject *)hub, n__resume_rested);
    int rc = method ? hub_call_soon(hub, method, Py_None, NULL) : -1;
    Py_XDECREF(method);
    return rc;
}

static int ask(Hub *hub)
{
    if ((hub->trio ? wake_rester(hub) : call_soon(hub)) < 0)
        return -1; /* it is still due */
    hub->round_due = false;
    hub->rounds_asked++;
    return 0;
}

/* A signal handler may raise an exception in the loop's function. It leaves this function, but
 * nobody else would ask for those that rest. One callback too many finds nothing to do. */
int hub_ask_for_round(Hub *hub)
{
    bool will_ask = hub->rounds_begun != hub->rounds_asked; /* the one that is to come */
    if (!hub->round_due || will_ask || ask(hub) == 0)
        return 0;
    PyObject *exception = native_take_exception();
    if (ask(hub) < 0)
        PyErr_Clear(); /* the loop is closed */
    native_raise_again(exception);
    return -1;
}

static bool is_due(const Hub *hub)
{
    return hub->resting && (int32_t)(hub->rounds_begun - hub->resting->round) >= 0;
}

/* Whether the round that is due may begin at once. */
static bool has_loop_to_itself(const Hub *hub)
{
    return hub->round_due && hub->rounds_begun == hub->rounds_asked && hub_is_alone(hub);
}

struct round {
    walk walk;
    int resumed, most;
};

static Drive *next_due(walk *walk)
{
    struct round *round = (struct round *)walk;
    if (round->resumed == round->most || !is_due(walk->hub))
        return NULL;
    Drive *drive = (Drive *)Py_NewRef((PyObject *)walk->hub->resting);
    hub_end_rest(drive);
    round->resumed++;
    return drive;
}

/* Returns how many handlers it has resumed, and calls of request mode made. */
static int begin_round(Hub *hub, int most, PyObject **left)
{
    struct round round = {.walk = {.hub = hub, .next = next_due, .left = left}, .most = most};
    uint32_t before = hub->jobs;
    hub->rounds_begun++;
    hub->depth++;
    drive_walk(&round.walk);
    workers_run_due(hub, left);
    hub->depth--;
    hub->round_due |= is_due(hub) || hub->due;
    return round.resumed + (int)(hub->jobs - before);
}

void hub_go_round(Hub *hub, int turn, PyObject **left)
{
    for (int rounds = 1; rounds < ROUNDS && turn > 0 && has_loop_to_itself(hub); rounds++) {
        hub->round_due = false;
        hub->rounds_asked++;
        turn -= begin_round(hub, turn, left);
    }
    if (hub_ask_for_round(hub) < 0)
        hub_keep_exception(left);
}

PyObject *hub_resume_rested(PyObject *self, PyObject *unused)
{
    Hub *hub = (Hub *)self;
    PyObject *left = NULL;
    if (hub->rounds_begun == hub->rounds_asked)
        Py_RETURN_FALSE;
    int n = begin_round(hub, TURN, &left);
    hub_go_round(hub, TURN - n, &left);
    if (hub_raise_first(hub, left) < 0)
        return NULL;
    return PyBool_FromLong(hub->rounds_begun != hub->rounds_asked);
}
