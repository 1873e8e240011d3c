/* The window of a reader, and the calls that look for bytes in it.
 *
 * The window is view[start:end]: bytes that may be handed out without asking anybody. A call that
 * finds its bytes there costs one view. Otherwise the reader's source is asked to open the window
 * further: a connection by core.c, anything else (a wrapped stream, TLS) by its own fill() and
 * find(). An end of SHUT closes the window to every request: while somebody waits, after the close,
 * when output stands high.
 */
#include "native.h"

PyTypeObject *Reader_Type;

static PyObject *call(PyObject *self, PyObject *n, enum kind kind)
{
    return (PyObject *)operation_new(kind, (Reader *)self, n);
}

static PyObject *peek(PyObject *self, PyObject *n)
{
    return call(self, n, PEEK);
}

static PyObject *next(PyObject *self, PyObject *n)
{
    return call(self, n, NEXT);
}

static PyObject *skip(PyObject *self, PyObject *n)
{
    return call(self, n, SKIP);
}

static PyObject *read_bytes(PyObject *self, PyObject *n)
{
    return call(self, n, READ_BYTES);
}

/* until(delimiter, *, max_bytes=65536) */
PyObject *reader_until(PyObject *self, PyObject *const *args, Py_ssize_t n, PyObject *names)
{
    PyObject *delimiter = n == 1 ? args[0] : NULL, *limit = NULL;
    bool wrong = n > 1;
    for (Py_ssize_t i = 0; names && i < PyTuple_Size(names); i++) {
        PyObject *name = PyTuple_GetItem(names, i), *value = args[n + i];
        if (PyUnicode_CompareWithASCIIString(name, "max_bytes") == 0)
            limit = value;
        else if (!delimiter && PyUnicode_CompareWithASCIIString(name, "delimiter") == 0)
            delimiter = value;
        else
            wrong = true;
    }
    if (wrong || !delimiter) {
        PyErr_SetString(PyExc_TypeError, "until() takes a delimiter, and max_bytes by keyword");
        return NULL;
    }
    Operation *op = operation_new(UNTIL, (Reader *)self, delimiter);
    if (op)
        op->limit = Py_XNewRef(limit);
    return (PyObject *)op;
}

void window_drop(Reader *reader)
{
    reader->start = reader->end = 0;
    replace(&reader->view, empty_view);
}

void window_close(Reader *reader)
{
    window_drop(reader);
    reader->end = SHUT;
}

/* ---- members ------------------------------------------------------------ */

static PyObject *get_source(PyObject *self, void *closure)
{
    PyObject *source = ((Reader *)self)->source;
    return Py_NewRef(source ? source : Py_None);
}

static int set_source(PyObject *self, PyObject *value, void *closure)
{
    Reader *reader = (Reader *)self;
    PyObject *old = reader->source;
    reader->source = Py_XNewRef(value);
    reader->core = NULL;
    if (value && PyObject_TypeCheck(value, Core_Type) && ((Core *)value)->kind != AP_SEQPACKET)
        reader->core = (Core *)value;
    Py_XDECREF(old);
    return 0;
}

static PyObject *get_view(PyObject *self, void *closure)
{
    PyObject *view = ((Reader *)self)->view;
    return view ? window_whole(view) : Py_NewRef(Py_None);
}

static int set_view(PyObject *self, PyObject *value, void *closure)
{
    Reader *reader = (Reader *)self;
    replace(&reader->view, value ? value : empty_view);
    return 0;
}

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Reader *reader = (Reader *)PyType_GenericNew(type, NULL, NULL);
    if (reader)
        reader->view = Py_NewRef(empty_view);
    return (PyObject *)reader;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Reader *reader = (Reader *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(reader->source);
    Py_VISIT(reader->view);
    return 0;
}

static int clear(PyObject *self)
{
    Reader *reader = (Reader *)self;
    reader->core = NULL;
    Py_CLEAR(reader->source);
    window_drop(reader);
    return 0;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    Py_DECREF(((Reader *)self)->view);
    PyObject_GC_Del(self);
    Py_DECREF(type);
}

static PyMethodDef methods[] = {
    {"peek", peek, METH_O, "peek($self, n, /)\n--\n\n``n`` contiguous bytes, left unread."},
    {"next", next, METH_O, "next($self, n, /)\n--\n\n``n`` contiguous bytes, consumed."},
    {"skip", skip, METH_O, "skip($self, n, /)\n--\n\nConsumes ``n`` bytes."},
    {"read_bytes", read_bytes, METH_O,
     "read_bytes($self, n, /)\n--\n\n``n`` bytes, consumed, as a copy."},
    {"until", (PyCFunction)(void (*)(void))reader_until, METH_FASTCALL | METH_KEYWORDS,
     "until($self, delimiter, *, max_bytes=65536)\n--\n\n"
     "The bytes through the delimiter, consumed.\n\n"
     ":param delimiter: one or more bytes; they may lie in different blocks\n"
     ":param max_bytes: how far to look, the delimiter included\n"
     ":raises DelimiterNotFound: if it is not within the first ``max_bytes`` bytes, however they\n"
     "    arrived; nothing is consumed then\n"
     ":raises TypeError, ValueError: if the delimiter is empty or not bytes-like"},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef members[] = {
    {"_start", T_LONGLONG, offsetof(Reader, start), 0, NULL},
    {"_end", T_LONGLONG, offsetof(Reader, end), 0, NULL},
    {"_budget", T_LONG, offsetof(Reader, budget), 0, NULL},
    {"_limit", T_LONGLONG, offsetof(Reader, limit), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"_core", get_source, set_source, NULL, NULL},
    {"_view", get_view, set_view, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The hot part of a nocopy reader."},
    {Py_tp_new, make},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Reader_spec = {
    .name = "anypoll._native.Reader",
    .basicsize = sizeof(Reader),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
