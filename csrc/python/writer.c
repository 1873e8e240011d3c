/* Collecting output: the one call of a writer that happens for every request.
 *
 * Nothing is sent here. The pieces wait in a list until the reader waits, or somebody flushes.
 */
#include "native.h"

#define REFERENCED 4096 /* bytes objects above this are never joined with their neighbours */

PyTypeObject *Writer_Type;

static bool is_empty(PyObject *list)
{
    return !list || PyList_Size(list) <= 0;
}

static PyObject *write_method(PyObject *self, PyObject *data)
{
    Writer *writer = (Writer *)self;
    PyObject *bytes = PyBytes_CheckExact(data)
                          ? Py_NewRef(data)
                          : PyObject_CallMethodObjArgs(self, n__as_bytes, data, NULL);
    if (!bytes)
        return NULL;
    PyObject *result = NULL, *none = NULL;
    if (writer->shut)
        none = PyObject_CallMethodObjArgs(self, n__refuse, NULL);
    else if (!is_empty(writer->reserved))
        none = PyObject_CallMethodObjArgs(self, n__seal, NULL);
    else
        none = Py_NewRef(Py_None);
    if (none && PyList_Append(writer->pieces, bytes) == 0) {
        Py_ssize_t size = PyBytes_Size(bytes);
        writer->size += size;
        result = PyLong_FromSsize_t(size);
    }
    Py_XDECREF(none);
    Py_DECREF(bytes);
    if (result && writer->size >= writer->high_water) {
        none = PyObject_CallMethodObjArgs(self, n__stands_high, NULL);
        if (!none)
            Py_CLEAR(result);
        Py_XDECREF(none);
    }
    return result;
}

/* ---- taking it ---------------------------------------------------------- */

static int append_run(PyObject *list, PyObject *pieces, Py_ssize_t first, Py_ssize_t last)
{
    if (last - first == 1)
        return PyList_Append(list, PyList_GetItem(pieces, first));
    PyObject *run = PyList_GetSlice(pieces, first, last), *one = NULL;
    if (run)
        one = PyObject_CallMethodObjArgs(empty_bytes, n_join, run, NULL);
    int rc = one ? PyList_Append(list, one) : -1;
    Py_XDECREF(run);
    Py_XDECREF(one);
    return rc;
}

/* A separate piece costs more than a few bytes. */
PyObject *writer_gather(PyObject *pieces, Py_ssize_t most)
{
    PyObject *list = PyList_New(0);
    Py_ssize_t first = 0, size = 0, count = PyList_Size(pieces);
    int rc = list ? 0 : -1;
    for (Py_ssize_t i = 0; i < count && rc == 0; i++) {
        PyObject *piece = PyList_GetItem(pieces, i);
        Py_ssize_t n = PyBytes_CheckExact(piece) ? PyBytes_Size(piece) : PY_SSIZE_T_MAX;
        bool alone = n > REFERENCED;
        if (first < i && (alone || n > most - size)) {
            rc = append_run(list, pieces, first, i);
            first = i;
            size = 0;
        }
        if (alone && rc == 0) {
            rc = PyList_Append(list, piece);
            first = i + 1;
        } else {
            size += n;
        }
    }
    if (rc == 0 && first < count)
        rc = append_run(list, pieces, first, count);
    if (rc < 0)
        Py_CLEAR(list);
    return list;
}

PyObject *writer_take(Writer *writer)
{
    PyObject *pieces = writer->pieces, *rest = PyList_New(0);
    if (rest && PyList_Size(pieces) > 1)
        pieces = writer_gather(pieces, PY_SSIZE_T_MAX);
    else
        Py_INCREF(pieces);
    if (!rest || !pieces) {
        Py_XDECREF(rest);
        Py_XDECREF(pieces);
        return NULL;
    }
    Py_DECREF(writer->pieces);
    writer->pieces = rest;
    writer->size = 0;
    return pieces;
}

static PyObject *take(PyObject *self, PyObject *unused)
{
    return writer_take((Writer *)self);
}

static PyObject *flush(PyObject *self, PyObject *unused)
{
    PyObject *sink = ((Writer *)self)->sink;
    if (sink && PyObject_TypeCheck(sink, Core_Type))
        return send_new(FLUSH, (Core *)sink, Py_None, 0);
    return PyObject_CallMethodObjArgs(sink ? sink : Py_None, n_flush, NULL);
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Writer *writer = (Writer *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(writer->pieces);
    Py_VISIT(writer->reserved);
    Py_VISIT(writer->sink);
    return 0;
}

static int clear(PyObject *self)
{
    Writer *writer = (Writer *)self;
    Py_CLEAR(writer->pieces);
    Py_CLEAR(writer->reserved);
    Py_CLEAR(writer->sink);
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

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    Writer *writer = (Writer *)PyType_GenericNew(type, NULL, NULL);
    if (writer && !(writer->pieces = PyList_New(0)))
        Py_CLEAR(writer);
    return (PyObject *)writer;
}

static PyMethodDef methods[] = {
    {"write", write_method, METH_O,
     "write($self, data, /)\n--\n\n"
     "Appends ``data``; returns its length in bytes.\n\n"
     "``bytes`` are kept by reference, anything else is copied.\n\n"
     ":raises TypeError: if ``data`` is not bytes-like"},
    {"flush", flush, METH_NOARGS,
     "flush($self, /)\n--\n\n"
     "Returns when the kernel has everything that was written.\n\n"
     ":raises WriteTimeout: if that takes longer than ``write_timeout``; the rest stays pending\n"
     ":raises BrokenResourceError: with the ``OSError`` as its cause\n"
     ":raises ClosedResourceError: if the connection is closed, before or during the call\n"
     ":raises BusyResourceError: while another task is sending"},
    {"_take", take, METH_NOARGS,
     "Removes and returns the pending output as a list; small neighbours are joined."},
    {NULL, NULL, 0, NULL},
};

/* pieces must be a list, which a member of type object could not promise */
static PyObject *get_pieces(PyObject *self, void *closure)
{
    return Py_NewRef(((Writer *)self)->pieces);
}

static int set_pieces(PyObject *self, PyObject *value, void *closure)
{
    if (!value || !PyList_CheckExact(value)) {
        PyErr_SetString(PyExc_TypeError, "_pieces must be a list");
        return -1;
    }
    replace(&((Writer *)self)->pieces, value);
    return 0;
}

static PyGetSetDef properties[] = {
    {"_pieces", get_pieces, set_pieces, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyMemberDef members[] = {
    {"_size", T_LONGLONG, offsetof(Writer, size), 0, NULL},
    {"_reserved", T_OBJECT, offsetof(Writer, reserved), 0, NULL},
    {"_core", T_OBJECT_EX, offsetof(Writer, sink), 0, NULL},
    {"_reserved_size", T_LONGLONG, offsetof(Writer, reserved_size), 0, NULL},
    {"_high_water", T_LONGLONG, offsetof(Writer, high_water), 0, NULL},
    {"_shut", T_BOOL, offsetof(Writer, shut), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "The hot part of a writer."},
    {Py_tp_new, make},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_methods, methods},
    {Py_tp_members, members},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Writer_spec = {
    .name = "anypoll._native.Writer",
    .basicsize = sizeof(Writer),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
