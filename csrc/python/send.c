/* Sending: send(), flush(), and output that is too large to go along with a read call.
 *
 * An operation that sends has these steps; all but the system call itself are seldom taken, and
 * are coroutines of Python's (anypoll/_connection/output.py), which it awaits as its inner:
 *
 *   step     | inner                   | what for
 *   LOOKED   | the event loop's own    | send(): nothing is sent in a cancelled scope
 *   DRAINED  | _drain()                | send(): output of earlier calls goes first
 *   SENT     | _finish_sending()       | the kernel did not take it all
 *   FLUSHED  | _finish_flushing()      | the same
 *   RESTED   | a checkpoint            | flush(): one is due
 *
 * Then send() yields once, unless it had to wait: the write comes before the checkpoint, as in
 * AnyIO and Trio, or each reply would wait for a round of the event loop. flush() yields only once
 * in so many calls, as a reader does.
 *
 * The core is given the memory of the objects themselves, as many pieces as there are. While it
 * looks at them nobody else runs, for the GIL is held. What it has queued the hub keeps
 * (core_keep), until the core is done with it.
 */
#include "native.h"

#include <errno.h>

#define PIECES 16 /* on the stack */

/* ---- the pieces ------------------------------------------------------------ */

/* The memory of bytes or of a view, which pins it as long as the object lives. */
static int take_memory(PyObject *object, ap_piece *piece)
{
    if (PyBytes_CheckExact(object)) {
        char *data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(object, &data, &size) < 0)
            return -1;
        *piece = (ap_piece){.data = data, .size = (size_t)size};
        return 0;
    }
    Py_buffer buffer;
    if (PyObject_GetBuffer(object, &buffer, PyBUF_SIMPLE) < 0)
        return -1;
    *piece = (ap_piece){.data = buffer.buf, .size = (size_t)buffer.len};
    PyBuffer_Release(&buffer);
    return 0;
}

static int hold(Core *core, PyObject *pieces, bool *more)
{
    PyObject *number = PyLong_FromUnsignedLongLong(core->number);
    PyObject *held = number ? PyDict_GetItemWithError(core->hub->outputs, number) : NULL;
    int rc = -1;
    *more = held;
    if (held)
        rc = PyList_SetSlice(held, PyList_Size(held), PyList_Size(held), pieces);
    else if (!PyErr_Occurred())
        rc = PyDict_SetItem(core->hub->outputs, number, pieces);
    Py_XDECREF(number);
    return rc;
}

/* No interpreted frame comes before the memory is held: a signal handler may raise an exception in
 * any, and the core would send memory that is free. */
