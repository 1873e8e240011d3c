/* A gate that fork() shuts: for calls of a library that has locks of its own. */
#ifndef ANYPOLL_GATE_H
#define ANYPOLL_GATE_H

#include "common.h"

#define AP_GATE_FORK (1u << 16) /* one thread that forks; below it, the threads inside */

extern _Atomic uint32_t ap_gate; /* (a) acquire in, release out; gate.c has the reasons */

/* Where ap_gate_enter waits for a fork to be over. */
void ap_gate_wait(void);

/* Between these two calls the caller may be inside of the library. The gate is the last of all
 * locks: the caller may hold any when it enters, and takes none inside; nor does it fork there. */
static inline void ap_gate_enter(void)
{
    while (atomic_fetch_add_explicit(&ap_gate, 1, memory_order_acquire) >= AP_GATE_FORK)
        ap_gate_wait();
}

static inline void ap_gate_leave(void)
{
    atomic_fetch_sub_explicit(&ap_gate, 1, memory_order_release);
}

/* What fork() calls: before, and then in the parent and in the child. */
void ap_gate_shut(void);
void ap_gate_open(void);
void ap_gate_reset(void);

#endif
