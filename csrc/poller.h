/* A poller, and its step. */
#ifndef ANYPOLL_POLLER_H
#define ANYPOLL_POLLER_H

#include "context.h"
#include "slot.h"
#include "timer.h"

#include <pthread.h>

struct ap_poller {
    int epfd;                      /* (c) */
    int efd;                       /* (c) */
    uint32_t epoch;                /* (c) */
    _Atomic int32_t refs;          /* (a) acq_rel: the creator, and each open slot */
    pthread_mutex_t lease;         /* held by the driver, only ever tried */
    pthread_t thread;              /* (c) once started */
    _Atomic bool started;          /* (a) relaxed: start and stop come from one place */
    _Atomic bool stopping;         /* (a) release in stop; acquire in the thread */
    ap_slot *_Atomic inbox;        /* (a) see ap_poller_push */
    _Atomic int64_t blocked_until; /* (a) see ap_poller_push; 0: running */
    ap_slot *run_head, **run_tail; /* (d) slots with work left */
    ap_wheel wheel;                /* (d) */
    ap_context context;            /* (d) */
    int64_t now;                   /* (d) when epoll_wait last returned */
    bool busy;                     /* (d) the last epoll_wait found something */
    int64_t sweep_at;              /* (d) when to trim the pool; AP_FOREVER: nothing to do */
    int failures;                  /* (d) of epoll_wait, in a row */
    _Atomic int state;             /* (a) see ending.c: AP_ACTIVE ..., or why it has ended */
    ap_counter connections, waits, polls, events, reads, writes, again, accepts, bytes_received,
        bytes_sent, wakeups, wakeups_coalesced, stale_tokens, stalls, timeouts, slots;
};

#ifdef AP_DEBUG
extern _Thread_local ap_poller *ap_driving;
#define AP_ASSERT_DRIVER(poller) assert(ap_driving == (poller))
#else
#define AP_ASSERT_DRIVER(poller) ((void)0)
#endif

/* Queues the slot for its driver, and wakes the driver if it would sleep
 * beyond due. Under the slot's mutex. */
void ap_poller_push(ap_slot *slot, uint32_t bits, int64_t due);
void ap_poller_ref(ap_poller *poller);
/* Lets go of what is queued for the driver; it has ended. */
void ap_poller_clear(ap_poller *poller);

#endif
