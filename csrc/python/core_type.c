/* The core of a connection as a type: its methods and members, and what it keeps alive. */
#include "native.h"

PyTypeObject *Core_Type;

static PyObject *fill(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    long flags = n == 2 ? PyLong_AsLong(args[1]) : 0;
    if (PyErr_Occurred())
        return NULL;
    if (n < 1 || n > 2) {
        PyErr_SetString(PyExc_TypeError, "fill() takes n, and flags");
        return NULL;
    }
    Operation *op = operation_new(FILL, ((Core *)self)->reader, args[0]);
    if (op)
        op->flags = (uint8_t)flags;
    return (PyObject *)op;
}

static PyObject *find_delimiter(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 2) {
        PyErr_SetString(PyExc_TypeError, "find() takes a delimiter and max_bytes");
        return NULL;
    }
    Operation *op = operation_new(FIND, ((Core *)self)->reader, args[0]);
    if (op)
        op->limit = Py_NewRef(args[1]);
    return (PyObject *)op;
}

static PyObject *receive(PyObject *self, PyObject *most)
{
    return (PyObject *)operation_new(RECEIVE, ((Core *)self)->reader, most);
}

static PyObject *send_call(PyObject *self, PyObject *item)
{
    return send_new(SEND, (Core *)self, item, 0);
}

static PyObject *flush(PyObject *self, PyObject *unused)
{
    return send_new(FLUSH, (Core *)self, Py_None, 0);
}

static PyObject *flush_claimed(PyObject *self, PyObject *unused)
{
    return send_new(FLUSH, (Core *)self, Py_None, CLAIMED);
}

static PyObject *send_pending(PyObject *self, PyObject *unused)
{
    int64_t left;
    if (core_check_open((Core *)self) < 0 || core_send_pending((Core *)self, &left) < 0)
        return NULL;
    return PyLong_FromLongLong(left);
}

static PyObject *send_pieces(PyObject *self, PyObject *pieces)
{
    int64_t left;
    if (!PyList_Check(pieces)) {
        PyErr_SetString(PyExc_TypeError, "pieces must be a list");
        return NULL;
    }
    if (core_check_open((Core *)self) < 0 || core_send((Core *)self, pieces, &left) < 0)
        return NULL;
    return PyLong_FromLongLong(left);
}

