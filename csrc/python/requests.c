/* Request mode of one connection: a call per request, and no task while it is idle.
 *
 * A connection is idle (the core waits for input, the hub lists the connection, and nobody else may
 * read), ready (in the queue of its owner's workers) or busy (a worker takes a step of it). The hub
 * puts an idle one into the queue when its input has come; nothing of that is Python's.
 *
 * A step is a sequence of coroutines, which the worker awaits one after another in a copy of the
 * connection's context. After each of them it asks here for the next:
 *
 *   phase  | the coroutine                | what follows
 *   BEGIN  | none yet                     | BEFORE if there is one, else CALL if a call is due
 *   BEFORE | what comes before all calls  | CALL if a call is due
 *   CALL   | the call                     | the step is over: idle, or ready if a call is due again
 *   END    | Requests._conclude()         | the step is over, and no other will come
 *
 * An exception at any point but the last, the end of the input, and an owner that is ending (cut)
 * lead to END.
 *
 * Is a call due? The core is asked (ap_conn_request). A call is due if anything is unread; but if
 * the last call consumed nothing, only once more input has come than was there when that call
 * began. So a call that consumes nothing is not repeated in a busy loop, and input that arrives
 * while it runs is not missed. Pending output goes along with the question; if a call is due at
 * once, it goes along with the next answer instead, or when that call suspends.
 */
#include "native.h"

PyTypeObject *Requests_Type;

/* ---- the list of the idle ---------------------------------------------------- */

/* The pool's hub, which is the core's: the collector may come to the core before it comes here. */
void hub_list_idle(Requests *requests)
{
    Hub *hub = requests->pool->hub;
    requests->idle = true;
    requests->prev = NULL;
    requests->next = hub->idle;
    if (requests->next)
        requests->next->prev = requests;
    hub->idle = (Requests *)Py_NewRef((PyObject *)requests);
    hub->armed++;
}

Requests *hub_take_idle(Requests *requests)
{
    if (!requests->idle)
        return NULL;
    Hub *hub = requests->pool->hub;
    requests->idle = false;
    if (requests->prev)
        requests->prev->next = requests->next;
    else
        hub->idle = requests->next;
    if (requests->next)
        requests->next->prev = requests->prev;
    requests->next = requests->prev = NULL;
    hub->armed--;
    requests->core->reading = false;
    return requests;
}

/* ---- whether a call is due ----------------------------------------------------- */

static int become_idle(Requests *requests)
{
    Core *core = requests->core;
    window_close(core->reader);
    if (core->draining) {
        PyObject *none = PyObject_CallMethodObjArgs((PyObject *)core, n__end_if_drained, NULL);
        if (!none)
            return -1;
        Py_DECREF(none);
        if (core->closed) /* meanwhile, by another thread: it has found nobody to tell */
            return core_refuse(core);
    }
    core->reading = true;
    hub_list_idle(requests);
    return 0;
}

/* For the call that is due. */
static int open_window(Core *core, int64_t result)
{
    Reader *reader = core->reader;
    reader->budget = core->budget;
    if (result == 0) { /* the unread bytes were seen before, and may span several blocks */
        reader->end = SHUT;
        PyObject *none = PyObject_CallMethodObjArgs((PyObject *)core, n__check_unread, NULL);
        Py_XDECREF(none);
        return none ? 0 : -1;
    }
    int owes = core_owes(core);
    if (owes == 0)
        return core_open_window(core, result);
    reader->end = SHUT; /* the first call of the reader lets it drain */
    return owes < 0 ? -1 : 0;
}

/* 1: a call is due. 0: not; pending output has gone, and the connection is idle. -1: none will ever
 * be due: the peer has ended its side, or the server is ending and nothing is unread (EndOfStream);
 * ClosedResourceError, BrokenResourceError, IdleTimeout; MessageTooLarge if the last call has left
 * more than read_limit unread. */
static int look(Requests *requests)
{
    Core *core = requests->core;
    if (requests->closing) { /* in another task's aclose(), which reads, and reports the end */
        requests->parked = true;
        return 0;
    }
    if (core->closed && core->flushing) { /* in one that does not read */
        core->reading = true;
        hub_list_idle(requests);
        return 0;
    }
    if (core->closed)
        return core_refuse(core);
    if (core->reading) {
        PyErr_SetString(PyExc_RuntimeError,
                        "A request call has ended while another task reads its connection");
        return -1;
    }
    int64_t result = core_request(core, requests->fresh);
    if (result == INT64_MIN)
        return -1;
    if (core_is_armed(result))
        return become_idle(requests);
    if (result < 0)
        return core_ended(core, result);
    if (open_window(core, result) < 0)
        return -1;
    requests->carries = core->writer->size > 0;
    return 1;
}

