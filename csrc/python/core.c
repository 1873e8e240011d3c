/* Asking the core for input on behalf of an operation, with the output that goes along.
 *
 * The question is asked again from the start after every wake-up, until it is answered. So a
 * cancelled wait has consumed nothing, a wake-up needs no payload, and a timeout that coincides
 * with the data yields the data. While it waits the window is shut.
 */
#include "native.h"

#include <errno.h>
#include <time.h>

#define LONG_TIME 1e9 /* seconds; as good as forever */
#define NEW_BLOCK ((int64_t)1 << AP_NEW_BLOCK_SHIFT)

/* ---- what a call needs --------------------------------------------------- */

int64_t core_deadline(PyObject *timeout)
{
    if (!timeout || timeout == Py_None)
        return 0;
    double seconds = PyFloat_AsDouble(timeout);
    if (seconds == -1.0 && PyErr_Occurred())
        return -1;
    if (seconds > LONG_TIME)
        return 0;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec + (int64_t)(seconds * 1e9);
}

void core_raise_from(Core *core, PyObject *method, PyObject *argument)
{
    PyObject *exception = PyObject_CallMethodObjArgs((PyObject *)core, method, argument, NULL);
    if (exception)
        PyErr_SetObject((PyObject *)Py_TYPE(exception), exception);
    Py_XDECREF(exception);
}

static void raise_closed(Core *core)
{
    core_raise_from(core, n__closed_error, NULL);
}

static void raise_ended(Core *core, int64_t code)
{
    PyObject *number = PyLong_FromLongLong(code);
    if (number)
        core_raise_from(core, n__ended, number);
    Py_XDECREF(number);
}

int core_owes(Core *core)
{
    PyObject *outputs = core->hub->outputs;
    if (!outputs || PyDict_Size(outputs) == 0)
        return 0;
    PyObject *number = PyLong_FromUnsignedLongLong(core->number);
    int found = number ? PyDict_Contains(outputs, number) : -1;
    Py_XDECREF(number);
    return found;
}

/* ---- output that goes along ----------------------------------------------- */

/* It has gone, or the core has it. */
static int forget(Core *core, bool queued)
{
    if (!queued)
        return writer_forget(core->writer);
    PyObject *pieces = writer_hand_over(core->writer);
    int rc = pieces ? core_keep(core, pieces, ap_conn_queued(core->conn)) : -1;
    Py_XDECREF(pieces);
    return rc;
}

/* ---- the window ----------------------------------------------------------- */

/* Opens the window on a new block. */
int core_show(Core *core)
{
    Reader *reader = core->reader;
    ap_view view;
    int rc = ap_conn_block(core->conn, (uint32_t)reader->start, &view);
    if (rc < 0) {
        raise_ended(core, rc);
        return -1;
    }
    if (rc == 1) {
        PyObject *block = Block_new(view.block, view.size), *old = reader->view;
        if (!block)
            return -1;
        reader->view = block;
        Py_XDECREF(old);
    }
    reader->start = view.start;
    reader->end = view.end;
    return 0;
}

int core_open_window(Core *core, int64_t result)
{
    if (result & NEW_BLOCK && core_show(core) < 0)
        return -1;
    core->reader->end = result & (NEW_BLOCK - 1);
    return 0;
}

static int found(Core *core, Operation *op, int64_t result)
{
    Reader *reader = core->reader;
    op->n = (Py_ssize_t)(result & (NEW_BLOCK - 1));
    if (result & NEW_BLOCK && core_show(core) < 0)
        return -1;
    if (reader->start + op->n <= reader->end)
        return 0;
    int64_t end =
        ap_conn_read(core->conn, (uint32_t)reader->start, (size_t)op->n, AP_NOWAIT, 0, NULL, 0);
    if (end < 0) {
        raise_ended(core, end);
        return -1;
    }
    return core_open_window(core, end);
}

/* ---- asking ---------------------------------------------------------------- */

bool operation_finds(const Operation *op)
{
    return op->kind == UNTIL || op->kind == FIND;
}

static int64_t ask(Core *core, Operation *op, const char *data, Py_ssize_t size)
{
    uint32_t start = (uint32_t)core->reader->start;
    int flags = receive_may_go_straight(op) ? AP_STRAIGHT : op->flags;
    if (!operation_finds(op))
        return ap_conn_read(core->conn, start, (size_t)op->n, flags, op->deadline, data,
                            (size_t)size);
    char *delimiter;
    Py_ssize_t length;
    if (PyBytes_AsStringAndSize(op->argument, &delimiter, &length) < 0)
        return -EINVAL;
    return ap_conn_find(core->conn, start, delimiter, (size_t)length, (size_t)op->most, 0,
                        op->deadline, data, (size_t)size);
}

static int answered(Core *core, Operation *op, int64_t result)
{
    op->state = OPEN;
    if (!op->suspended) {
        if (hub_check(core->hub) < 0)
            return -1;
        core->reader->budget--;
    }
    if (operation_finds(op))
        return found(core, op, result);
    if (op->n == 0 || op->flags & AP_SCATTER)
        return 0;
    return result ? core_open_window(core, result) : receive_straight(core, op);
}

/* Methods of an object that __new__ alone has made, or that the collector has cleared. */
int core_check_open(Core *core)
{
    if (core->conn && core->hub && core->reader && core->writer)
        return 0;
    PyErr_SetString(PyExc_RuntimeError, "this connection has not been opened");
    return -1;
}

int core_ended(Core *core, int64_t code)
{
    raise_ended(core, code);
    return -1;
}

static int refused(Core *core, Operation *op, int64_t result)
{
    if (result != AP_EDELIM)
        return core_ended(core, result);
    PyObject *most = PyLong_FromSsize_t(op->most);
    if (most)
        core_raise_from(core, n__not_found, most);
    Py_XDECREF(most);
    return -1;
}

