/* What operations and drives share as coroutines. */
#include "native.h"

/* As an iterator and a coroutine have it: what is yielded, or StopIteration. */
PyObject *native_as_iterator(PySendResult how, PyObject *result)
{
    if (how != PYGEN_RETURN)
        return how == PYGEN_NEXT ? result : NULL;
    PyObject *stop = PyObject_CallFunctionObjArgs(PyExc_StopIteration, result, NULL);
    if (stop)
        PyErr_SetObject(PyExc_StopIteration, stop);
    Py_XDECREF(stop);
    Py_DECREF(result);
    return NULL;
}

/* PyErr_SetObject() would overwrite its __context__ by what is being handled here. */
void native_raise_again(PyObject *exception)
{
    PyErr_Restore(Py_NewRef((PyObject *)Py_TYPE(exception)), exception,
                  PyException_GetTraceback(exception));
}

void native_raise(PyObject *const *args, Py_ssize_t n)
{
    PyObject *type = args[0], *value = n > 1 && args[1] != Py_None ? args[1] : NULL;
    if (PyExceptionInstance_Check(type)) {
        native_raise_again(Py_NewRef(type));
        return;
    }
    if (!PyExceptionClass_Check(type)) {
        PyErr_SetString(PyExc_TypeError, "exceptions must be classes or instances");
        return;
    }
    if (value && PyExceptionInstance_Check(value) && n > 2 && args[2] != Py_None)
        PyException_SetTraceback(value, args[2]);
    PyErr_SetObject(type, value);
}

PySendResult native_throw(PyObject *inner, PyObject *const *args, Py_ssize_t n, PyObject **result)
{
    PyObject *second = n > 1 ? args[1] : NULL, *third = n > 2 ? args[2] : NULL;
    *result = PyObject_CallMethodObjArgs(inner, n_throw, args[0], second, third, NULL);
    if (*result)
        return PYGEN_NEXT;
    if (!PyErr_ExceptionMatches(PyExc_StopIteration))
        return PYGEN_ERROR;
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    *result = value ? PyObject_GetAttr(value, n_value) : NULL;
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(traceback);
    return *result ? PYGEN_RETURN : PYGEN_ERROR;
}

PyObject *native_take_exception(void)
{
    PyObject *type, *value, *traceback;
    PyErr_Fetch(&type, &value, &traceback);
    PyErr_NormalizeException(&type, &value, &traceback);
    if (traceback)
        PyException_SetTraceback(value, traceback);
    Py_XDECREF(type);
    Py_XDECREF(traceback);
    return value;
}

bool native_is_true(PyObject *object, PyObject *name)
{
    PyObject *value = PyObject_GetAttr(object, name);
    bool truth = value == Py_True;
    Py_XDECREF(value);
    return truth;
}