/* ---- a step ----------------------------------------------------------------------- */

static PyObject *conclude(Requests *requests, PyObject *exception)
{
    requests->phase = P_END;
    return PyObject_CallMethodObjArgs((PyObject *)requests, n__conclude, exception, NULL);
}

/* The exception that is set ends the connection. */
static PyObject *fail(Requests *requests)
{
    PyObject *exception = native_take_exception();
    PyObject *next = conclude(requests, exception);
    Py_XDECREF(exception);
    return next;
}

static int is_cut(Requests *requests)
{
    PyObject *cut = PyObject_GetAttr(requests->owner, n_cut);
    int truth = cut ? PyObject_IsTrue(cut) : -1;
    Py_XDECREF(cut);
    return truth;
}

/* All has gone well. */
static PyObject *end_step(Requests *requests)
{
    int cut = is_cut(requests);
    if (cut < 0)
        return fail(requests);
    if (cut)
        return conclude(requests, Py_None);
    requests->phase = P_BEGIN;
    requests->taskless = true;
    return NULL;
}

static PyObject *as_coroutine(Requests *requests, PyObject *awaitable)
{
    if ((PyObject *)Py_TYPE(awaitable) == coroutine_type)
        return awaitable;
    PyObject *coroutine =
        PyObject_CallMethodObjArgs((PyObject *)requests, n__await, awaitable, NULL);
    Py_DECREF(awaitable);
    return coroutine;
}

static PyObject *call(Requests *requests)
{
    requests->phase = P_CALL;
    requests->due = requests->fresh = false;
    PyObject *awaitable =
        requests->call == Py_None
            ? PyObject_CallFunctionObjArgs(requests->function, requests->conn, NULL)
            : PyObject_CallFunctionObjArgs(requests->call, requests->conn, requests->function,
                                           NULL);
    PyObject *coroutine = awaitable ? as_coroutine(requests, awaitable) : NULL;
    return coroutine ? coroutine : fail(requests);
}

static PyObject *call_if_due(Requests *requests)
{
    int cut = is_cut(requests);
    if (cut < 0)
        return fail(requests);
    if (cut)
        return end_step(requests);
    if (requests->core->closed)
        requests->due = false;
    int due = requests->due ? 1 : requests->over ? 0 : look(requests);
    if (due < 0)
        return fail(requests);
    return due ? call(requests) : end_step(requests);
}

static PyObject *begin(Requests *requests)
{
    PyObject *before = requests->before;
    if (requests->over)
        return NULL;
    requests->taskless = false;
    if (!before || before == Py_None)
        return call_if_due(requests);
    requests->before = NULL;
    requests->phase = P_BEFORE;
    PyObject *coroutine = PyObject_CallFunctionObjArgs(before, requests->conn, NULL);
    Py_DECREF(before);
    return coroutine ? coroutine : fail(requests);
}

/* Behind those that are ready already. */
static PyObject *after_call(Requests *requests)
{
    requests->carries = false;
    int cut = is_cut(requests);
    if (cut < 0)
        return fail(requests);
    if (!requests->over && !cut) {
        int due = look(requests);
        requests->due = due > 0;
        if (due < 0)
            return fail(requests);
        if (due) /* its worker is in the middle of the queue: no other need look */
            workers_push(requests->pool, requests);
    }
    return end_step(requests);
}

PyObject *requests_next(Requests *requests, PySendResult how)
{
    if (how == PYGEN_ERROR && requests->phase != P_END)
        return fail(requests);
    switch (requests->phase) {
    case P_BEGIN: return begin(requests);
    case P_BEFORE: return call_if_due(requests);
    case P_CALL: return after_call(requests);
    default: return NULL;
    }
}

int requests_suspended(Requests *requests)
{
    Core *core = requests->core;
    int64_t left;
    bool carries = requests->carries;
    requests->carries = false;
    if (!carries || core->closed || core->writing || core->writer->size == 0)
        return 0;
    return core_send_pending(core, &left);
}

/* ---- for Python ---------------------------------------------------------------------- */

