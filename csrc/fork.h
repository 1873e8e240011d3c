/* What the child of a fork() may do. */
#ifndef ANYPOLL_FORK_H
#define ANYPOLL_FORK_H

#include "common.h"

extern _Atomic uint32_t ap_epoch; /* (a) relaxed; only a child's atfork handler writes it */

static inline uint32_t ap_epoch_now(void)
{
    return atomic_load_explicit(&ap_epoch, memory_order_relaxed);
}

int ap_fork_watch(void);

#endif
