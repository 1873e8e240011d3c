/* Collecting output: the one call of a writer that happens for every request.
 *
 * Nothing is sent here. The pieces wait in a list until the reader waits, or somebody flushes.
 *
 * A reply is small, mostly: an object and a place in the list would cost more than its bytes. So
 * small writes are copied into a tail, which follows the pieces and becomes one of them before
 * anything else is appended; Python, which asks for _pieces, never sees it. It is an object of
 * bytes, for the core may have queued a part of it, and then somebody has to hold it. A writer has
 * one only while output is pending: an idle connection has no such memory.
 */
#include "native.h"

#define REFERENCED 4096 /* bytes objects above this are never joined with their neighbours */
#define SMALL 1024      /* data up to this size is copied into the tail */
#define TAIL 4032       /* bytes in it; with the object's head it is just less than a page */
#define SPARE 64        /* tails kept for the next writers */

PyTypeObject *Writer_Type;

static bool is_empty(PyObject *list)
{
    return !list || PyList_Size(list) <= 0;
}

/* ---- the tail ------------------------------------------------------------- */

static PyObject *spare[SPARE];
static int spare_count;

/* A LinkBuffer, which has no sink, gathers its pieces in blocks of its own. */
static bool is_small(const Writer *writer, Py_ssize_t size)
{
    return size <= SMALL && writer->sink;
}

static bool has_tail(Writer *writer)
{
    if (writer->tail)
        return true;
    writer->tail = spare_count > 0 ? spare[--spare_count] : PyBytes_FromStringAndSize(NULL, TAIL);
    writer->used = 0;
    return writer->tail;
}

static void drop_tail(Writer *writer)
{
    PyObject *tail = writer->tail;
    writer->tail = NULL;
    writer->used = 0;
    if (tail && spare_count < SPARE)
        spare[spare_count++] = tail;
    else
        Py_XDECREF(tail);
}

/* Makes it a piece. */
static int seal_tail(Writer *writer)
{
    if (writer->used == 0)
        return 0;
    PyObject *piece = PyBytes_FromStringAndSize(PyBytes_AsString(writer->tail), writer->used);
    int rc = piece ? PyList_Append(writer->pieces, piece) : -1;
    Py_XDECREF(piece);
    if (rc == 0)
        drop_tail(writer);
    return rc;
}

static int copy_to_tail(Writer *writer, const void *data, Py_ssize_t size)
{
    if (size == 0)
        return 0;
    if (size > TAIL - writer->used && seal_tail(writer) < 0)
        return -1;
    if (!has_tail(writer))
        return -1;
    memcpy(PyBytes_AsString(writer->tail) + writer->used, data, (size_t)size);
    writer->used += size;
    return 0;
}

/* ---- writing -------------------------------------------------------------- */

