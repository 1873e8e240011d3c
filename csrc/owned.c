/* A bitmap of the descriptors that the core owns.
 *
 * The child of a fork closes them. A bit is set when a descriptor is taken, and cleared
 * before it is closed or given away. Relaxed, and without a lock, which the child might
 * find held forever: it sees the memory as of the fork.
 */
#include "owned.h"

#define FD_WORDS (1u << 14) /* 64 descriptors each; beyond 2^20 the child closes nothing */

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

bool ap_fd_disown(int fd)
{
    _Atomic uint64_t *word = owned_word(fd);
    uint64_t bit = (uint64_t)1 << ((unsigned)fd % 64);
    return !word || (atomic_fetch_and_explicit(word, ~bit, memory_order_relaxed) & bit);
}

void ap_fd_disown_all(void (*take)(int fd))
{
    for (unsigned word = 0; word < FD_WORDS; word++) {
        uint64_t bits = atomic_exchange_explicit(&owned[word], 0, memory_order_relaxed);
        for (; bits; bits &= bits - 1)
            take((int)(word * 64 + (unsigned)__builtin_ctzll(bits)));
    }
}
