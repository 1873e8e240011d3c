/* A gate that fork() shuts: for calls of a library that has locks of its own.
 *
 * The core's own locks do no harm in the child of a fork, which never takes them (epoch.c).
 * A library's do. Its objects belong to Python as well, which goes on using them in the
 * child (an SSL_CTX), or are the library's own. If one of our threads is inside of the
 * library at the moment of the fork, the child has the lock, and not the thread that would
 * release it. So fork() waits until none is inside, and lets none in until it is over.
 * That is about threads of ours that run without the GIL. Whoever forks in Python has it,
 * so nobody else who has it is inside; but that one may enter all the same.
 *
 * One word has both counts, of threads that fork and of those inside, and each side adds
 * to it before it looks at the other's: its order of changes decides who comes first. The
 * order of memory (acquire, release) is for the library's locks, which are to be seen
 * released. Both sides wait by looking again: a computation takes a millisecond, as does
 * copying the tables of a process, and nothing that waits for that is left behind in a
 * child.
 *
 * The gate is the last of all locks. Somebody who enters it with a slot's mutex may have
 * to wait for a fork, which waits for those inside: if one of these wanted that mutex,
 * nobody would go on. So who computes without the mutex enters when it has let go of it,
 * and takes it again after it has left. That is why jobs.c does not enter around a job.
 *
 * A fork waits a second at most. Those inside may need what the forking thread has: if a
 * callback in Python runs inside, it waits for the GIL. That child has the small risk
 * that all would have without the gate; without an end to the wait, both would hang.
 */
#include "gate.h"

#include "clock.h"

#include <unistd.h>

#define PATIENCE ((int64_t)1000 * 1000 * 1000)
#define PAUSE 50 /* µs */

_Atomic uint32_t ap_gate;

void ap_gate_wait(void)
{
    atomic_fetch_sub_explicit(&ap_gate, 1, memory_order_relaxed); /* it has not been inside */
    while (atomic_load_explicit(&ap_gate, memory_order_relaxed) >= AP_GATE_FORK)
        usleep(PAUSE);
}

static bool is_empty(void)
{
    /* acquire; pairs with the release in ap_gate_leave */
    return atomic_load_explicit(&ap_gate, memory_order_acquire) % AP_GATE_FORK == 0;
}

void ap_gate_shut(void)
{
    /* relaxed: the look at the same word comes after it */
    atomic_fetch_add_explicit(&ap_gate, AP_GATE_FORK, memory_order_relaxed);
    for (int64_t until = ap_now() + PATIENCE; !is_empty() && ap_now() < until;)
        usleep(PAUSE);
}

void ap_gate_open(void)
{
    /* release; pairs with the acquire in ap_gate_enter */
    atomic_fetch_sub_explicit(&ap_gate, AP_GATE_FORK, memory_order_release);
}

/* Whoever else was inside, or was about to fork, does not exist in the child. */
void ap_gate_reset(void)
{
    atomic_store_explicit(&ap_gate, 0, memory_order_relaxed);
}
