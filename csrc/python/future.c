/* What operations and drives share as futures, for asyncio.
 *
 * A task that is given one leaves its wake-up (add_done_callback), asks for the result when that is
 * called, and may cancel. It differs from asyncio's Future in one way: the wake-up may be called at
 * once, in the task's context, which saves a round of the event loop. Only one task can wait.
 */
#include "native.h"

int future_visit(Future *future, visitproc visit, void *arg)
{
    Py_VISIT(future->wake);
    Py_VISIT(future->context);
    Py_VISIT(future->message);
    return 0;
}

void future_drop(Future *future)
{
    Py_CLEAR(future->wake);
    Py_CLEAR(future->context);
    Py_CLEAR(future->message);
}

/* ---- waking ---------------------------------------------------------------- */

/* The wake-up has failed before it could run: the loop calls it. A context cannot be entered twice,
 * as when an event loop runs within a task of another, nor without memory. */
static int wake_after_failure(Future *future, Hub *hub, PyObject *wake)
{
    PyErr_Clear();
    future->wake = Py_NewRef(wake);
    return future_wake_soon(future, hub);
}

int future_wake(Future *future, Hub *hub)
{
    PyObject *wake = future->wake, *context = Py_XNewRef(future->context), *none;
    if (!wake) {
        Py_XDECREF(context);
        return 0;
    }
    if (hub_leave_task(hub) < 0)
        PyErr_WriteUnraisable(NULL);
    future->wake = NULL;
    future->asked = false;
    none = context ? PyObject_CallMethodObjArgs(context, n_run, wake, (PyObject *)future, NULL)
                   : PyObject_CallFunctionObjArgs(wake, (PyObject *)future, NULL);
    int rc = none ? 0 : future->asked ? -1 : wake_after_failure(future, hub, wake);
    Py_DECREF(wake);
    Py_XDECREF(context);
    Py_XDECREF(none);
    return rc;
}

int future_wake_soon(Future *future, Hub *hub)
{
    PyObject *wake = future->wake;
    if (!wake)
        return 0; /* nobody listens yet: add_done_callback will find that it is over */
    future->wake = NULL;
    int rc = hub_call_soon(hub, wake, (PyObject *)future, future->context);
    if (rc < 0) /* a cancellation may still come */
        future->wake = wake;
    else
        Py_DECREF(wake);
    return rc;
}

/* ---- what a task calls -------------------------------------------------------- */

PyObject *future_listen(Future *future, Hub *hub, bool over, PyObject *const *args, Py_ssize_t n,
                        PyObject *names)
{
    if (n != 1 || future->wake) {
        PyErr_SetString(PyExc_RuntimeError, "only a task can wait for this, and only one");
        return NULL;
    }
    PyObject *context = names && PyTuple_Size(names) == 1 ? args[1] : NULL;
    if (over && hub_call_soon(hub, args[0], (PyObject *)future, context) < 0)
        return NULL;
    replace(&future->context, context);
    if (!over)
        future->wake = Py_NewRef(args[0]);
    Py_RETURN_NONE;
}

PyObject *future_remove_done_callback(PyObject *self, PyObject *callback)
{
    Future *future = (Future *)self;
    int same = future->wake ? PyObject_RichCompareBool(future->wake, callback, Py_EQ) : 0;
    if (same < 0)
        return NULL;
    if (same)
        Py_CLEAR(future->wake);
    return PyLong_FromLong(same);
}

PyObject *future_message(PyObject *args, PyObject *kwargs)
{
    static char *keywords[] = {"msg", NULL};
    PyObject *message = Py_None;
    return PyArg_ParseTupleAndKeywords(args, kwargs, "|O", keywords, &message) ? message : NULL;
}

PyObject *future_result(Future *future, bool over)
{
    future->asked = true;
    if (future->cancelled) {
        if (future->message == Py_None || !future->message)
            PyErr_SetNone(CancelledError);
        else
            PyErr_SetObject(CancelledError, future->message);
        return NULL;
    }
    if (!over) {
        PyErr_SetString(InvalidStateError, "the wait is not over");
        return NULL;
    }
    Py_RETURN_NONE;
}

PyObject *future_is_cancelled(PyObject *self, PyObject *unused)
{
    return PyBool_FromLong(((Future *)self)->cancelled);
}

PyObject *future_get_blocking(PyObject *self, void *closure)
{
    int8_t blocking = ((Future *)self)->blocking;
    return Py_NewRef(blocking < 0 ? Py_None : blocking ? Py_True : Py_False);
}

int future_set_blocking(PyObject *self, PyObject *value, void *closure)
{
    int truth = value ? PyObject_IsTrue(value) : 0;
    if (truth < 0)
        return -1;
    ((Future *)self)->blocking = (int8_t)truth;
    return 0;
}
