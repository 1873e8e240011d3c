/* The operation as a type: what asyncio's tasks take for a future, and what debuggers see. */
#include "native.h"

PyTypeObject *Operation_Type;

/* ---- the protocol of a coroutine, as Python calls it ------------------------------- */

static PyObject *send_method(PyObject *self, PyObject *value)
{
    PyObject *result;
    PySendResult how = operation_send(self, value, &result);
    return native_as_iterator(how, result);
}

static PyObject *iternext(PyObject *self)
{
    return send_method(self, Py_None);
}

/* ---- the protocol of a future, for asyncio --------------------------------------- */

void operation_ready(Operation *op, int64_t end)
{
    op->state = READY;
    op->end = end;
}

static int reschedule(Operation *op)
{
    Hub *hub = op->core->hub;
    PyObject *task = op->wake;
    op->wake = NULL;
    PyObject *none = PyObject_CallFunctionObjArgs(hub->reschedule, task, hub->value, NULL);
    Py_DECREF(task);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

int operation_wake(Operation *op)
{
    if (!op->wake)
        return 0;
    return op->core->hub->trio ? reschedule(op) : future_wake((Future *)op, op->core->hub);
}

/* On Trio. A task that runs has yet to come to the trap that it was given: it would be scheduled
 * twice if it was cancelled there. */
static int reschedule_blocked(Operation *op)
{
    Hub *hub = op->core->hub;
    if (!op->wake || !hub_is_current_task(hub, op->wake))
        return operation_wake(op);
    PyObject *none =
        PyObject_CallMethodObjArgs((PyObject *)hub, n__wake_later, (PyObject *)op, op->wake, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

int operation_wake_soon(Operation *op)
{
    if (op->wake && Py_TYPE(op->wake) == Drive_Type)
        return drive_resume_soon((Drive *)op->wake);
    return op->core->hub->trio ? reschedule_blocked(op)
                               : future_wake_soon((Future *)op, op->core->hub);
}

static PyObject *wake_method(PyObject *self, PyObject *unused)
{
    if (operation_wake((Operation *)self) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *add_done_callback(PyObject *self, PyObject *const *args, Py_ssize_t n,
                                   PyObject *names)
{
    Operation *op = (Operation *)self;
    if (op->state != ARMED && op->state != READY && op->state != YIELDED) {
        PyErr_SetString(PyExc_RuntimeError, "only a task can wait for this, and only one");
        return NULL;
    }
    return future_listen((Future *)op, op->core->hub, op->state != ARMED, args, n, names);
}

static PyObject *cancel(PyObject *self, PyObject *args, PyObject *kwargs)
{
    Operation *op = (Operation *)self;
    PyObject *message = future_message(args, kwargs);
    if (!message)
        return NULL;
    if (op->state != ARMED && op->state != READY)
        Py_RETURN_FALSE;
    op->cancelled = true;
    replace(&op->message, message);
    Py_INCREF(self);
    hub_forget_wait(op->core);
    op->state = READY;
    int rc = operation_wake_soon(op); /* unless that is on its way; it may have failed before */
    Py_DECREF(self);
    if (rc < 0)
        return NULL;
    Py_RETURN_TRUE;
}

static PyObject *result(PyObject *self, PyObject *unused)
{
    Operation *op = (Operation *)self;
    return future_result((Future *)op, op->state != ARMED);
}

static PyObject *is_done(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(((Operation *)self)->state != ARMED);
}

static PyObject *get_loop(PyObject *self, PyObject *unused)
{
    Operation *op = (Operation *)self;
    return op->core ? hub_loop(op->core->hub) : Py_NewRef(Py_None);
}

/* ---- what debuggers see ------------------------------------------------------------ */

static PyObject *get_name(PyObject *self, void *closure)
{
    return PyUnicode_FromString(operation_names[((Operation *)self)->kind]);
}

static PyObject *repr(PyObject *self)
{
    static const char *const STATE[] = {"new",      "running", "waiting", "woken",
                                        "yielding", "open",    "over"};
    Operation *op = (Operation *)self;
    if (op->kind >= SEND)
        return PyUnicode_FromFormat("<%s() %s>", operation_names[op->kind], STATE[op->state]);
    return PyUnicode_FromFormat("<%s(%R) %s>", operation_names[op->kind], op->argument,
                                STATE[op->state]);
}

static PyObject *itself(PyObject *self)
{
    return Py_NewRef(self);
}

static PyMethodDef methods[] = {
    {"send", send_method, METH_O, NULL},
    {"throw", (PyCFunction)(void (*)(void))operation_throw, METH_FASTCALL, NULL},
    {"close", operation_close, METH_NOARGS, NULL},
    {"add_done_callback", (PyCFunction)(void (*)(void))add_done_callback,
     METH_FASTCALL | METH_KEYWORDS, NULL},
    {"remove_done_callback", future_remove_done_callback, METH_O, NULL},
    {"cancel", (PyCFunction)(void (*)(void))cancel, METH_VARARGS | METH_KEYWORDS, NULL},
    {"result", result, METH_NOARGS, NULL},
    {"exception", result, METH_NOARGS, NULL},
    {"done", is_done, METH_NOARGS, NULL},
    {"cancelled", future_is_cancelled, METH_NOARGS, NULL},
    {"get_loop", get_loop, METH_NOARGS, NULL},
    {"_wake", wake_method, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef properties[] = {
    {"_asyncio_future_blocking", future_get_blocking, future_set_blocking, NULL, NULL},
    {"__name__", get_name, NULL, NULL, NULL},
    {"__qualname__", get_name, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_doc, "A call that may have to wait; it is awaited once."},
    {Py_tp_dealloc, operation_dealloc},
    {Py_tp_traverse, operation_traverse},
    {Py_tp_clear, operation_clear},
    {Py_tp_repr, repr},
    {Py_tp_iter, itself},
    {Py_tp_iternext, iternext},
    {Py_am_await, itself},
    {Py_am_send, operation_send},
    {Py_tp_methods, methods},
    {Py_tp_getset, properties},
    {0, NULL},
};

PyType_Spec Operation_spec = {
    .name = "anypoll._native.Operation",
    .basicsize = sizeof(Operation),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    .slots = slots,
};
