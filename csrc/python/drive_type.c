/* The drive as a type: a coroutine, and what asyncio's tasks take for a future. */
#include "native.h"

PyTypeObject *Drive_Type;

static PyObject *send_method(PyObject *self, PyObject *value)
{
    PyObject *result;
    PySendResult how = drive_send(self, value, &result);
    return native_as_iterator(how, result);
}

static PyObject *iternext(PyObject *self)
{
    return send_method(self, Py_None);
}

static PyObject *throw_method(PyObject *self, PyObject *const *args, Py_ssize_t n)
{
    if (n < 1 || n > 3) {
        PyErr_SetString(PyExc_TypeError, "throw() takes an exception");
        return NULL;
    }
    PyObject *result = NULL;
    PySendResult how = drive_throw((Drive *)self, args, n, &result);
    return native_as_iterator(how, result);
}

static PyObject *get_loop(PyObject *self, PyObject *unused)
{
    return hub_loop(((Drive *)self)->hub);
}

/* ---- life -------------------------------------------------------------------------- */

static PyObject *make(PyTypeObject *type, PyObject *args, PyObject *kwargs)
{
    PyObject *hub, *inner;
    if (!PyArg_ParseTuple(args, "O!O", Hub_Type, &hub, &inner))
        return NULL;
    Drive *drive = (Drive *)PyType_GenericNew(type, NULL, NULL);
    if (!drive)
        return NULL;
    drive->blocking = -1;
    drive->hub = (Hub *)Py_NewRef(hub);
    drive->inner = inner == Py_None ? NULL : Py_NewRef(inner); /* a worker has none yet */
    return (PyObject *)drive;
}

static int traverse(PyObject *self, visitproc visit, void *arg)
{
    Drive *drive = (Drive *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT((PyObject *)drive->hub);
    Py_VISIT(drive->inner);
    Py_VISIT(drive->task);
    Py_VISIT(drive->outcome);
    Py_VISIT(drive->exception);
    Py_VISIT(drive->interrupt);
    Py_VISIT(drive->abort);
    Py_VISIT(drive->scopes);
    Py_VISIT((PyObject *)drive->pool);
    Py_VISIT((PyObject *)drive->job);
    Py_VISIT(drive->job_context);
    return future_visit((Future *)drive, visit, arg);
}

static int clear(PyObject *self)
{
    Drive *drive = (Drive *)self;
    drive_unlist(drive);
    drive->state = D_OVER;
    Py_CLEAR(drive->inner);
    Py_CLEAR(drive->task);
    Py_CLEAR(drive->outcome);
    Py_CLEAR(drive->exception);
    Py_CLEAR(drive->interrupt);
    Py_CLEAR(drive->abort);
    Py_CLEAR(drive->scopes);
    if (drive->pool)
        workers_stop_looking(drive);
    Py_CLEAR(drive->pool);
    Py_CLEAR(drive->job);
    Py_CLEAR(drive->job_context);
    future_drop((Future *)drive);
    Py_CLEAR(drive->hub);
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

static PyObject *itself(PyObject *self)
{
    return Py_NewRef(self);
}

static PyObject *repr(PyObject *self)
{
    static const char *const STATE[] = {"new",  "running", "waiting", "resting",
                                        "idle", "woken",   "waiting", "over"};
    Drive *drive = (Drive *)self;
    if (!drive->inner)
        return PyUnicode_FromFormat(drive->pool ? "<worker %s>" : "<handler %s>",
                                    STATE[drive->pool ? drive->state : D_OVER]);
    return PyUnicode_FromFormat("<handler %R %s>", drive->inner, STATE[drive->state]);
}

static PyMethodDef methods[] = {
    {"send", send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void (*)(void))throw_method, METH_FASTCALL, NULL},
    {"close", drive_close, METH_NOARGS, NULL},
    {"add_done_callback", (PyCFunction)(void (*)(void))drive_add_done_callback,
     METH_FASTCALL | METH_KEYWORDS, NULL},
    {"remove_done_callback", future_remove_done_callback, METH_O, NULL},
    {"cancel", (PyCFunction)(void (*)(void))drive_cancel, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", drive_result, METH_NOARGS, NULL},
    {"exception", drive_result, METH_NOARGS, NULL},
    {"done", drive_is_done, METH_NOARGS, NULL},
    {"cancelled", future_is_cancelled, METH_NOARGS, NULL},
    {"get_loop", get_loop, METH_NOARGS, NULL},
    {"_abort", drive_abort, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

/* Debuggers see the handler's coroutine in the place of the drive. */
#define FORWARD(name)                                                             \
    static PyObject *get_##name(PyObject *self, void *closure)                    \
    {                                                                             \
        PyObject *inner = ((Drive *)self)->inner;                                 \
        return inner ? PyObject_GetAttrString(inner, #name) : Py_NewRef(Py_None); \
    }

FORWARD(cr_await)
FORWARD(cr_code)
FORWARD(cr_frame)
FORWARD(cr_origin)
FORWARD(__name__)
FORWARD(__qualname__)

static PyObject *get_cr_running(PyObject *self, void *closure)
{
    return PyBool_FromLong(((Drive *)self)->state == D_RUNNING);
}

static PyObject *get_cr_suspended(PyObject *self, void *closure)
{
    uint8_t state = ((Drive *)self)->state;
    return PyBool_FromLong(state != D_NEW && state != D_RUNNING && state != D_OVER);
}

static PyGetSetDef properties[] = {
    {"_asyncio_future_blocking", future_get_blocking, future_set_blocking, NULL, NULL},
    {"__name__", get___name__, NULL, NULL, NULL},
    {"__qualname__", get___qualname__, NULL, NULL, NULL},
    {"cr_await", get_cr_await, NULL, NULL, NULL},
    {"cr_code", get_cr_code, NULL, NULL, NULL},
    {"cr_frame", get_cr_frame, NULL, NULL, NULL},
    {"cr_origin", get_cr_origin, NULL, NULL, NULL},
    {"cr_running", get_cr_running, NULL, NULL, NULL},
    {"cr_suspended", get_cr_suspended, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "Awaits a handler, and lets the hub resume it directly."},
    {Py_tp_new, make},
    {Py_tp_dealloc, dealloc},
    {Py_tp_traverse, traverse},
    {Py_tp_clear, clear},
    {Py_tp_repr, repr},
    {Py_tp_iter, itself},
    {Py_tp_iternext, iternext},
    {Py_am_await, itself},
    {Py_am_send, drive_send},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Drive_spec = {
    .name = "anypoll._native.Drive",
    .basicsize = sizeof(Drive),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = slots,
};
