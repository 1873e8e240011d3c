/* What the child of a fork() may do: nothing with what it inherited.
 *
 * The child has one thread. A mutex that a poller or another loop held at the
 * moment of the fork is locked there for ever, and epoll and event descriptors
 * are shared with the parent: an EPOLL_CTL_DEL in the child silences the
 * parent's connection. So every object carries the epoch it was made in, each
 * entry compares it before anything else and returns -ECHILD, and the child
 * only closes descriptors, which it finds in a bitmap that is read without a
 * lock.
 */
#include "fork.h"

#include "pool.h"
#include "slot.h"
#include "sysio.h"

#define FD_WORDS (1u << 14) /* 64 descriptors each; beyond 2^20 the child closes nothing */

_Atomic uint32_t ap_epoch = 1;

/* A bit per descriptor that the core owns: set when it is taken, cleared before
 * it is closed or given away. Relaxed: the child sees the memory of the moment. */
static _Atomic uint64_t owned[FD_WORDS];

static _Atomic uint64_t *owned_word(int fd)
{
    return fd >= 0 && (unsigned)fd / 64 < FD_WORDS ? &owned[(unsigned)fd / 64] : NULL;
}

void ap_fd_own(int fd)
{
    _Atomic uint64_t *word = owned_word(fd);
    if (word)
        atomic_fetch_or_explicit(word, (uint64_t)1 << (fd % 64), memory_order_relaxed);
}

void ap_fd_disown(int fd)
{
    _Atomic uint64_t *word = owned_word(fd);
    if (word)
        atomic_fetch_and_explicit(word, ~((uint64_t)1 << (fd % 64)), memory_order_relaxed);
}

/* Only if it is (still) the core's: in a child the number may be somebody else's. */
int ap_fd_close(int fd)
{
    _Atomic uint64_t *word = owned_word(fd);
    uint64_t bit = (uint64_t)1 << ((unsigned)fd % 64);
    if (word && !(atomic_fetch_and_explicit(word, ~bit, memory_order_relaxed) & bit))
        return -EBADF;
    ap_sys_close(fd);
    return 0;
}

/* Runs in the child before fork() returns, so also where Python's hooks do not. */
static void in_child(void)
{
    atomic_fetch_add_explicit(&ap_epoch, 1, memory_order_relaxed);
}

static _Atomic bool watched; /* (a) relaxed: twice does no harm, the epoch moves on by two */

int ap_fork_watch(void)
{
    if (atomic_load_explicit(&watched, memory_order_relaxed))
        return 0;
    int rc = ap_sys_atfork(in_child);
    if (rc == 0)
        atomic_store_explicit(&watched, true, memory_order_relaxed);
    return rc;
}

int ap_fork_child(void)
{
    for (unsigned word = 0; word < FD_WORDS; word++) {
        uint64_t bits = atomic_exchange_explicit(&owned[word], 0, memory_order_relaxed);
        for (; bits; bits &= bits - 1)
            ap_sys_close((int)(word * 64 + (unsigned)__builtin_ctzll(bits)));
    }
    ap_slot_table_reset();
    ap_pools_reset();
    return 0;
}
