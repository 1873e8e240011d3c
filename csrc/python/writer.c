/* Collecting output: the one call of a writer that happens for every request.
 *
 * Nothing is sent here. The pieces wait in a list until the reader waits, or somebody flushes.
 */
#include "native.h"

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

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Writer *writer = (Writer *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(writer->pieces);
    Py_VISIT(writer->reserved);
    return 0;
}

static int clear(PyObject *self)
{
    Writer *writer = (Writer *)self;
    Py_CLEAR(writer->pieces);
    Py_CLEAR(writer->reserved);
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
