/* Workers: drives that are bound to no connection, and make the calls of request mode.
 *
 * A worker is a task that awaits a drive, as a handler's task does. But the coroutine within
 * follows another: the steps of connections in request mode (requests.c), taken from one queue, for
 * as long as they do not suspend. A call that waits for an operation of ours parks the drive, and
 * one that waits for anything else is handed to the task; so a slow call has a task of its own, as
 * a handler has, and delays nobody: another worker takes the rest of the queue. A worker that finds
 * the queue empty is IDLE. It costs the loop nothing, and the hub gives it the next job in the name
 * of its task. A burst of short calls costs no switch of tasks at all.
 *
 * The queue is never left with jobs in it and nobody to look at it. If it is not empty, then
 *   - a worker is in the middle of its queue, in this very call of it; or
 *   - the pool is due: the hub looks at the queue at the end of the callback in which it runs,
 *     or has asked for a round (rest.c); or
 *   - a worker's task will look (looking): it is being started, or was woken because the hub does
 *     not resume its drive directly, or was cancelled while it was idle, and will end.
 * workers_rouse() sees to that whenever a job has come, and whenever a worker stops.
 *
 * worker.c has what a worker does with a job.
 */
#include "native.h"

#define PARKED 16 /* idle workers to keep */

PyTypeObject *Workers_Type;

/* ---- the queue ------------------------------------------------------------------- */

void workers_push(Workers *pool, Requests *job)
{
    Py_INCREF((PyObject *)job);
    job->queued = true;
    job->next = NULL;
    if (pool->last)
        pool->last->next = job;
    else
        pool->ready = job;
    pool->last = job;
}

/* The caller inherits the queue's reference. */
Requests *workers_pop(Workers *pool)
{
    Requests *job = pool->ready;
    if (!job)
        return NULL;
    pool->ready = job->next;
    if (!pool->ready)
        pool->last = NULL;
    job->next = NULL;
    job->queued = false;
    return job;
}

int requests_submit(Requests *requests)
{
    if (requests->queued)
        return 0;
    workers_push(requests->pool, requests);
    return workers_rouse(requests->pool);
}

/* ---- idle workers ------------------------------------------------------------------- */

static void list_as_due(Workers *pool)
{
    Hub *hub = pool->hub;
    pool->is_due = true;
    pool->next_due = hub->due;
    hub->due = (Workers *)Py_NewRef((PyObject *)pool);
}

bool worker_rest(Drive *worker)
{
    Workers *pool = worker->pool;
    if (pool->parked >= PARKED)
        return false;
    worker->state = D_IDLE;
    worker->prev = NULL;
    worker->next = pool->idle;
    if (worker->next)
        worker->next->prev = worker;
    pool->idle = (Drive *)Py_NewRef((PyObject *)worker);
    pool->parked++;
    if (pool->ready && pool->looking == 0 && !pool->is_due) { /* its turn is over */
        list_as_due(pool);
        pool->hub->round_due = true; /* whoever has stepped the drive asks for it */
    }
    return true;
}

/* The caller holds it too. */
void worker_unlist(Drive *worker)
{
    Workers *pool = worker->pool;
    if (worker->prev)
        worker->prev->next = worker->next;
    else
        pool->idle = worker->next;
    if (worker->next)
        worker->next->prev = worker->prev;
    worker->prev = worker->next = NULL;
    worker->state = D_PARKED; /* it waits for nothing but its step */
    pool->parked--;
    Py_DECREF((PyObject *)worker);
}

void workers_look_later(Drive *worker)
{
    if (!worker->looking)
        worker->pool->looking++;
    worker->looking = true;
}

void workers_stop_looking(Drive *worker)
{
    if (worker->looking)
        worker->pool->looking--;
    worker->looking = false;
}

/* ---- who looks at the queue ------------------------------------------------------------ */

static void abandon_all(Workers *pool)
{
    for (Requests *job; (job = workers_pop(pool));) {
        PyObject *none = PyObject_CallMethodObjArgs((PyObject *)job, n_abandon, NULL);
        if (!none)
            PyErr_WriteUnraisable((PyObject *)job);
        Py_XDECREF(none);
        Py_DECREF((PyObject *)job);
    }
}

/* Whether it can: 1, 0, or -1 with an exception, which may have come when the task was there. */
static int try_to_start(Workers *pool)
{
    PyObject *work = PyObject_GetAttr((PyObject *)pool, n__work);
    pool->looking++;
    pool->starting++;
    PyObject *can = work ? PyObject_CallFunctionObjArgs(pool->start, work, NULL) : NULL;
    int truth = can ? PyObject_IsTrue(can) : -1;
    Py_XDECREF(work);
    Py_XDECREF(can);
    if (truth <= 0 && pool->starting > 0) {
        pool->starting--;
        pool->looking--;
    }
    return truth;
}

/* A signal handler may raise an exception in start(). It leaves this function, but nobody else
 * would look at the queue: so it is tried once more. */
static int start_worker(Workers *pool)
{
    int can = try_to_start(pool);
    PyObject *exception = can < 0 ? native_take_exception() : NULL;
    if (can < 0 && (can = try_to_start(pool)) < 0)
        PyErr_Clear();
    if (can <= 0)
        abandon_all(pool);
    if (!exception)
        return 0;
    native_raise_again(exception);
    return -1;
}

static Drive *take_idle(Workers *pool)
{
    Drive *worker = (Drive *)Py_XNewRef((PyObject *)pool->idle);
    if (worker)
        worker_unlist(worker);
    return worker;
}

