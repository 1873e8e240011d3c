/* Listening sockets: credit-based accepting, handed over in batches. */
#ifndef ANYPOLL_LISTENER_H
#define ANYPOLL_LISTENER_H

#include "slot.h"

#include <pthread.h>

#define AP_ACCEPT_BATCH 64
#define AP_ACCEPT_PAUSE ((int64_t)100 * 1000 * 1000)

struct ap_account {
    _Atomic int32_t refs;    /* (a) acq_rel */
    _Atomic int32_t credits; /* (a) acq_rel: one is taken before each accept4 */
    _Atomic bool starving;   /* (a) relaxed: an episode is on, and one listener has reported it */
    uint32_t epoch;          /* (c) */
    pthread_mutex_t mutex;
    ap_listener *listeners; /* under mutex */
};

struct ap_listener {
    ap_slot slot;
    ap_account *account;       /* (c) */
    ap_listener *account_next; /* under the account's mutex */
    ap_accepted *queue;        /* (m) accepted and not yet taken */
    uint32_t first, count, capacity;
    int error;            /* (m) of accept4, to be reported once */
    int64_t paused_until; /* (m) 0: not paused */
    int starved_error;    /* (m) */
};

static inline ap_listener *ap_listener_of(ap_slot *slot)
{
    return AP_CONTAINER(slot, ap_listener, slot);
}

#endif
