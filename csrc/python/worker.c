/* A worker and its job: the drive's coroutine is part of a step, and the next job follows.
 *
 * Each job runs in a copy of its own context, whatever that of the worker's task: calls of other
 * connections must not see the variables that one sets. The worker enters it whenever it is
 * resumed. In there the step goes on from coroutine to coroutine (requests.c) until one of them
 * suspends, or the step is over.
 *
 * A cancellation of the task is thrown into the call, and the worker ends with it when the
 * connection has been concluded. A worker whose task is cancelled while it has no job ends at once;
 * so does one whose call did not notice, because it ended without suspending.
 */
#include "native.h"

#define JOBS 64 /* done in a row, before other tasks get a turn */

/* ---- in the job's context -------------------------------------------------------- */

/* What is sent to the coroutine, or thrown into it. */
typedef struct {
    PyObject *value;
    PyObject *const *args; /* of throw(); or NULL */
    Py_ssize_t n;
} message;

static PySendResult deliver(PyObject *inner, const message *m, PyObject **result)
{
    if (!m->args)
        return PyIter_Send(inner, m->value, result);
    return native_throw(inner, m->args, m->n, result);
}

/* The step goes on, or begins. */
static PySendResult advance(Drive *worker, const message *m, PyObject **result)
{
    Requests *job = (Requests *)Py_NewRef((PyObject *)worker->job);
    PyObject *inner = Py_XNewRef(worker->inner);
    PySendResult how = inner ? deliver(inner, m, result) : PYGEN_RETURN;
    while (how != PYGEN_NEXT) {
        Py_CLEAR(worker->inner);
        Py_CLEAR(inner);
        Py_CLEAR(*result);
        inner = requests_next(job, how);
        if (!inner)
            break;
        worker->inner = Py_NewRef(inner);
        how = PyIter_Send(inner, Py_None, result);
    }
    if (!inner)
        how = PyErr_Occurred() ? PYGEN_ERROR : PYGEN_RETURN;
    Py_XDECREF(inner);
    Py_DECREF((PyObject *)job);
    return how;
}

/* ---- around it ---------------------------------------------------------------------- */

static void leave(PyObject *context)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    if (exit_context(context) < 0)
        PyErr_Clear(); /* whoever has entered another one by C, and not left it */
    PyErr_Restore(type, value, traceback);
}

static void drop_job(Drive *worker)
{
    Py_CLEAR(worker->inner);
    Py_CLEAR(worker->job);
    Py_CLEAR(worker->job_context);
}

static PySendResult go_on(Drive *worker, const message *m, PyObject **result)
{
    PyObject *context = Py_NewRef(worker->job_context);
    PySendResult how = PYGEN_ERROR;
    if (enter_context(context) == 0) {
        how = advance(worker, m, result);
        leave(context);
    }
    Py_DECREF(context);
    if (how != PYGEN_NEXT)
        drop_job(worker);
    else if (requests_suspended(worker->job) < 0)
        PyErr_Clear(); /* whoever writes next learns of it */
    return how;
}

static PySendResult begin_job(Drive *worker, Requests *job, PyObject **result)
{
    worker->job = job;
    worker->hub->jobs++;
    worker->job_context = PyObject_CallMethodObjArgs(job->context, n_copy, NULL);
    if (!worker->job_context) {
        drop_job(worker);
        return PYGEN_ERROR;
    }
    return go_on(worker, &(message){.value = Py_None}, result);
}

/* Whether the task is to be cancelled when it suspends, which its last call has not noticed. While
 * the hub steps the drive, the drive knows. */
static bool is_cancelled(Drive *worker)
{
    if (worker->must_cancel || worker->by_hub || worker->hub->trio)
        return worker->must_cancel;
    PyObject *count = PyObject_CallMethodObjArgs(worker->task, n_cancelling, NULL);
    bool cancelled = !count || PyObject_IsTrue(count) != 0;
    Py_XDECREF(count);
    PyErr_Clear();
    return cancelled;
}

/* From the queue, unless the task is to be cancelled: that must not find another's call. */
static PySendResult take_jobs(Drive *worker, bool has_done_one, PyObject **result)
{
    Workers *pool = worker->pool;
    PySendResult how = PYGEN_RETURN;
    for (int turn = JOBS; how == PYGEN_RETURN && turn > 0 && pool->ready; turn--) {
        if (has_done_one && is_cancelled(worker))
            break;
        how = begin_job(worker, workers_pop(pool), result);
        has_done_one = true;
    }
    return how;
}

/* The worker has no job, or its last one stands as `how` says. */
static PySendResult do_jobs(Drive *worker, bool has_done_one, PySendResult how, PyObject **result)
{
    Hub *hub = worker->hub;
    workers_stop_looking(worker);
    if (how == PYGEN_RETURN)
        how = take_jobs(worker, has_done_one, result);
    if (how == PYGEN_NEXT && workers_rouse(worker->pool) < 0) { /* of a signal handler */
        Py_CLEAR(*result);
        PyObject *exception = native_take_exception();
        how = worker_throw(worker, &exception, 1, result);
        Py_DECREF(exception);
    } else if (how == PYGEN_RETURN && worker->pool->ready && !hub->can_rest) {
        /* its turn is over, and the hub gives it no other */
        *result = Py_NewRef(hub->trio ? hub->shielded : Py_None);
        how = PYGEN_NEXT;
    }
    return how;
}

PySendResult worker_send(Drive *worker, PyObject *value, PyObject **result)
{
    *result = NULL;
    if (!worker->job)
        return do_jobs(worker, false, PYGEN_RETURN, result);
    return do_jobs(worker, true, go_on(worker, &(message){.value = value}, result), result);
}

PySendResult worker_throw(Drive *worker, PyObject *const *args, Py_ssize_t n, PyObject **result)
{
    *result = NULL;
    if (!worker->job) {
        native_raise(args, n);
        return PYGEN_ERROR;
    }
    PySendResult how = go_on(worker, &(message){.args = args, .n = n}, result);
    return do_jobs(worker, true, how, result);
}

/* ---- the end -------------------------------------------------------------------------- */

void worker_end(Drive *worker)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    workers_stop_looking(worker);
    drop_job(worker);
    if (workers_rouse(worker->pool) < 0)
        PyErr_WriteUnraisable((PyObject *)worker->pool);
    PyErr_Restore(type, value, traceback);
}

/* What the end of the connection has to wait for is not waited for. No other job follows. */
int worker_close(Drive *worker)
{
    PyObject *result = NULL, *inner = NULL, *none = NULL;
    PySendResult how = PYGEN_RETURN;
    worker->must_cancel = true;
    if (worker->job)
        how = worker_throw(worker, &PyExc_GeneratorExit, 1, &result);
    Py_XDECREF(result);
    if (how == PYGEN_NEXT && (inner = Py_XNewRef(worker->inner)))
        none = PyObject_CallMethodObjArgs(inner, n_close, NULL);
    Py_XDECREF(inner);
    Py_XDECREF(none);
    if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_GeneratorExit))
        PyErr_Clear();
    return PyErr_Occurred() ? -1 : 0;
}