/* Nothing is appended after the end, or before an open reservation is. */
static int prepare(Writer *writer)
{
    if (!writer->shut && is_empty(writer->reserved))
        return 0;
    PyObject *none =
        PyObject_CallMethodObjArgs((PyObject *)writer, writer->shut ? n__refuse : n__seal, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

static PyObject *appended(Writer *writer, Py_ssize_t size)
{
    writer->size += size;
    if (writer->size >= writer->high_water) {
        PyObject *none = PyObject_CallMethodObjArgs((PyObject *)writer, n__stands_high, NULL);
        if (!none)
            return NULL;
        Py_DECREF(none);
    }
    return PyLong_FromSsize_t(size);
}

static PyObject *append_piece(Writer *writer, PyObject *piece, Py_ssize_t size)
{
    if (prepare(writer) < 0 || seal_tail(writer) < 0 || PyList_Append(writer->pieces, piece) < 0)
        return NULL;
    return appended(writer, size);
}

static PyObject *append_memory(Writer *writer, const void *data, Py_ssize_t size)
{
    if (is_small(writer, size)) {
        if (prepare(writer) < 0 || copy_to_tail(writer, data, size) < 0)
            return NULL;
        return appended(writer, size);
    }
    PyObject *bytes = PyBytes_FromStringAndSize(data, size);
    PyObject *result = bytes ? append_piece(writer, bytes, size) : NULL;
    Py_XDECREF(bytes);
    return result;
}

/* A view of its own, if the memory is of a block, whose bytes nobody changes; otherwise NULL. It
 * pins the block, so it has to be a good part of it. */
static PyObject *view_of_block(const Writer *writer, PyObject *view, const Py_buffer *buffer)
{
    if (buffer->len <= REFERENCED || !writer->sink)
        return NULL;
    PyObject *owner = PyObject_GetAttr(view, n_obj), *part = NULL;
    if (owner && Py_TYPE(owner) == Block_Type) {
        Block *block = (Block *)owner;
        long long start = (char *)buffer->buf - (char *)block->block;
        if (buffer->len >= block->size / 4)
            part = window_slice(owner, start, start + buffer->len);
    }
    Py_XDECREF(owner);
    PyErr_Clear();
    return part;
}

static PyObject *append_view(Writer *writer, PyObject *view, const Py_buffer *buffer)
{
    PyObject *part = view_of_block(writer, view, buffer);
    if (!part)
        return append_memory(writer, buffer->buf, buffer->len);
    PyObject *result = append_piece(writer, part, buffer->len);
    Py_DECREF(part);
    return result;
}

static PyObject *write_method(PyObject *self, PyObject *data)
{
    Writer *writer = (Writer *)self;
    Py_buffer buffer;
    if (PyMemoryView_Check(data) && PyObject_GetBuffer(data, &buffer, PyBUF_SIMPLE) == 0) {
        PyObject *result = append_view(writer, data, &buffer);
        PyBuffer_Release(&buffer);
        return result;
    }
    PyErr_Clear(); /* a view with gaps, which Python copies */
    PyObject *bytes = PyBytes_CheckExact(data)
                          ? Py_NewRef(data)
                          : PyObject_CallMethodObjArgs(self, n__as_bytes, data, NULL);
    if (!bytes)
        return NULL;
    PyObject *result = is_small(writer, PyBytes_Size(bytes))
                           ? append_memory(writer, PyBytes_AsString(bytes), PyBytes_Size(bytes))
                           : append_piece(writer, bytes, PyBytes_Size(bytes));
    Py_DECREF(bytes);
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

static int empty(Writer *writer)
{
    PyObject *rest = PyList_New(0), *pieces = writer->pieces;
    if (!rest)
        return -1;
    writer->pieces = rest;
    writer->size = 0;
    Py_DECREF(pieces);
    return 0;
}

int writer_join(Writer *writer, const char **data, Py_ssize_t *size)
{
    PyObject *pieces = writer->pieces;
    *size = writer->used;
    *data = writer->used ? PyBytes_AsString(writer->tail) : NULL;
    if (writer->size == writer->used)
        return 0;
    if (seal_tail(writer) < 0)
        return -1;
    if (PyList_Size(pieces) > 1 || !PyBytes_CheckExact(PyList_GetItem(pieces, 0))) {
        PyObject *one = PyObject_CallMethodObjArgs(empty_bytes, n_join, pieces, NULL);
        if (!one || PyList_SetSlice(pieces, 0, PyList_Size(pieces), NULL) < 0 ||
            PyList_Append(pieces, one) < 0) {
            Py_XDECREF(one);
            return -1;
        }
        Py_DECREF(one);
    }
    char *bytes;
    if (PyBytes_AsStringAndSize(PyList_GetItem(pieces, 0), &bytes, size) < 0)
        return -1;
    *data = bytes;
    return 0;
}

int writer_forget(Writer *writer)
{
    if (PyList_Size(writer->pieces) > 0)
        return empty(writer);
    drop_tail(writer);
    writer->size = 0;
    return 0;
}

PyObject *writer_hand_over(Writer *writer)
{
    if (writer->used) { /* there are no pieces: a view tells how much of the tail is output */
        PyObject *tail = writer->tail, *view, *part = NULL;
        Py_ssize_t used = writer->used;
        writer->tail = NULL;
        writer->used = 0;
        view = PyMemoryView_FromObject(tail);
        if (view)
            part = PySequence_GetSlice(view, 0, used);
        Py_XDECREF(view);
        int rc = part ? PyList_Append(writer->pieces, part) : -1;
        Py_XDECREF(part);
        if (rc < 0)
            return NULL; /* the tail is lost, not freed: it is still needed */
        Py_DECREF(tail);
    }
    PyObject *pieces = Py_NewRef(writer->pieces);
    if (empty(writer) < 0)
        Py_CLEAR(pieces);
    return pieces;
}

PyObject *writer_take(Writer *writer)
{
    if (seal_tail(writer) < 0)
        return NULL;
    PyObject *pieces = PyList_Size(writer->pieces) > 1
                           ? writer_gather(writer->pieces, PY_SSIZE_T_MAX)
                           : Py_NewRef(writer->pieces);
    if (pieces && empty(writer) < 0)
        Py_CLEAR(pieces);
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
    drop_tail(writer);
    writer->size = 0;
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
     "Large ``bytes``, and large views that a reader has returned, are kept by reference;\n"
     "anything else is copied.\n\n"
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
    Writer *writer = (Writer *)self;
    return seal_tail(writer) < 0 ? NULL : Py_NewRef(writer->pieces);
}

static int set_pieces(PyObject *self, PyObject *value, void *closure)
{
    if (!value || !PyList_CheckExact(value)) {
        PyErr_SetString(PyExc_TypeError, "_pieces must be a list");
        return -1;
    }
    Writer *writer = (Writer *)self;
    drop_tail(writer);
    replace(&writer->pieces, value);
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
