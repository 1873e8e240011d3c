/* The turn of an event loop that drives its poller: the callback on the poller's descriptor.
 *
 * A method of the hub, called for each batch of events, so it takes the loop no interpreted frame.
 *
 * When the batch is dealt with, the loop looks for the next one before it goes on (loan.c): but
 * only if nobody has to wait for that. All tasks that were woken wait for one of our operations
 * again, and no other can be seen in the loop's queue, as far as there is access to it (uvloop's
 * is hidden). Nor does it look in the turn that follows one that has left something to others: Trio
 * takes its queue as a whole and in any order, so they may come after us. Only here
 * and where a connection is closed (life.c) do the native types release the GIL.
 */
#include "native.h"

#include <errno.h>

static ap_poller *poller_of(PyObject *loan)
{
    PyObject *address = PyObject_GetAttr(loan, n_address);
    void *poller = address ? PyLong_AsVoidPtr(address) : NULL;
    Py_XDECREF(address);
    if (!poller && !PyErr_Occurred())
        PyErr_SetString(PyExc_ValueError, "there is no poller");
    return poller;
}

/* asyncio's loop ends with the callbacks that are ready when it is stopped. */
static bool is_stopping(const Hub *hub)
{
    if (hub->trio || !hub->loop)
        return false;
    bool stopping = native_is_true(PyWeakref_GetObject(hub->loop), n__stopping);
    PyErr_Clear();
    return stopping;
}

Py_ssize_t hub_sees_queue(const Hub *hub)
{
    if (!hub->queue || hub->queue == Py_None)
        return -1;
    PyObject *queue = PyWeakref_GetObject(hub->queue);
    Py_ssize_t size = queue != Py_None ? PySequence_Size(queue) : -1;
    return size == 0 && is_stopping(hub) ? 1 : size;
}

/* Trio takes its queue as a whole, and whom it has yet to step is in a variable of its loop alone.
 */
static bool batch_is_done(const Hub *hub)
{
    if (!hub->frame || hub->frame == Py_None)
        return false;
    PyObject *locals = PyObject_GetAttr(hub->frame, n_f_locals);
    PyObject *batch = locals ? PyObject_GetItem(locals, n_batch) : NULL;
    bool done = batch && PyList_Check(batch) && PyList_Size(batch) == 0;
    if (locals && PyDict_CheckExact(locals)) /* a copy, which would keep tasks alive */
        PyDict_Clear(locals);
    Py_XDECREF(batch);
    Py_XDECREF(locals);
    PyErr_Clear();
    return done;
}

bool hub_is_alone(const Hub *hub)
{
    return hub_sees_queue(hub) == 0 && (!hub->trio || batch_is_done(hub));
}

static int look_again(Hub *hub, ap_poller *poller, ap_token *tokens)
{
    int n = ap_hub_look(hub->hub, poller, tokens, BATCH);
    if (n != -EAGAIN)
        return n;
    Py_BEGIN_ALLOW_THREADS;
    n = ap_hub_spin(hub->hub, poller, tokens, BATCH);
    Py_END_ALLOW_THREADS;
    ap_hub_spun(hub->hub, poller);
    return n;
}

/* The loan may be over, or the poller have failed. Nothing else would bring the loop once more. */
static int tell_if_over(Hub *hub, PyObject *loan, ap_poller *poller, int n)
{
    if (n >= 0 && ap_hub_drives(hub->hub, poller))
        return 0;
    PyObject *none = PyObject_CallMethodObjArgs((PyObject *)hub, n__loan_is_over, loan, NULL);
    Py_XDECREF(none);
    return none ? 0 : -1;
}

PyObject *hub_drive(PyObject *self, PyObject *loan)
{
    Hub *hub = (Hub *)self;
    ap_token tokens[BATCH];
    ap_poller *poller = poller_of(loan);
    if (hub_check_attached(hub) < 0 || !poller)
        return NULL;
    bool may_look = !hub->crowded;
    hub->crowded = false;
    PyObject *left = NULL;
    int n = ap_hub_drive(hub->hub, poller, tokens, BATCH);
    for (;;) {
        if (tell_if_over(hub, loan, poller, n) < 0)
            hub_keep_exception(&left);
        if (n <= 0)
            break;
        size_t armed = hub->armed;
        int more = hub_deliver(hub, tokens, n, false);
        if (more < 0) {
            hub_keep_exception(&left);
            break;
        }
        hub->crowded = more || hub->armed < armed || hub_sees_queue(hub) > 0;
        if (hub->crowded || !may_look)
            break;
        n = look_again(hub, poller, tokens);
    }
    if (hub_raise_first(hub, left) < 0)
        return NULL;
    Py_RETURN_NONE;
}
