/* Reading: what the calls of a reader take for arguments, how they begin, and what they return.
 *
 * A call that finds its bytes in the window asks nobody. Otherwise the core is asked (core.c); a
 * source that is no connection of ours (a wrapped stream, TLS) answers in Python.
 */
#include "native.h"

/* ---- arguments --------------------------------------------------------------- */

/* op->n from the argument: fast if it is plain, by Python's rules otherwise. */
static int take_count(Operation *op)
{
    PyObject *argument = op->argument;
    if (PyLong_CheckExact(argument)) {
        op->n = PyLong_AsSsize_t(argument);
        if (op->n > 0 && op->n <= op->reader->limit)
            return 0;
        PyErr_Clear();
    }
    PyObject *n = PyObject_CallMethodObjArgs((PyObject *)op->reader, n__count, argument, NULL);
    if (!n)
        return -1;
    op->n = PyLong_AsSsize_t(n);
    Py_DECREF(n);
    return op->n < 0 ? -1 : 0;
}

static int take_delimiter(Operation *op)
{
    bool plain = PyBytes_CheckExact(op->argument) && PyBytes_Size(op->argument) > 0;
    op->most = 65536;
    if (op->limit) {
        op->most = PyLong_CheckExact(op->limit) ? PyLong_AsSsize_t(op->limit) : -1;
        plain = plain && op->most >= 0 && op->most <= INT32_MAX;
        PyErr_Clear();
    }
    if (plain)
        return 0;
    PyObject *both = PyObject_CallMethodObjArgs((PyObject *)op->reader, n__until_arguments,
                                                op->argument, op->limit, NULL);
    if (!both)
        return -1;
    replace(&op->argument, PyTuple_GetItem(both, 0));
    op->most = PyLong_AsSsize_t(PyTuple_GetItem(both, 1));
    Py_DECREF(both);
    return PyErr_Occurred() ? -1 : 0;
}

static int take_most(Operation *op)
{
    op->most = PyLong_CheckExact(op->argument) ? PyLong_AsSsize_t(op->argument) : 0;
    op->n = 1;
    if (op->most >= 1)
        return 0;
    if (PyErr_Occurred()) { /* more than any memory */
        PyErr_Clear();
        op->most = PY_SSIZE_T_MAX;
    }
    PyObject *most =
        PyObject_CallMethodObjArgs((PyObject *)op->core, n__max_bytes, op->argument, NULL);
    if (!most)
        return -1;
    op->most = PyLong_AsSsize_t(most);
    if (PyErr_Occurred()) {
        PyErr_Clear();
        op->most = PY_SSIZE_T_MAX;
    }
    Py_DECREF(most);
    return 0;
}

static int take_arguments(Operation *op)
{
    switch (op->kind) {
    case UNTIL:
    case FIND: return take_delimiter(op);
    case RECEIVE: return take_most(op);
    default: return take_count(op);
    }
}

static bool is_in_window(const Operation *op)
{
    const Reader *reader = op->reader;
    switch (op->kind) {
    case PEEK:
    case NEXT:
    case SKIP:
    case READ_BYTES: return op->n > 0 && op->n <= reader->end - reader->start && reader->budget > 0;
    default: return false;
    }
}

/* A source that is not a connection of ours answers in Python. */
static int ask_source(Operation *op)
{
    PyObject *source = op->reader->source;
    if (!source) {
        PyErr_SetString(PyExc_AttributeError, "there is no source");
        return -1;
    }
    PyObject *number = PyLong_FromSsize_t(operation_finds(op) ? op->most : op->n);
    PyObject *flags = PyLong_FromLong(op->flags);
    if (number && flags)
        op->inner = operation_finds(op)
                        ? PyObject_CallMethodObjArgs(source, n_find, op->argument, number, NULL)
                        : PyObject_CallMethodObjArgs(source, n_fill, number, flags, NULL);
    Py_XDECREF(number);
    Py_XDECREF(flags);
    if (!op->inner)
        return -1;
    op->state = INNER;
    op->step = SOURCE;
    return 0;
}

int reading_begin(Operation *op)
{
    Reader *reader = op->reader;
    if (!reader) { /* made by __new__ alone */
        PyErr_SetString(PyExc_AttributeError, "there is no reader");
        return -1;
    }
    op->core = (Core *)Py_XNewRef((PyObject *)reader->core);
    if (take_arguments(op) < 0)
        return -1;
    if (is_in_window(op)) {
        reader->budget--;
        return 0;
    }
    if (op->kind == SKIP)
        op->flags |= AP_SCATTER;
    return op->core ? core_begin(op->core, op) : ask_source(op);
}

/* ---- results --------------------------------------------------------------- */

static PyObject *report(Core *core, PyObject *bytes)
{
    PyObject *none = bytes ? PyObject_CallMethodObjArgs((PyObject *)core, n__report, NULL) : NULL;
    if (!none)
        Py_CLEAR(bytes);
    Py_XDECREF(none);
    return bytes;
}

static PyObject *received(Operation *op)
{
    Reader *reader = op->reader;
    PyObject *straight = op->received;
    op->received = NULL;
    if (straight) {
        op->core->straight = 0;
        return straight;
    }
    long long start = reader->start, stop = reader->end;
    if (stop - start > op->most)
        stop = start + op->most;
    reader->start = stop;
    PyObject *bytes = window_bytes(reader->view, start, stop);
    return op->core->kind == AP_UNIX ? report(op->core, bytes) : bytes;
}

static PyObject *skipped(Operation *op)
{
    Reader *reader = op->reader;
    if (!(op->flags & AP_SCATTER)) {
        reader->start += op->n;
        Py_RETURN_NONE;
    }
    if (op->core) {
        if (core_skip(op->core, op) < 0)
            return NULL;
        Py_RETURN_NONE;
    }
    PyObject *n = PyLong_FromSsize_t(op->n);
    PyObject *none = n ? PyObject_CallMethodObjArgs(reader->source, n_consume, n, NULL) : NULL;
    Py_XDECREF(n);
    return none;
}

PyObject *reading_result(Operation *op)
{
    Reader *reader = op->reader;
    long long start = reader->start, stop = start + op->n;
    switch (op->kind) {
    case FILL: return PyBool_FromLong(op->suspended);
    case FIND: return PyLong_FromSsize_t(op->n);
    case RECEIVE: return received(op);
    case SKIP: return skipped(op);
    case PEEK: return window_slice(reader->view, start, stop);
    case READ_BYTES: reader->start = stop; return window_bytes(reader->view, start, stop);
    default: reader->start = stop; return window_slice(reader->view, start, stop);
    }
}