int core_keep(Core *core, PyObject *pieces, int64_t left)
{
    bool more;
    if (hold(core, pieces, &more) < 0) {
        Py_INCREF(pieces); /* lost, not freed: they are still needed */
        return -1;
    }
    if (!more)
        return 0;
    PyObject *size = PyLong_FromLongLong(left), *none = NULL;
    if (size)
        none = PyObject_CallMethodObjArgs((PyObject *)core, n__drop_sent, size, NULL);
    Py_XDECREF(size);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

int core_send(Core *core, PyObject *list, int64_t *left)
{
    ap_piece few[PIECES], *pieces = few;
    Py_ssize_t count = PyList_Size(list);
    if (count > PIECES && !(pieces = PyMem_Malloc((size_t)count * sizeof *pieces))) {
        PyErr_NoMemory();
        return -1;
    }
    int rc = 0;
    for (Py_ssize_t i = 0; i < count && rc == 0; i++)
        rc = take_memory(PyList_GetItem(list, i), &pieces[i]);
    if (rc == 0)
        *left = ap_conn_send(core->conn, pieces, (int)count);
    if (pieces != few)
        PyMem_Free(pieces);
    return rc == 0 && *left > 0 ? core_keep(core, list, *left) : rc;
}

int core_send_pending(Core *core, int64_t *left)
{
    PyObject *pieces = writer_take(core->writer);
    int rc = pieces ? core_send(core, pieces, left) : -1;
    Py_XDECREF(pieces);
    return rc;
}

/* ---- what both do -------------------------------------------------------------- */

static int await_inner(Operation *op, enum step step, PyObject *inner)
{
    op->inner = inner;
    op->state = INNER;
    op->step = (uint8_t)step;
    return inner ? 0 : -1;
}

static PyObject *call_with_deadline(Operation *op, PyObject *method, PyObject *argument)
{
    PyObject *deadline = PyLong_FromLongLong(op->deadline), *inner = NULL;
    if (deadline)
        inner = PyObject_CallMethodObjArgs((PyObject *)op->core, method, deadline, argument, NULL);
    Py_XDECREF(deadline);
    return inner;
}

static int enter(Operation *op)
{
    Core *core = op->core;
    if (core->writing) {
        PyErr_SetString(BusyResourceError, "writing to");
        return -1;
    }
    if (core->closed || !core->conn)
        return core_refuse(core);
    if (hub_check(core->hub) < 0)
        return -1;
    core->writing = true;
    op->writing = true;
    return 0;
}

static int seal(Writer *writer)
{
    if (!writer->reserved || PyList_Size(writer->reserved) <= 0)
        return 0;
    PyObject *none = PyObject_CallMethodObjArgs((PyObject *)writer, n__seal, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

static int write_failed(Core *core, int64_t code)
{
    PyObject *number = PyLong_FromLongLong(code);
    if (number)
        core_raise_from(core, n__write_error, number);
    Py_XDECREF(number);
    return -1;
}

/* ---- send() ---------------------------------------------------------------------- */

/* Bytes stay what they are; of anything else it takes a view, which pins the memory. */
static int take_item(Operation *op)
{
    PyObject *item = op->argument;
    ap_piece piece;
    if (PyBytes_CheckExact(item))
        return 0;
    PyObject *view = PyMemoryView_FromObject(item);
    if (!view || take_memory(view, &piece) < 0) {
        PyErr_Clear();
        Py_XDECREF(view);
        view = PyObject_CallMethodObjArgs((PyObject *)op->core, n__item, item, NULL);
        if (!view)
            return -1;
    }
    replace(&op->argument, view);
    Py_DECREF(view);
    return 0;
}

static int send_item(Operation *op, const ap_piece *item, int64_t *left)
{
    Core *core = op->core;
    *left = item->size ? ap_conn_send(core->conn, item, 1) : 0;
    if (*left <= 0)
        return 0;
    PyObject *pieces = PyList_New(0);
    int rc =
        pieces && PyList_Append(pieces, op->argument) == 0 ? core_keep(core, pieces, *left) : -1;
    Py_XDECREF(pieces);
    return rc;
}

static int send_after_pending(Operation *op, const ap_piece *item, int64_t *left)
{
    PyObject *pieces = writer_take(op->core->writer);
    int rc = pieces ? 0 : -1;
    if (rc == 0 && item->size)
        rc = PyList_Append(pieces, op->argument);
    if (rc == 0)
        rc = core_send(op->core, pieces, left);
    Py_XDECREF(pieces);
    return rc;
}

static int send_now(Operation *op)
{
    Core *core = op->core;
    ap_piece item;
    int64_t left = 0;
    if (seal(core->writer) < 0 || take_memory(op->argument, &item) < 0)
        return -1;
    int rc = core->writer->size == 0 ? send_item(op, &item, &left)
                                     : send_after_pending(op, &item, &left);
    if (rc < 0)
        return -1;
    if (left < 0)
        return write_failed(core, left);
    if (left == 0) {
        op->state = op->suspended ? OPEN : YIELDED;
        return 0;
    }
    return await_inner(op, SENT, call_with_deadline(op, n__finish_sending, op->argument));
}

static int begin_sending(Operation *op)
{
    Core *core = op->core;
    if (core->closed)
        return core_refuse(core);
    if (core->writer->shut) { /* even if there is nothing to send */
        core_raise_from(core, n_why_unwritable, NULL);
        return -1;
    }
    op->deadline = core_deadline(core->write_timeout);
    int late = op->deadline < 0 ? -1 : core_owes(core);
    if (late < 0)
        return -1;
    return late ? await_inner(op, DRAINED, call_with_deadline(op, n__drain, NULL)) : send_now(op);
}

/* ---- flush() ----------------------------------------------------------------------- */

static int after_flush(Operation *op)
{
    Core *core = op->core;
    op->state = OPEN;
    if (op->suspended || --core->reader->budget >= 0)
        return 0;
    return await_inner(op, RESTED,
                       PyObject_CallMethodObjArgs((PyObject *)core->hub, n_checkpoint, NULL));
}

static int flush_now(Operation *op)
{
    Core *core = op->core;
    if (seal(core->writer) < 0)
        return -1;
    op->deadline = core_deadline(core->write_timeout);
    if (op->deadline < 0)
        return -1;
    if (core->failure)
        return write_failed(core, core->failure);
    if (core->writer->shut && core->kind != AP_SEQPACKET && !(op->flags & CLAIMED)) {
        core_raise_from(core, n_why_unwritable, NULL);
        return -1;
    }
    int64_t left;
    if (core->writer->size == 0) /* it waits for what is queued, and learns if that fails */
        left = ap_conn_drain(core->conn, 0, 0);
    else if (core_send_pending(core, &left) < 0)
        return -1;
    if (left == 0)
        return after_flush(op);
    if (left < 0 && left != -EAGAIN)
        return write_failed(core, left);
    return await_inner(op, FLUSHED, call_with_deadline(op, n__finish_flushing, NULL));
}

/* ---- the cancelled scope --------------------------------------------------------------- */

/* AnyIO's TaskState of the current task; NULL: there is none, or an exception. It is the same as
 * long as the task lives, so the drive of a handler remembers it. */
static PyObject *current_state(Hub *hub)
{
    PyObject *task = hub_current_task(hub), *ref = NULL, *state = NULL;
    Drive *drive = hub->stepping;
    bool driven = drive && drive->task == task; /* not an eager task, which the handler has begun */
    if (driven && drive->scopes)
        state = drive->scopes;
    else if (task && task != Py_None && (ref = PyWeakref_NewRef(task, NULL)))
        state = PyDict_GetItemWithError(hub->states, ref);
    if (driven && !drive->scopes)
        drive->scopes = Py_XNewRef(state);
    Py_XDECREF(ref);
    Py_XDECREF(task);
    return Py_XNewRef(state);
}

/* The innermost of AnyIO's scopes that the task is in; NULL: there is none, or an exception. */
static PyObject *current_scope(Hub *hub)
{
    PyObject *state = current_state(hub);
    PyObject *scope = state ? slot_get(hub, state, CANCEL_SCOPE) : NULL;
    Py_XDECREF(state);
    return scope;
}

static bool is_in_cancelled_scope(Hub *hub)
{
    bool cancelled = false;
    PyObject *scope = current_scope(hub);
    while (scope && scope != Py_None && !(cancelled = slot_is_true(hub, scope, CANCEL_CALLED)) &&
           !slot_is_true(hub, scope, SHIELD)) {
        PyObject *outer = slot_get(hub, scope, PARENT_SCOPE);
        Py_DECREF(scope);
        scope = outer;
    }
    Py_XDECREF(scope);
    return cancelled;
}

/* As trio.lowlevel.checkpoint_if_cancelled() has it. */
static bool is_cancelled_on_trio(Hub *hub)
{
    PyObject *task = hub->stepping ? Py_NewRef(hub->stepping->task) : hub_current_task(hub);
    PyObject *status = task ? slot_get(hub, task, CANCEL_STATUS) : NULL;
    bool cancelled = !status || slot_is_true(hub, status, EFFECTIVELY_CANCELLED) ||
                     slot_is_true(hub, hub->runner, KI_PENDING); /* perhaps not for this task */
    if (!cancelled)
        trio_count_point(hub, task, CANCEL_POINTS);
    Py_XDECREF(task);
    Py_XDECREF(status);
    return cancelled;
}

/* The loop's own coroutine takes longer than all else that a send() does, and says yes nearly
 * always. So it is asked only if one of the scopes is cancelled, or if they are not where they are
 * known to be (_loop/asyncio_hub.py, trio_hub.py). */
bool send_may_be_cancelled(Hub *hub)
{
    if (!hub->slots || hub->slots == Py_None)
        return true;
    bool cancelled = hub->trio ? is_cancelled_on_trio(hub) : is_in_cancelled_scope(hub);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        return true;
    }
    return cancelled;
}

/* ---- for the operation --------------------------------------------------------------- */

int send_begin(Operation *op)
{
    if (op->kind == SEND && take_item(op) < 0)
        return -1;
    if ((op->flags & CLAIMED ? core_check_open(op->core) : enter(op)) < 0)
        return -1;
    if (op->kind == FLUSH)
        return flush_now(op);
    if (!send_may_be_cancelled(op->core->hub))
        return begin_sending(op);
    return await_inner(op, LOOKED, PyObject_CallNoArgs(op->core->hub->look));
}

int send_go_on(Operation *op, PyObject *value)
{
    bool waited = PyObject_IsTrue(value) == 1;
    switch (op->step) {
    case LOOKED: return begin_sending(op);
    case DRAINED: op->suspended = waited; return send_now(op);
    case FLUSHED: op->suspended = waited; return after_flush(op);
    case RESTED: op->core->reader->budget = op->core->budget; break;
    default: break;
    }
    op->state = OPEN;
    return 0;
}

PyObject *send_new(enum kind kind, Core *core, PyObject *item, int flags)
{
    Operation *op = operation_new(kind, NULL, item);
    if (op) {
        op->core = (Core *)Py_NewRef((PyObject *)core);
        op->flags = (uint8_t)flags;
    }
    return (PyObject *)op;
}
