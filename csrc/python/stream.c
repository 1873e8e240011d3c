/* A connection's own calls: peek(), next(), ... are its reader's, for short; receive() and send()
 * are AnyIO's. Message sockets have the latter in Python. */
#include "native.h"

PyTypeObject *Stream_Type;

static PyObject *read_call(PyObject *self, PyObject *n, enum kind kind)
{
    return (PyObject *)operation_new(kind, ((Stream *)self)->reader, n);
}

static PyObject *peek(PyObject *self, PyObject *n)
{
    return read_call(self, n, PEEK);
}

static PyObject *next(PyObject *self, PyObject *n)
{
    return read_call(self, n, NEXT);
}

static PyObject *skip(PyObject *self, PyObject *n)
{
    return read_call(self, n, SKIP);
}

static PyObject *until(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    return reader_until((PyObject *)((Stream *)self)->reader, args, n, names);
}

/* ---- AnyIO's stream ------------------------------------------------------ */

/* The connection's, if it carries a stream; otherwise NULL. */
static Core *core_of(PyObject *self)
{
    Reader *reader = ((Stream *)self)->reader;
    return reader ? reader->core : NULL;
}

static PyObject *call_python(PyObject *self, PyObject *method, PyObject *argument)
{
    Reader *reader = ((Stream *)self)->reader;
    PyObject *core = reader && reader->source ? reader->source : Py_None;
    return PyObject_CallMethodObjArgs(core, method, argument, NULL);
}

/* The one argument of a call, by position or by name; or the default; or NULL with an exception. */
static PyObject *only(PyObject *const *args, Py_ssize_t n, PyObject *names, const char *name,
                      PyObject *otherwise)
{
    Py_ssize_t named = names ? PyTuple_Size(names) : 0;
    if (n + named == 0 && otherwise)
        return otherwise;
    if (n == 1 && named == 0)
        return args[0];
    if (n == 0 && named == 1 &&
        PyUnicode_CompareWithASCIIString(PyTuple_GetItem(names, 0), name) == 0)
        return args[0];
    PyErr_Format(PyExc_TypeError, "the only argument is %s", name);
    return NULL;
}

static PyObject *receive(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    PyObject *most = only(args, n, names, "max_bytes", usual_most);
    if (!most)
        return NULL;
    if (!core_of(self))
        return call_python(self, n_receive, most);
    return (PyObject *)operation_new(RECEIVE, ((Stream *)self)->reader, most);
}

static PyObject *send(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    PyObject *item = only(args, n, names, "item", NULL);
    if (!item)
        return NULL;
    Core *core = core_of(self);
    return core ? send_new(SEND, core, item, 0) : call_python(self, n_send, item);
}

/* As AnyIO's, but without a coroutine around receive(): async for takes one for each piece. */
static PyObject *anext(PyObject *self)
{
    if (!core_of(self)) /* a socket of messages */
        return PyObject_CallMethodObjArgs(self, n__next_message, NULL);
    Operation *op = operation_new(RECEIVE, ((Stream *)self)->reader, usual_most);
    if (op)
        op->iterates = true;
    return (PyObject *)op;
}

/* ---- members ------------------------------------------------------------- */

static PyObject *get_reader(PyObject *self, void *closure)
{
    PyObject *reader = (PyObject *)((Stream *)self)->reader;
    if (!reader)
        PyErr_SetString(PyExc_AttributeError, "_reader");
    return Py_XNewRef(reader);
}

static int set_reader(PyObject *self, PyObject *value, void *closure)
{
    if (!value || !PyObject_TypeCheck(value, Reader_Type)) {
        PyErr_SetString(PyExc_TypeError, "_reader must be a Reader");
        return -1;
    }
    Stream *stream = (Stream *)self;
    PyObject *old = (PyObject *)stream->reader;
    stream->reader = (Reader *)Py_NewRef(value);
    Py_XDECREF(old);
    return 0;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)((Stream *)self)->reader);
    return 0;
}

