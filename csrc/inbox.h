/* A poller's inbox: a lock-free MPSC list of slots, from many threads to the driver. */
#ifndef ANYPOLL_INBOX_H
#define ANYPOLL_INBOX_H

#include "poller.h"
#include "slot.h"

/* What a slot wants from its driver. */
enum {
    AP_BOX_QUEUED = 1,
    AP_BOX_WORK = 2,     /* serve the slot: due now */
    AP_BOX_DEADLINE = 4, /* file the slot's timer: due at that deadline */
    AP_BOX_CLOSED = 8,   /* forget the slot: never due */
    AP_BOX_SWEEP = 16    /* blocks are coming back: due some time later */
};

#define AP_DUE_NOW 0
#define AP_RESTING 1 /* how long a loop that drives sleeps, as others see it */

/* Queues the slot for its driver, and wakes the driver if it would sleep
 * beyond due. Under the slot's mutex. */
void ap_inbox_push(ap_slot *slot, uint32_t bits, int64_t due);

/* The rest is the driver's. Takes the whole list. */
ap_slot *ap_inbox_take(ap_poller *poller);
/* Removes the first slot from a list that was taken, and returns what it wants. */
ap_slot *ap_inbox_pop(ap_slot **list, uint32_t *bits);

/* Says until when the driver is about to sleep. False: it must not, the inbox is not empty. */
AP_MUST_CHECK bool ap_inbox_sleep(ap_poller *poller, int64_t until);
void ap_inbox_awake(ap_poller *poller);
/* The same for the guard, which looks while it has the lease, and sleeps without it. */
AP_MUST_CHECK bool ap_inbox_guard_sleep(ap_poller *poller, int64_t until);
void ap_inbox_guard_awake(ap_poller *poller);
/* Wakes the guard, if it would sleep beyond due. */
void ap_inbox_wake_guard(ap_poller *poller, int64_t due);

#endif
