/* The fork epoch: a generation counter of the process. */
#ifndef ANYPOLL_EPOCH_H
#define ANYPOLL_EPOCH_H

#include "common.h"

extern _Atomic uint32_t ap_epoch; /* (a) relaxed; only a child's atfork handler writes it */

static inline uint32_t ap_epoch_now(void)
{
    return atomic_load_explicit(&ap_epoch, memory_order_relaxed);
}

/* Makes the epoch advance in every child from now on. 0; -errno. */
AP_MUST_CHECK int ap_epoch_watch(void);

#endif