static int arm(Core *core, Operation *op)
{
    /* An event loop of the same thread objects by itself: asyncio's tasks ask for ours. */
    if (core->hub->thread != PyThread_get_thread_ident() && hub_check(core->hub) < 0) {
        ap_conn_disarm_read(core->conn);
        return -1;
    }
    if (core->draining) {
        PyObject *none = PyObject_CallMethodObjArgs((PyObject *)core, n__end_if_drained, NULL);
        if (!none)
            return -1;
        Py_DECREF(none);
    }
    core->reader->end = SHUT;
    op->state = ARMED;
    hub_wait(core, op);
    return 0;
}

/* A window that was walked through to its end may begin anew in its block, if nobody has a view:
 * so one block, and one wrapper, serve for many messages. Half of it is left for the next one. */
static void rewind_window(Core *core)
{
    Reader *reader = core->reader;
    if (Py_TYPE(reader->view) != Block_Type || Py_REFCNT(reader->view) > 1)
        return;
    Block *block = (Block *)reader->view;
    uint32_t pos = (uint32_t)reader->start;
    int rc = pos >= block->size / 2 ? ap_conn_rewind(core->conn, block->block, &pos) : 0;
    if (rc < 1)
        return;
    if (rc == 2)
        window_drop(reader);
    else
        reader->start = pos;
    reader->end = SHUT; /* until the core has answered */
}

/* What goes along with the question; large output goes before it, piece by piece. */
static int take_along(Core *core, const char **data, Py_ssize_t *size)
{
    *data = NULL;
    *size = 0;
    if (core->writer->size < VECTORED)
        return writer_join(core->writer, data, size);
    int64_t left; /* a failure is for those who write to learn */
    return core_send_pending(core, &left);
}

bool core_is_armed(int64_t result)
{
    return result == -EAGAIN || result == AP_EQUEUED;
}

/* The question has been answered: output went along only if it has to wait. */
static int went_along(Core *core, int64_t result, Py_ssize_t size)
{
    if (!core_is_armed(result) || size == 0 || forget(core, result == AP_EQUEUED) == 0)
        return 0;
    ap_conn_disarm_read(core->conn);
    return -1;
}

int core_ask(Core *core, Operation *op)
{
    const char *data;
    Py_ssize_t size;
    if (take_along(core, &data, &size) < 0)
        return -1;
    rewind_window(core);
    int64_t result = ask(core, op, data, size);
    if (result >= 0)
        return answered(core, op, result);
    if (!core_is_armed(result))
        return refused(core, op, result);
    return went_along(core, result, size) < 0 ? -1 : arm(core, op);
}

int64_t core_request(Core *core, bool fresh)
{
    const char *data;
    Py_ssize_t size;
    if (core->closed || !core->conn) {
        core_refuse(core);
        return INT64_MIN;
    }
    if (core_check_open(core) < 0 || take_along(core, &data, &size) < 0)
        return INT64_MIN;
    int64_t result =
        ap_conn_request(core->conn, (uint32_t)core->reader->start, fresh, data, (size_t)size);
    return went_along(core, result, size) < 0 ? INT64_MIN : result;
}

int core_begin(Core *core, Operation *op)
{
    if (core->reading) {
        PyErr_SetString(BusyResourceError, "reading from");
        return -1;
    }
    if (core->closed || !core->conn) {
        raise_closed(core);
        return -1;
    }
    op->deadline = core_deadline(core->read_timeout);
    if (op->deadline < 0)
        return -1;
    core->reading = true;
    op->reading = true;
    int late = core_owes(core);
    if (late < 0)
        return -1;
    if (!late && core->reader->budget > 0 && core->writer->size < core->writer->high_water)
        return core_ask(core, op);
    PyObject *deadline = PyLong_FromLongLong(op->deadline);
    if (deadline)
        op->inner = PyObject_CallMethodObjArgs((PyObject *)core, n__before_reading, deadline, NULL);
    Py_XDECREF(deadline);
    if (!op->inner)
        return -1;
    op->state = INNER;
    op->step = ASK;
    return 0;
}

/* After a wake-up. */
int core_resume(Core *core, Operation *op)
{
    Reader *reader = core->reader;
    op->suspended = true;
    if (core->closed) {
        raise_closed(core);
        return -1;
    }
    reader->budget = core->budget;
    bool known = op->end && !op->flags && !operation_finds(op);
    if (known && Py_TYPE(reader->view) == Block_Type) { /* unless a release() intervened */
        reader->end = op->end;
        op->state = OPEN;
        return 0;
    }
    return core_ask(core, op);
}

int core_refuse(Core *core)
{
    raise_closed(core);
    return -1;
}

int core_reopen(Core *core, Operation *op)
{
    op->state = OPEN;
    core->reading = false;
    op->reading = false;
    if (core->closed)
        return core_refuse(core);
    if (op->received || Py_TYPE(core->reader->view) == Block_Type) {
        core->reader->end = op->end;
        return 0;
    }
    PyObject *one = PyLong_FromLong(1); /* a release() intervened */
    PyObject *none =
        one ? PyObject_CallMethodObjArgs((PyObject *)core, n_fill_nowait, one, NULL) : NULL;
    Py_XDECREF(one);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

void core_stop_waiting(Core *core)
{
    hub_forget_wait(core);
    ap_conn_disarm_read(core->conn);
}

int core_skip(Core *core, Operation *op)
{
    Reader *reader = core->reader;
    int rc = ap_conn_consume(core->conn, (uint32_t)reader->start, (size_t)op->n);
    window_drop(reader);
    if (rc < 0)
        raise_ended(core, rc);
    return rc < 0 ? -1 : 0;
}
