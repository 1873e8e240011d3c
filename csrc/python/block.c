/* A block of received bytes as an object with a buffer: what is behind every view.
 *
 * The object holds one of the core's references to its block, so the block is recycled when
 * the last view dies, in whichever thread that happens. As long as a reader alone holds the
 * object, there is no view, and the core may fill the block anew (ap_conn_rewind).
 */
#include "native.h"

PyTypeObject *Block_Type;

PyObject *Block_new(ap_block *block, uint32_t size)
{
    Block *self = PyObject_New(Block, Block_Type);
    if (!self) {
        ap_block_unref(block);
        return NULL;
    }
    self->block = block;
    self->first = 0;
    self->last = self->size = size;
    return (PyObject *)self;
}

static void dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    ap_block_unref(((Block *)self)->block);
    PyObject_Free(self);
    Py_DECREF(type);
}

static int getbuffer(PyObject *self, Py_buffer *view, int flags)
{
    Block *block = (Block *)self;
    return PyBuffer_FillInfo(view, self, (char *)block->block + block->first,
                             (Py_ssize_t)(block->last - block->first), 1, flags);
}

/* One view of just these bytes costs less than a view of the whole and a slice of it. On CPython
 * 3.11 the garbage collector may run in the middle of making it, and with it anybody's finaliser,
 * which may take views of the same block, or have the window let go of it. */
PyObject *window_slice(PyObject *view, long long start, long long stop)
{
    PyObject *slice;
    Py_INCREF(view);
    if (Py_TYPE(view) == Block_Type) {
        Block *block = (Block *)view;
        uint32_t first = block->first, last = block->last; /* of a view that is being made */
        block->first = (uint32_t)start;
        block->last = (uint32_t)stop;
        slice = PyMemoryView_FromObject(view);
        block->first = first;
        block->last = last;
    } else {
        slice = PySequence_GetSlice(view, (Py_ssize_t)start, (Py_ssize_t)stop);
    }
    Py_DECREF(view);
    return slice;
}

PyObject *window_whole(PyObject *view)
{
    return Py_TYPE(view) == Block_Type ? window_slice(view, 0, ((Block *)view)->size)
                                       : Py_NewRef(view);
}

PyObject *window_bytes(PyObject *view, long long start, long long stop)
{
    if (Py_TYPE(view) == Block_Type)
        return PyBytes_FromStringAndSize((char *)((Block *)view)->block + start,
                                         (Py_ssize_t)(stop - start));
    Py_buffer buffer;
    if (PyObject_GetBuffer(view, &buffer, PyBUF_SIMPLE) < 0)
        return NULL;
    PyObject *bytes =
        PyBytes_FromStringAndSize((char *)buffer.buf + start, (Py_ssize_t)(stop - start));
    PyBuffer_Release(&buffer);
    return bytes;
}

static PyType_Slot slots[] = {
    {Py_tp_doc, "The memory of received bytes, read-only."},
    {Py_tp_dealloc, dealloc},
    {Py_bf_getbuffer, getbuffer},
    {0, NULL},
};

PyType_Spec Block_spec = {
    .name = "anypoll._native.Block",
    .basicsize = sizeof(Block),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
