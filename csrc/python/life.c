/* The birth and the end of a connection: opening it in the core, closing it there.
 *
 * A Core owns its connection in the core, and gives it back when it is deallocated, not before:
 * in a garbage cycle everything is finalised before anything is cleared, so the finaliser of a
 * forgotten connection still finds the slot its own.
 *
 * Closing is for everybody who may be waiting. The window and the writer are shut, the slot is
 * closed, the hub forgets the number, and a waiting operation is woken in the next round: a close
 * is often user code's doing, which must not run in the middle of other user code.
 */
#include "native.h"

/* _open(poller, fd, high_water): 0, or a negative code; the descriptor is the core's at 0. */
PyObject *core_open(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    Core *core = (Core *)self;
    if (n != 3 || !core->hub || core->conn) {
        PyErr_SetString(PyExc_TypeError, "_open() takes a poller, a descriptor and a number");
        return NULL;
    }
    ap_poller *poller = PyLong_AsVoidPtr(args[0]);
    int fd = (int)PyLong_AsLong(args[1]);
    uint32_t high = (uint32_t)PyLong_AsUnsignedLong(args[2]);
    if (!poller && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "there is no poller");
    if (PyErr_Occurred() || hub_check_attached(core->hub) < 0)
        return NULL;
    ap_conn *conn;
    int rc = ap_conn_new(poller, core->hub->hub, fd, core->kind, high, &conn);
    if (rc < 0)
        return PyLong_FromLong(rc);
    core->conn = conn;
    core->number = ap_conn_id(conn);
    if (hub_add_core(core->hub, core) < 0) {
        ap_conn_close(conn, 0, 1); /* the descriptor is the caller's again */
        return NULL;
    }
    return PyLong_FromLong(0);
}

static PyObject *as_list(const int *results, Py_ssize_t n)
{
    PyObject *list = PyList_New(n);
    for (Py_ssize_t i = 0; list && i < n; i++) {
        PyObject *result = PyLong_FromLong(results[i]);
        if (!result || PyList_SetItem(list, i, result) < 0)
            Py_CLEAR(list);
    }
    return list;
}

/* register(cores): 0 or a negative errno for each. */
PyObject *core_register_all(PyObject *module, PyObject *cores)
{
    Py_ssize_t n = PyList_Check(cores) ? PyList_Size(cores) : -1;
    ap_conn **conns = n < 0 ? NULL : PyMem_Calloc((size_t)n + 1, sizeof *conns);
    int *results = n < 0 ? NULL : PyMem_Calloc((size_t)n + 1, sizeof *results);
    bool right = conns && results;
    for (Py_ssize_t i = 0; right && i < n; i++) {
        PyObject *core = PyList_GetItem(cores, i);
        right = PyObject_TypeCheck(core, Core_Type) && (conns[i] = ((Core *)core)->conn);
    }
    PyObject *list = NULL;
    if (right && ap_conn_register(conns, results, (int)n) <= n)
        list = as_list(results, n);
    else if (n >= 0 && !(conns && results))
        PyErr_NoMemory();
    else
        PyErr_SetString(PyExc_TypeError, "register() takes a list of open cores");
    PyMem_Free(conns);
    PyMem_Free(results);
    return list;
}

static int shut_writer(Writer *writer)
{
    if (writer->size > 0 || writer->reserved_size > 0) {
        PyObject *none = PyObject_CallMethodObjArgs((PyObject *)writer, n__close, NULL);
        Py_XDECREF(none);
        return none ? 0 : -1;
    }
    writer->shut = true;
    return 0;
}

static int wake(Core *core)
{
    Operation *op = hub_take_wait(core);
    if (!op)
        return 0;
    operation_ready(op, 0);
    int rc = operation_wake_soon(op);
    Py_DECREF((PyObject *)op);
    return rc;
}

/* _end(reset, keep_fd): as ap_conn_close. */
PyObject *core_end(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    Core *core = (Core *)self;
    int reset = n == 2 ? PyObject_IsTrue(args[0]) : -1,
        keep = n == 2 ? PyObject_IsTrue(args[1]) : -1;
    if (reset < 0 || keep < 0 || !core->conn) {
        PyErr_SetString(PyExc_TypeError, "_end() takes two flags");
        return NULL;
    }
    int rc, failed = 0;
    core->closed = core->over = true;
    if (core->reader)
        window_close(core->reader);
    if (core->writer)
        failed |= shut_writer(core->writer);
    if (core->hub)
        hub_remove_core(core->hub, core);
    Py_BEGIN_ALLOW_THREADS /* close(2) may linger */
        rc = ap_conn_close(core->conn, reset, keep);
    Py_END_ALLOW_THREADS failed |= wake(core);
    return failed ? NULL : PyLong_FromLong(rc);
}

/* Whether closing loses nothing: everything is sent, and no input would make it a reset. If not, it
 * has begun to linger, without a deadline yet. */
PyObject *core_may_close(PyObject *self, PyObject *unused)
{
    Core *core = (Core *)self;
    if (core_check_open(core) < 0)
        return NULL;
    bool sent = core->writer->size == 0 && !core->writing && ap_conn_queued(core->conn) == 0;
    return PyBool_FromLong(sent &&
                           ap_conn_linger(core->conn, (uint32_t)core->reader->start, 0) == 0);
}

/* The bytes received, and sent. */
PyObject *core_traffic(PyObject *self, PyObject *unused)
{
    ap_conn_stats stats = {0};
    if (core_check_open((Core *)self) < 0)
        return NULL;
    ap_conn_statistics(((Core *)self)->conn, 0, &stats); /* zeroes in the child of a fork */
    return Py_BuildValue("KK", (unsigned long long)stats.bytes_received,
                         (unsigned long long)stats.bytes_sent);
}

/* The pointer for cffi, made when it is first asked for. */
PyObject *core_handle(PyObject *self, void *closure)
{
    Core *core = (Core *)self;
    if (!core->handle && !core->conn)
        PyErr_SetString(PyExc_AttributeError, "handle");
    else if (!core->handle) {
        PyObject *address = PyLong_FromVoidPtr(core->conn);
        core->handle =
            address ? PyObject_CallMethodObjArgs(self, n__make_handle, address, NULL) : NULL;
        Py_XDECREF(address);
    }
    return Py_XNewRef(core->handle);
}
