/* A connection's own peek(), next(), ...: its reader's, for short. */
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

static PyObject *get_reader(PyObject *self, void *closure)
{
    return Py_XNewRef((PyObject *)((Stream *)self)->reader);
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

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
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
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Stream_spec = {
    .name = "anypoll._native.Stream",
    .basicsize = sizeof(Stream),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