static PyObject *keep(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (n != 2 || !PyList_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "_keep() takes a list and a number");
        return NULL;
    }
    long long left = PyLong_AsLongLong(args[1]);
    if (PyErr_Occurred() || core_check_open((Core *)self) < 0 ||
        core_keep((Core *)self, args[0], left) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *show_window(PyObject *self, PyObject *unused)
{
    if (core_check_open((Core *)self) < 0 || core_show((Core *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Core *core = (Core *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)core->hub);
    Py_VISIT((PyObject *)core->reader);
    Py_VISIT((PyObject *)core->writer);
    Py_VISIT(core->limits);
    Py_VISIT(core->read_timeout);
    Py_VISIT(core->write_timeout);
    Py_VISIT(core->trap);
    Py_VISIT(core->raw);
    Py_VISIT(core->requests);
    Py_VISIT(core->watcher);
    Py_VISIT(core->callbacks);
    Py_VISIT(core->session);
    return 0;
}

/* A thread may be computing a handshake with what the session keeps: rather lose it than free it
 * too early. That thread may be in a callback that waits for Python. */
static void drop_session(Core *core)
{
    PyObject *session = core->session;
    int rc = 0;
    core->session = NULL;
    if (!session)
        return;
    if (core->conn) {
        Py_BEGIN_ALLOW_THREADS rc = ap_conn_settle_tls(core->conn);
        Py_END_ALLOW_THREADS
    }
    if (rc == 0)
        Py_DECREF(session);
}

static int clear(PyObject *self)
{
    Core *core = (Core *)self;
    if (core->hub) { /* the collector may come here before it comes to the hub */
        hub_forget_wait(core);
        hub_remove_core(core->hub, core);
    }
    Py_CLEAR(core->hub);
    Py_CLEAR(core->reader);
    Py_CLEAR(core->writer);
    Py_CLEAR(core->limits);
    Py_CLEAR(core->read_timeout);
    Py_CLEAR(core->write_timeout);
    Py_CLEAR(core->trap);
    Py_CLEAR(core->idle_timeout);
    Py_CLEAR(core->handle);
    Py_CLEAR(core->poller);
    Py_CLEAR(core->peer);
    Py_CLEAR(core->raw);
    Py_CLEAR(core->name);
    Py_CLEAR(core->requests);
    Py_CLEAR(core->watcher);
    Py_CLEAR(core->callbacks);
    drop_session(core);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    if (((Core *)self)->conn)
        ap_conn_release(((Core *)self)->conn);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"_open", (PyCFunction)(void (*)(void))core_open, METH_FASTCALL,
     "_open($self, poller, fd, high_water, /)\n--\n\n"
     "Opens the connection in the core, on the poller of that address. 0, or a negative code."},
    {"_end", (PyCFunction)(void (*)(void))core_end, METH_FASTCALL,
     "_end($self, reset, keep_fd, /)\n--\n\n"
     "Closes it there, and everything towards its user. As ``conn_close``."},
    {"_may_close", core_may_close, METH_NOARGS,
     "Whether a close loses nothing; if not, lingering has begun, without a deadline."},
    {"_traffic", core_traffic, METH_NOARGS, "The bytes received, and sent."},
    {"_show", show_window, METH_NOARGS, "Opens the window on a new block."},
    {"_send", send_pieces, METH_O,
     "Sends the pieces; returns the number of bytes queued, or a negative code."},
    {"_send_pending", send_pending, METH_NOARGS, "The same with what the writer has."},
    {"_keep", (PyCFunction)(void (*)(void))keep, METH_FASTCALL,
     "_keep($self, pieces, left, /)\n--\n\n"
     "Keeps the pieces that the core has queued (``left`` bytes) until it is done with them."},
    {"send", send_call, METH_O,
     "send($self, item, /)\n--\n\n"
     "Sends the writer's pending output, then ``item``; returns when the kernel has it all.\n\n"
     "A checkpoint: in a cancelled scope nothing is sent; else it yields after the write, unless\n"
     "it had to wait. If it is cancelled or times out before a byte of ``item`` was sent, none\n"
     "ever will be; else the rest is copied and goes before later data."},
    {"flush", flush, METH_NOARGS,
     "flush($self, /)\n--\n\n"
     "Returns when the kernel has everything that was written.\n\n"
     ":raises WriteTimeout: after ``write_timeout``; what is left is still pending"},
    {"flush_claimed", flush_claimed, METH_NOARGS,
     "flush_claimed($self, /)\n--\n\n``flush()`` for the holder of the claim."},
    {"fill", (PyCFunction)(void (*)(void))fill, METH_FASTCALL,
     "fill($self, n, flags=0, /)\n--\n\n"
     "Waits for ``n`` unread bytes, and opens the window on them unless ``SCATTER`` is set.\n"
     "Returns whether the task was suspended.\n\n"
     ":raises EndOfStream, IncompleteRead: if the peer ends its side first\n"
     ":raises ReadTimeout: after ``read_timeout``\n"
     ":raises BrokenResourceError, ClosedResourceError, BusyResourceError: as AnyIO's streams do"},
    {"find", (PyCFunction)(void (*)(void))find_delimiter, METH_FASTCALL,
     "find($self, delimiter, max_bytes, /)\n--\n\n"
     "Waits for the delimiter, and opens the window on the bytes through it, whose number it\n"
     "returns.\n\n"
     ":raises DelimiterNotFound: if it is not within the first ``max_bytes``"},
    {"receive", receive, METH_O,
     "receive($self, max_bytes, /)\n--\n\n"
     "At least one byte, copied; always a checkpoint.\n\n"
     ":raises EndOfStream: when the peer has ended"},
    {NULL, NULL, 0, NULL},
};

#define OBJECT(name, field) {name, T_OBJECT, offsetof(Core, field), 0, NULL}
#define FLAG(name, field) {name, T_BOOL, offsetof(Core, field), 0, NULL}

static PyMemberDef members[] = {
    {"number", T_ULONGLONG, offsetof(Core, number), READONLY, NULL},
    {"kind", T_INT, offsetof(Core, kind), 0, NULL},
    {"failure", T_INT, offsetof(Core, failure), 0, NULL},
    {"budget", T_LONG, offsetof(Core, budget), 0, NULL},
    {"_straight", T_LONGLONG, offsetof(Core, straight), READONLY, NULL},
    FLAG("closed", closed),
    FLAG("draining", draining),
    FLAG("_reading", reading),
    FLAG("_writing", writing),
    FLAG("_flushing", flushing),
    FLAG("_over", over),
    FLAG("held", held),
    OBJECT("limits", limits),
    OBJECT("idle_timeout", idle_timeout),
    OBJECT("poller", poller),
    OBJECT("peer", peer),
    OBJECT("raw", raw),
    OBJECT("name", name),
    OBJECT("requests", requests),
    OBJECT("watcher", watcher),
    OBJECT("callbacks", callbacks),
    OBJECT("session", session),
    OBJECT("read_timeout", read_timeout),
    OBJECT("write_timeout", write_timeout),
    {NULL, 0, 0, 0, NULL},
};

/* Members of one of our own types, or of a class that is based on it. */
#define TYPED(name, field, type)                                            \
    static PyObject *get_##field(PyObject *self, void *closure)             \
    {                                                                       \
        PyObject *value = (PyObject *)((Core *)self)->field;                \
        if (!value)                                                         \
            PyErr_SetString(PyExc_AttributeError, #field);                  \
        return Py_XNewRef(value);                                           \
    }                                                                       \
    static int set_##field(PyObject *self, PyObject *value, void *closure)  \
    {                                                                       \
        if (!value || !PyObject_TypeCheck(value, type)) {                   \
            PyErr_SetString(PyExc_TypeError, #field " is of another type"); \
            return -1;                                                      \
        }                                                                   \
        PyObject *old = (PyObject *)((Core *)self)->field;                  \
        ((Core *)self)->field = (name *)Py_NewRef(value);                   \
        Py_XDECREF(old);                                                    \
        return 0;                                                           \
    }

TYPED(Hub, hub, Hub_Type)
TYPED(Reader, reader, Reader_Type)
TYPED(Writer, writer, Writer_Type)

static PyGetSetDef properties[] = {
    {"handle", core_handle, NULL, NULL, NULL},
    {"hub", get_hub, set_hub, NULL, NULL},
    {"reader", get_reader, set_reader, NULL, NULL},
    {"writer", get_writer, set_writer, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The hot part of a connection."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Core_spec = {
    .name = "anypoll._native.Core",
    .basicsize = sizeof(Core),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