static PyObject *submit(PyObject *self, PyObject *unused)
{
    if (requests_submit((Requests *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *look_now(PyObject *self, PyObject *unused)
{
    Requests *requests = (Requests *)self;
    int due = look(requests);
    if (due < 0)
        return NULL;
    requests->due = due > 0;
    return PyBool_FromLong(due);
}

static PyObject *leave_idle(PyObject *self, PyObject *unused)
{
    Requests *listed = hub_take_idle((Requests *)self);
    Py_XDECREF((PyObject *)listed);
    return PyBool_FromLong(listed != NULL);
}

static PyObject *begin_closing(PyObject *self, PyObject *unused)
{
    Requests *requests = (Requests *)self, *listed = hub_take_idle(requests);
    requests->closing = true;
    requests->parked = listed != NULL;
    Py_XDECREF((PyObject *)listed);
    Py_RETURN_NONE;
}

static PyObject *end_closing(PyObject *self, PyObject *unused)
{
    Requests *requests = (Requests *)self;
    if (requests->parked && !requests->over) {
        requests->core->reading = true;
        hub_list_idle(requests);
    }
    requests->closing = requests->parked = false;
    Py_RETURN_NONE;
}

static PyObject *send_carried(PyObject *self, PyObject *unused)
{
    if (requests_suspended((Requests *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *conn, *core, *function, *owner, *call, *context, *pool;
    if (!PyArg_ParseTuple(args, "OO!OOOOO!", &conn, Core_Type, &core, &function, &owner, &call,
                          &context, Workers_Type, &pool))
        return NULL;
    Requests *requests = (Requests *)PyType_GenericNew(type, NULL, NULL);
    if (!requests)
        return NULL;
    requests->conn = Py_NewRef(conn);
    requests->core = (Core *)Py_NewRef(core);
    requests->function = Py_NewRef(function);
    requests->owner = Py_NewRef(owner);
    requests->call = Py_NewRef(call);
    requests->context = Py_NewRef(context);
    requests->pool = (Workers *)Py_NewRef(pool);
    requests->fresh = true;
    return (PyObject *)requests;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Requests *requests = (Requests *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(requests->conn);
    Py_VISIT((PyObject *)requests->core);
    Py_VISIT(requests->function);
    Py_VISIT(requests->before);
    Py_VISIT(requests->owner);
    Py_VISIT(requests->call);
    Py_VISIT(requests->context);
    Py_VISIT((PyObject *)requests->pool);
    return 0;
}

/* One that is listed or queued is not garbage unless the list's holder is, which unlists it. */
static int clear(PyObject *self)
{
    Requests *requests = (Requests *)self;
    Py_CLEAR(requests->conn);
    Py_CLEAR(requests->function);
    Py_CLEAR(requests->before);
    Py_CLEAR(requests->owner);
    Py_CLEAR(requests->call);
    Py_CLEAR(requests->context);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    Py_CLEAR(((Requests *)self)->core);
    Py_CLEAR(((Requests *)self)->pool);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"_submit", submit, METH_NOARGS, "Puts the connection into the queue of its workers."},
    {"_look", look_now, METH_NOARGS,
     "Whether a call is due; if not, pending output is sent and the connection becomes idle.\n\n"
     ":raises EndOfStream: if none will ever be due, because the peer has ended its side, or\n"
     "    because the server is ending and nothing is unread\n"
     ":raises ClosedResourceError, BrokenResourceError, IdleTimeout: likewise\n"
     ":raises MessageTooLarge: if the last call left more than ``read_limit`` unread"},
    {"_leave_idle", leave_idle, METH_NOARGS, "Idle no longer; returns whether it was. Any thread."},
    {"_begin_closing", begin_closing, METH_NOARGS,
     "An ``aclose()`` is about to read: until its end the connection does not become idle."},
    {"_end_closing", end_closing, METH_NOARGS, "It is idle, if it is between two calls."},
    {"_send_carried", send_carried, METH_NOARGS, "Sends the answers of earlier calls."},
    {NULL, NULL, 0, NULL},
};

#define OBJECT(name, field, flags) {name, T_OBJECT, offsetof(Requests, field), flags, NULL}
#define FLAG(name, field, flags) {name, T_BOOL, offsetof(Requests, field), flags, NULL}

static PyMemberDef members[] = {
    OBJECT("_before", before, 0),     OBJECT("_call", call, 0),
    OBJECT("_conn", conn, 0),         OBJECT("_core", core, READONLY),
    OBJECT("_function", function, 0), OBJECT("_owner", owner, READONLY),
    FLAG("_fresh", fresh, 0),         FLAG("_over", over, 0),
    FLAG("carries", carries, 0),      FLAG("idle", idle, READONLY),
    FLAG("taskless", taskless, 0),    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The hot part of a connection in request mode."},
    {Py_tp_new, make},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {0, NULL},
};

PyType_Spec Requests_spec = {
    .name = "anypoll._native.Requests",
    .basicsize = sizeof(Requests),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
