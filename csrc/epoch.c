/* The fork epoch: a generation counter of the process.
 *
 * The child has one thread. A mutex that a poller or another loop held at the
 * moment of the fork stays locked there forever, and epoll and event descriptors
 * are shared with the parent: an EPOLL_CTL_DEL in the child silences the
 * parent's connection. So every object carries the epoch it was created in, and
 * each entry point first compares that, and returns -ECHILD on a mismatch.
 */
#include "epoch.h"

#include "gate.h"
#include "sysio.h"

_Atomic uint32_t ap_epoch = 1;

/* Runs in the child before fork() returns, so even where Python's hooks do not run. */
static void in_child(void)
{
    atomic_fetch_add_explicit(&ap_epoch, 1, memory_order_relaxed);
    ap_gate_reset(); /* gate.c waits for others before a fork */
}

static _Atomic bool watched; /* (a) relaxed: twice does no harm, the epoch moves on by two */

int ap_epoch_watch(void)
{
    if (atomic_load_explicit(&watched, memory_order_relaxed))
        return 0;
    int rc = ap_sys_atfork(ap_gate_shut, ap_gate_open, in_child);
    if (rc == 0)
        atomic_store_explicit(&watched, true, memory_order_relaxed);
    return rc;
}