static int clear(PyObject *self)
{
    Py_CLEAR(((Stream *)self)->reader);
    return 0;
}

/* A core, its reader and its writer refer to one another, for each may be kept without the others.
 * Mostly nobody has kept any: then a closed connection takes them along, and they need not wait for
 * the garbage collector. */
static void part(Reader *reader)
{
    if (!reader || !reader->source || !PyObject_TypeCheck(reader->source, Core_Type))
        return;
    Core *core = (Core *)reader->source;
    if (!core->over || core->reader != reader || !core->writer || Py_REFCNT((PyObject *)core) > 2 ||
        Py_REFCNT((PyObject *)reader) > 2 || Py_REFCNT((PyObject *)core->writer) > 1)
        return;
    Py_CLEAR(core->writer);
    Py_CLEAR(core->reader);
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    part(((Stream *)self)->reader);
    clear(self);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"peek", peek, METH_O,
     "peek($self, n, /)\n--\n\n"
     "``n`` contiguous bytes, left unread: :meth:`anypoll.nocopy.Reader.peek`."},
    {"next", next, METH_O,
     "next($self, n, /)\n--\n\n"
     "``n`` contiguous bytes, consumed: :meth:`anypoll.nocopy.Reader.next`."},
    {"skip", skip, METH_O,
     "skip($self, n, /)\n--\n\n"
     "Consumes ``n`` bytes: :meth:`anypoll.nocopy.Reader.skip`."},
    {"until", (PyCFunction)(void (*)(void))until, METH_FASTCALL | METH_KEYWORDS,
     "until($self, delimiter, *, max_bytes=65536)\n--\n\n"
     "The bytes through the delimiter, consumed: :meth:`anypoll.nocopy.Reader.until`."},
    {"receive", (PyCFunction)(void (*)(void))receive, METH_FASTCALL | METH_KEYWORDS,
     "receive($self, max_bytes=65536)\n--\n\n"
     "Receives at least one and at most ``max_bytes`` bytes, as soon as there are any. A\n"
     "checkpoint.\n"
     "\n"
     ":raises EndOfStream: when the peer has ended its side\n"
     ":raises ReadTimeout: after ``read_timeout`` seconds; nothing is lost\n"
     ":raises BrokenResourceError: after a reset, with the ``OSError`` as its cause\n"
     ":raises ClosedResourceError: if the connection is closed, before or during the call\n"
     ":raises BusyResourceError: while another task is reading\n"
     ":raises ValueError, TypeError: if ``max_bytes`` is below 1, or not an integer"},
    {"send", (PyCFunction)(void (*)(void))send, METH_FASTCALL | METH_KEYWORDS,
     "send($self, item)\n--\n\n"
     "Sends the writer's pending output, then ``item``. A checkpoint, taken after the\n"
     "write: in a cancelled scope nothing is sent.\n"
     "\n"
     "Returns when the kernel has everything; ``item`` may be changed then. If the call is\n"
     "cancelled or times out before a byte of ``item`` was sent, none will be; if part of it was\n"
     "sent, the rest still goes out, before anything sent later.\n"
     "\n"
     ":param item: bytes, or anything bytes-like\n"
     ":raises WriteTimeout: after ``write_timeout`` seconds\n"
     ":raises BrokenResourceError: if the peer has gone, with the ``OSError`` as its cause\n"
     ":raises ClosedResourceError: if the connection is closed, before or during the call, or\n"
     "    after ``send_eof()``\n"
     ":raises BusyResourceError: while another task is sending\n"
     ":raises TypeError: if ``item`` is not bytes-like\n"
     ":raises ValueError: if ``item`` is not contiguous"},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"_reader", get_reader, set_reader, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The hot part of a connection's surface."},
    {Py_tp_new, PyType_GenericNew},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_am_anext, anext},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Stream_spec = {
    .name = "anypoll._native.Stream",
    .basicsize = sizeof(Stream),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
