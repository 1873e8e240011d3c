/* A poller: an epoll descriptor with its event descriptor, its state, and its counters.
 *
 * The operations on it lie above: the inbox (inbox.h), the run list (runlist.h), the
 * loop that drives it (driver.c), its end (ending.h).
 */
#ifndef ANYPOLL_POLLER_H
#define ANYPOLL_POLLER_H

#include "context.h"
#include "timer.h"

#include <pthread.h>

#define AP_TAG_OF_EFD UINT64_MAX /* epoll's data of the poller's own event descriptor */

typedef struct ap_slot ap_slot; /* slot.h: only lists of slots are known here */

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t wake;   /* something is queued, or stopped */
    ap_slot *head, **tail; /* (j) slots whose job is to be called */
    ap_slot **begun;       /* (j) the end of those that have begun, which come first */
    pthread_t thread;      /* (j) if it has_thread */
    bool has_thread;       /* (j) which is to be joined */
    bool stopped;          /* (j) */
} ap_jobs;

struct ap_poller {
    int epfd;                      /* (c) */
    int efd;                       /* (c) wakes whoever watches epfd */
    int gfd;                       /* (c) wakes the guard: the thread while it does not drive */
    uint32_t epoch;                /* (c) */
    _Atomic int32_t refs;          /* (a) acq_rel: the creator, each open slot, the jobs' thread */
    pthread_mutex_t lease;         /* held by the driver; most only try it */
    pthread_t thread;              /* (c) once started */
    _Atomic bool started;          /* (a) relaxed: start and stop come from one place */
    _Atomic bool stopping;         /* (a) release in stop; acquire in the thread */
    _Atomic(ap_hub *) borrower;    /* (a) see loan.c; NULL: the thread drives. Only compared */
    ap_slot *_Atomic inbox;        /* (a) see inbox.c */
    _Atomic int64_t blocked_until; /* (a) of the driver; see inbox.c; 0: running */
    _Atomic int64_t guarded_until; /* (a) of the guard; likewise */
    _Atomic uint32_t with_output;  /* (a) see guard.c: connections that have output queued */
    ap_slot *run_head, **run_tail; /* (d) slots with work left */
    ap_wheel wheel;                /* (d) */
    ap_context context;            /* (d) */
    int64_t now;                   /* (d) when epoll_wait last returned */
    bool busy;                     /* (d) the last epoll_wait found something */
    int64_t sweep_at;              /* (d) when to trim the pool; AP_FOREVER: nothing to do */
    int failures;                  /* (d) of epoll_wait, in a row */
    ap_jobs jobs;                  /* see jobs.c */
    _Atomic int state;             /* (a) see ending.c: AP_ACTIVE ..., or why it has ended */
    ap_counter connections, waits, polls, events, reads, writes, again, accepts, bytes_received,
        bytes_sent, wakeups, wakeups_coalesced, stale_tokens, stalls, timeouts, slots, looks, spins,
        hits;
};

#ifdef AP_DEBUG
extern _Thread_local ap_poller *ap_driving;
#define AP_DRIVING(poller) (ap_driving = (poller))
#define AP_ASSERT_DRIVER(poller) assert(ap_driving == (poller))
#else
#define AP_DRIVING(poller) ((void)(poller))
#define AP_ASSERT_DRIVER(poller) ((void)0)
#endif

/* ending.c explains them. */
enum { AP_ACTIVE, AP_DRAINING, AP_ENDING };

/* seq_cst; ending.c has the reasons */
static inline int ap_state(ap_poller *poller)
{
    return atomic_load_explicit(&poller->state, memory_order_seq_cst);
}
static inline bool ap_has_ended(ap_poller *poller)
{
    return ap_state(poller) < 0;
}
/* seq_cst; loan.c has the reasons */
static inline ap_hub *ap_borrower(ap_poller *poller)
{
    return atomic_load_explicit(&poller->borrower, memory_order_seq_cst);
}

void ap_poller_ref(ap_poller *poller);
/* Wakes all that sleep for it, whoever drives. */
void ap_poller_rouse(ap_poller *poller);

#endif
