/* receive() where much arrives: the bytes go straight from the socket into the object that the
 * caller gets, instead of into a block and from there into the object.
 *
 * The core decides (read.c): it says that nothing is buffered and that the socket is readable. So
 * the object is not allocated in vain. It is received before the checkpoint, which is for nothing
 * if the socket turns out to be empty: then receive() has to wait anyway. A cancellation at the
 * checkpoint puts the bytes back, for nothing may be lost.
 */
#include "native.h"

#include <errno.h>

#define AT_ONCE 65536 /* more would come from the kernel page by page: malloc maps it each time */

bool receive_may_go_straight(const Operation *op)
{
    return op->kind == RECEIVE && op->most >= AT_ONCE;
}

int receive_straight(Core *core, Operation *op)
{
    window_drop(core->reader);
    PyObject *bytes = PyBytes_FromStringAndSize(NULL, AT_ONCE);
    if (!bytes)
        return -1;
    int64_t got = ap_conn_read_straight(core->conn, 0, PyBytes_AsString(bytes), AT_ONCE);
    if (got <= 0) {
        Py_DECREF(bytes);
        return got == -EAGAIN ? core_ask(core, op) : core_ended(core, got);
    }
    if (got < AT_ONCE && _PyBytes_Resize(&bytes, (Py_ssize_t)got) < 0)
        return -1;
    op->received = bytes;
    return 0;
}

/* The call will not return them. Another thread than the loop's collects garbage, or the core was
 * cleared in a cycle with the call: then nobody will read any more. */
void receive_put_back(Operation *op)
{
    Core *core = op->core;
    PyObject *bytes = op->received;
    op->received = NULL;
    if (core->conn && core->hub && core->hub->thread == PyThread_get_thread_ident())
        (void)ap_conn_put_back(core->conn, PyBytes_AsString(bytes), (size_t)PyBytes_Size(bytes));
    Py_DECREF(bytes);
}
