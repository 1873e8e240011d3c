/* receive() where much arrives: the bytes go straight from the socket into the object that the
 * caller gets, instead of into a block and from there into the object.
 *
 * The core decides (read.c): it says that nothing is buffered and that the socket is readable. So
 * the object is not allocated in vain. It is received before the checkpoint, which is for nothing
 * if the socket turns out to be empty: then receive() has to wait anyway. A cancellation at the
 * checkpoint puts the bytes back, for nothing may be lost. Until it returns they count as unread
 * (core->straight), or others would see the end of the stream before it.
 */
#include "native.h"

#include <errno.h>

#define AT_ONCE 65536 /* more would come from the kernel page by page: malloc maps it each time */

bool receive_may_go_straight(const Operation *op)
{
    return op->kind == RECEIVE && op->most >= AT_ONCE;
}

static PyObject *room; /* an object that an earlier call has not filled */

static PyObject *take_room(void)
{
    PyObject *bytes = room;
    room = NULL;
    return bytes ? bytes : PyBytes_FromStringAndSize(NULL, AT_ONCE);
}

/* The object, if the bytes fill it; otherwise a copy of them, for the limited API has no way to
 * shorten it. */
static PyObject *filled(PyObject *bytes, int64_t size)
{
    if (size == AT_ONCE)
        return bytes;
    PyObject *copy =
        size > 0 ? PyBytes_FromStringAndSize(PyBytes_AsString(bytes), (Py_ssize_t)size) : NULL;
    Py_XDECREF(room);
    room = bytes;
    return copy;
}

int receive_straight(Core *core, Operation *op)
{
    window_drop(core->reader);
    PyObject *bytes = take_room();
    if (!bytes)
        return -1;
    int64_t got = ap_conn_read_straight(core->conn, 0, PyBytes_AsString(bytes), AT_ONCE);
    op->received = filled(bytes, got);
    if (got <= 0)
        return got == -EAGAIN ? core_ask(core, op) : core_ended(core, got);
    if (!op->received)
        return -1;
    core->straight = got;
    return 0;
}

/* The call will not return them. Another thread than the loop's collects garbage, or the core was
 * cleared in a cycle with the call: then nobody will read any more. */
void receive_put_back(Operation *op)
{
    Core *core = op->core;
    PyObject *bytes = op->received;
    op->received = NULL;
    core->straight = 0;
    if (core->conn && core->hub && core->hub->thread == PyThread_get_thread_ident())
        (void)ap_conn_put_back(core->conn, PyBytes_AsString(bytes), (size_t)PyBytes_Size(bytes));
    Py_DECREF(bytes);
}