/* Has a task look: that of an idle worker, or a new one. */
static int wake_task(Workers *pool)
{
    Drive *worker = take_idle(pool);
    if (!worker)
        return start_worker(pool);
    int rc = drive_resume_soon(worker);
    Py_DECREF((PyObject *)worker);
    return rc;
}

static bool has_need(const Workers *pool)
{
    return pool->ready && pool->looking == 0 && !pool->is_due;
}

int workers_rouse(Workers *pool)
{
    Hub *hub = pool->hub;
    if (!has_need(pool) || pool->is_walked)
        return 0;
    if (!pool->idle || !hub->can_rest) /* in a later round the owner may take no tasks any more */
        return wake_task(pool);
    list_as_due(pool);
    if (hub->depth > 0)
        return 0; /* the end of that callback looks */
    hub->round_due = true;
    return hub_ask_for_round(hub);
}

static Workers *take(Workers **list)
{
    Workers *pool = *list;
    if (!pool)
        return NULL;
    *list = pool->next_due;
    pool->next_due = NULL;
    pool->is_due = false;
    return pool;
}

Workers *workers_take_due(Hub *hub)
{
    return take(&hub->due);
}

struct due_walk {
    walk walk;
    Workers *pool; /* whose workers go on */
    Workers *list; /* what follows */
};

static void next_pool(struct due_walk *due)
{
    if (due->pool)
        due->pool->is_walked = false;
    Py_XDECREF((PyObject *)due->pool);
    due->pool = take(&due->list);
    if (due->pool)
        due->pool->is_walked = true;
}

/* Idle workers, until their queues are empty. One whose turn is over has its pool be due again, for
 * the next round. */
static Drive *next_worker(walk *walk)
{
    struct due_walk *due = (struct due_walk *)walk;
    for (; due->pool; next_pool(due)) {
        while (has_need(due->pool)) { /* a worker that begins at once may leave some */
            Drive *worker = take_idle(due->pool);
            if (worker)
                return worker;
            if (start_worker(due->pool) < 0)
                hub_keep_exception(walk->left);
        }
    }
    return NULL;
}

void workers_run_due(Hub *hub, PyObject **left)
{
    struct due_walk due = {.walk = {.hub = hub, .next = next_worker, .left = left}};
    due.list = hub->due;
    hub->due = NULL;
    next_pool(&due);
    if (due.pool)
        drive_walk(&due.walk);
}

void workers_leave_to_tasks(Hub *hub)
{
    for (Workers *pool; (pool = workers_take_due(hub));) {
        if (has_need(pool) && wake_task(pool) < 0)
            PyErr_Clear(); /* the loop is closed */
        Py_DECREF((PyObject *)pool);
    }
}

/* ---- for Python ------------------------------------------------------------------------------ */

static PyObject *worker(PyObject *self, PyObject *direct)
{
    Workers *pool = (Workers *)self;
    int truth = PyObject_IsTrue(direct);
    PyObject *drive =
        truth < 0 ? NULL
                  : PyObject_CallFunctionObjArgs((PyObject *)Drive_Type, pool->hub, Py_None, NULL);
    if (!drive)
        return NULL;
    Drive *worker = (Drive *)drive;
    worker->pool = (Workers *)Py_NewRef(self);
    worker->by_task = !truth;
    worker->looking = true;
    if (pool->starting > 0) /* it has been counted */
        pool->starting--;
    else
        pool->looking++;
    return drive;
}

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *hub, *start;
    if (!PyArg_ParseTuple(args, "O!O", Hub_Type, &hub, &start))
        return NULL;
    Workers *pool = (Workers *)PyType_GenericNew(type, NULL, NULL);
    if (!pool)
        return NULL;
    pool->hub = (Hub *)Py_NewRef(hub);
    pool->start = Py_NewRef(start);
    return (PyObject *)pool;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Workers *pool = (Workers *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)pool->hub);
    Py_VISIT(pool->start);
    for (Requests *job = pool->ready; job; job = job->next)
        Py_VISIT((PyObject *)job);
    for (Drive *worker = pool->idle; worker; worker = worker->next)
        Py_VISIT((PyObject *)worker);
    return 0;
}

static int clear(PyObject *self)
{
    Workers *pool = (Workers *)self;
    for (Requests *job; (job = workers_pop(pool));)
        Py_DECREF((PyObject *)job);
    for (Drive *worker; (worker = pool->idle);) {
        Py_INCREF((PyObject *)worker);
        worker_unlist(worker);
        Py_DECREF((PyObject *)worker);
    }
    Py_CLEAR(pool->start);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    Py_CLEAR(((Workers *)self)->hub);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyObject *get_ready(PyObject *self, void *closure)
{
    return PyBool_FromLong(((Workers *)self)->ready != NULL);
}

static PyMethodDef methods[] = {
    {"_worker", worker, METH_O,
     "_worker($self, direct, /)\n--\n\n"
     "What the task of a worker awaits. It returns if there are enough others.\n\n"
     ":param direct: whether the hub may resume it directly"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"hub", T_OBJECT, offsetof(Workers, hub), READONLY, NULL},
    {"_looking", T_INT, offsetof(Workers, looking), READONLY, NULL},
    {"_parked", T_INT, offsetof(Workers, parked), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"_ready", get_ready, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The workers of an owner, and their queue."},
    {Py_tp_new, make},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Workers_spec = {
    .name = "anypoll._native.Workers",
    .basicsize = sizeof(Workers),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
