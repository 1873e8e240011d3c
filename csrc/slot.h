/* A slot map with generations: one slot for each registered descriptor.
 *
 * A slot is the common part at the start of each connection and listener. It names its
 * poller and its hub, and knows nothing of them.
 */
#ifndef ANYPOLL_SLOT_H
#define ANYPOLL_SLOT_H

#include "common.h"
#include "timer.h"

#include <pthread.h>

/* Readiness that edge-triggered epoll reported and that is remembered. */
enum {
    AP_READABLE = 1,
    AP_WRITABLE = 2,
    AP_RDHUP = 4,
    AP_HUP = 8,
    AP_ERR = 16,
    AP_PRI = 32,
    AP_ERR_SEEN = 64, /* AP_ERR, but it stays after the error was handled */
    AP_NO_SHORT_READ = AP_RDHUP | AP_HUP | AP_ERR_SEEN | AP_PRI
};

typedef struct ap_slot ap_slot;
struct ap_context;

/* Operations that connections and listeners each implement in their own way. */
typedef struct {
    /* These take the slot's mutex themselves. */
    bool (*serve)(ap_slot *slot, struct ap_context *context); /* the driver's; true: work is left */
    void (*close)(ap_slot *slot, bool keep_fd);               /* if it is open */
    void (*drop)(ap_slot *slot);                              /* the last reference is gone */
    void (*job)(ap_slot *slot); /* the jobs' thread's, open or not; NULL: never pushed (jobs.c) */
    /* These are called under it, while the slot is open. */
    int64_t (*expire)(ap_slot *slot, int64_t now); /* returns the next deadline */
    void (*fail)(ap_slot *slot, int error);        /* its poller has failed */
    uint32_t (*resolve)(ap_slot *slot, uint32_t bits, int32_t *value); /* what the loop is told */
} ap_slot_ops;

/* Room for what a connection (the larger one) or a listener has after its slot. */
#define AP_SLOT_ROOM 424

struct ap_slot {
    uint32_t index;              /* (c) forever */
    _Atomic uint32_t generation; /* (a) written under (m); relaxed reads are rechecked there */
    uint32_t epoch;              /* (c) */
    bool closed;                 /* (m) */
    uint8_t ready;               /* (m) AP_READABLE ... */
    bool disowned;               /* (m) Python must close fd */
    bool watched;                /* (m) epoll knows it */
    bool orphaned;               /* (m) its poller has failed; see ending.c */
    int fd;                      /* (m) -1 once closed */
    _Atomic int32_t refs;        /* (a) acq_rel down: the handle, the driver, a queue, a kill */
    uint64_t id;                 /* (c) */
    ap_poller *poller;           /* (c) */
    ap_hub *hub;                 /* (c) */
    const ap_slot_ops *ops;      /* (c) */
    pthread_mutex_t mutex;       /* initialised once for all generations */
#ifdef AP_DEBUG
    _Atomic(uintptr_t) owner; /* (a) relaxed: the thread that holds mutex */
#endif
    ap_slot *run_next; /* (d) */
    bool on_run;       /* (d) */
    bool forgotten;    /* (d) closed: the driver's reference goes when it leaves the run list */
    ap_timer timer;    /* (d) */
    int64_t timer_at;  /* (m) the moment the timer is or will be filed for; AP_FOREVER: none */

    ap_slot *_Atomic box_next;    /* (a) release in the push, read by the taker of the list */
    _Atomic uint32_t box_bits;    /* (a) see inbox.c */
    ap_slot *_Atomic mail_next;   /* (a) likewise */
    _Atomic uint32_t mail_bits;   /* (a) see hub.c */
    ap_slot *hub_prev, *hub_next; /* (h) the hub's open slots */
    bool hub_linked;              /* (h) */
    bool job_queued;              /* (j) */
    ap_slot *job_next;            /* (j) */
    ap_slot *free_next;           /* (s) */
};

/* Takes a free slot, and returns it locked: only late events and ap_slot_each know it.
 * It has no references. 0; -ENOMEM. */
AP_MUST_CHECK int ap_slot_take(const ap_slot_ops *ops, int fd, ap_slot **out);
/* Gives back a slot that nobody refers to. */
void ap_slot_give(ap_slot *slot);
/* NULL: there is no slot of that number yet. */
ap_slot *ap_slot_at(uint32_t index);
void ap_slot_ref(ap_slot *slot);
/* Dropping the last reference calls the operation drop. */
void ap_slot_unref(ap_slot *slot);
/* In the child of a fork: the parent's slots are not used there. */
void ap_slot_table_reset(void);
/* Visits every slot, open or not, without its mutex. */
void ap_slot_each(void (*visit)(ap_slot *slot, void *arg), void *arg);

static inline void ap_slot_lock(ap_slot *slot)
{
    pthread_mutex_lock(&slot->mutex);
#ifdef AP_DEBUG
    atomic_store_explicit(&slot->owner, (uintptr_t)pthread_self(), memory_order_relaxed);
#endif
}

static inline void ap_slot_unlock(ap_slot *slot)
{
#ifdef AP_DEBUG
    atomic_store_explicit(&slot->owner, 0, memory_order_relaxed);
#endif
    pthread_mutex_unlock(&slot->mutex);
}

#ifdef AP_DEBUG
#define AP_ASSERT_LOCKED(slot) \
    assert(atomic_load_explicit(&(slot)->owner, memory_order_relaxed) == (uintptr_t)pthread_self())
#else
#define AP_ASSERT_LOCKED(slot) ((void)0)
#endif

/* Identifies the slot to epoll and to the loop, until it is closed. */
static inline uint64_t ap_slot_tag(const ap_slot *slot)
{
    uint64_t generation = atomic_load_explicit(&slot->generation, memory_order_relaxed);
    return generation << 32 | slot->index;
}

/* Locks the slot if it is open. 0; -ECHILD; -EBADF. */
AP_MUST_CHECK int ap_slot_enter(ap_slot *slot);

#endif
