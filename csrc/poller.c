/* A poller: one epoll descriptor and ap_poller_step, which drives it.
 *
 * Whoever holds the lease drives, and nothing below assumes which thread that
 * is. Today it is the poller's own, which steps again at once: between two steps
 * blocked_until is 0, "running". An event loop that drives by watching the epoll
 * descriptor would have to leave there what it sleeps until.
 *
 * A step: the inbox (what loops want), then one epoll_wait, whose events are
 * all remembered in their slots before any is served, then the run list, then
 * the timers. A slot that stopped at a bound stays on the run list, and as long
 * as that is not empty epoll_wait does not block: with edge-triggered epoll
 * work left over has no event of its own (measured: 256 KiB accepted whole by
 * sendmsg, and no EPOLLOUT ever; 20 of 60 KB read, and no EPOLLIN).
 *
 * Timers come last so that at a tie data wins.
 *
 * Sleeping and being woken (ap_poller_push against block):
 *   pusher: push (seq_cst), then load blocked_until (seq_cst), and write the
 *           event descriptor if the driver sleeps beyond what was pushed;
 *   driver: *exchange* blocked_until for the time it will sleep to (seq_cst),
 *           then look at the inbox (seq_cst), then sleep, then 0.
 *   One of the two sees the other. With a release store in the driver 293,000
 *   of 3 million pushes were missed.
 */
#include "poller.h"

#include "clock.h"
#include "connection.h"
#include "context.h"
#include "ending.h"
#include "epoch.h"
#include "listener.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"
#include "timer.h"

#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define EVENTS 256
#define SELF UINT64_MAX /* the data of the poller's own event descriptor */

#ifdef AP_DEBUG
_Thread_local ap_poller *ap_driving;
#define DRIVING(poller) (ap_driving = (poller))
#else
#define DRIVING(poller) ((void)(poller))
#endif

/* ---- making and freeing ----------------------------------------------- */

static int open_descriptors(ap_poller *poller)
{
    poller->epfd = ap_sys_epoll_create();
    if (poller->epfd < 0)
        return poller->epfd;
    int rc = poller->efd = ap_sys_eventfd();
    if (rc >= 0) /* edge-triggered, so it never has to be read */
        rc = ap_sys_epoll_ctl(poller->epfd, EPOLL_CTL_ADD, poller->efd, EPOLLIN | EPOLLET, SELF);
    if (rc >= 0)
        return 0;
    if (poller->efd >= 0)
        ap_sys_close(poller->efd);
    ap_sys_close(poller->epfd);
    return rc;
}

int ap_poller_new(ap_poller **out)
{
    int rc = ap_epoch_watch();
    ap_poller *poller = rc < 0 ? NULL : ap_sys_alloc(sizeof *poller);
    if (!poller)
        return rc < 0 ? rc : -ENOMEM;
    rc = ap_context_init(&poller->context);
    if (rc < 0)
        goto no_context;
    rc = open_descriptors(poller);
    if (rc < 0)
        goto no_descriptors;
    poller->epoch = ap_epoch_now();
    atomic_init(&poller->refs, 1);
    pthread_mutex_init(&poller->lease, NULL);
    poller->run_tail = &poller->run_head;
    poller->now = ap_now();
    poller->sweep_at = AP_FOREVER;
    ap_wheel_init(&poller->wheel, poller->now);
    *out = poller;
    return 0;
no_descriptors:
    ap_context_free(&poller->context);
no_context:
    free(poller);
    return rc;
}

void ap_poller_ref(ap_poller *poller)
{
    atomic_fetch_add_explicit(&poller->refs, 1, memory_order_relaxed);
}

void ap_poller_unref(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return;
    /* acq_rel; pairs with itself */
    if (atomic_fetch_sub_explicit(&poller->refs, 1, memory_order_acq_rel) != 1)
        return;
    ap_sys_close(poller->efd);
    ap_sys_close(poller->epfd);
    ap_context_free(&poller->context);
    pthread_mutex_destroy(&poller->lease);
    free(poller);
}

/* ---- the inbox -------------------------------------------------------- */

static void wake_driver(ap_poller *poller, int64_t due)
{
    /* seq_cst; pairs with the exchange in block */
    int64_t until = atomic_load_explicit(&poller->blocked_until, memory_order_seq_cst);
    /* the one who turns it to 0 writes, the others need not */
    if (until != 0 && due < until &&
        atomic_compare_exchange_strong_explicit(&poller->blocked_until, &until, 0,
                                                memory_order_seq_cst, memory_order_relaxed))
        ap_sys_signal(poller->efd);
}

void ap_poller_push(ap_slot *slot, uint32_t bits, int64_t due)
{
    AP_ASSERT_LOCKED(slot);
    ap_poller *poller = slot->poller;
    if (slot->orphaned)
        return;
    uint32_t old =
        atomic_fetch_or_explicit(&slot->box_bits, bits | AP_BOX_QUEUED, memory_order_seq_cst);
    if (!(old & AP_BOX_QUEUED)) {
        ap_slot *head = atomic_load_explicit(&poller->inbox, memory_order_relaxed);
        do
            atomic_store_explicit(&slot->box_next, head, memory_order_relaxed);
        while (!atomic_compare_exchange_weak_explicit(&poller->inbox, &head, slot,
                                                      memory_order_seq_cst, memory_order_relaxed));
    }
    wake_driver(poller, due);
}

int ap_poller_nudge(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    ap_sys_signal(poller->efd);
    return 0;
}

/* Blocks come back from loops and views while the driver sleeps. As long as
 * there was something to do it looks once a second what can be given back. */
static void sweep(ap_poller *poller)
{
    if (poller->now < poller->sweep_at)
        return;
    ap_pool_trim(poller->context.pool);
    poller->sweep_at = AP_FOREVER;
}

static void sweep_later(ap_poller *poller)
{
    if (poller->sweep_at == AP_FOREVER)
        poller->sweep_at = poller->now + AP_TRIM_AFTER + AP_TRIM_AFTER / 4;
}

static void run_later(ap_poller *poller, ap_slot *slot)
{
    AP_ASSERT_DRIVER(poller);
    if (slot->on_run)
        return;
    slot->on_run = true;
    slot->run_next = NULL;
    *poller->run_tail = slot;
    poller->run_tail = &slot->run_next;
}

static void handle_box(ap_poller *poller, ap_slot *slot, uint32_t bits)
{
    if (bits & AP_BOX_CLOSED) {
        ap_wheel_unfile(&poller->wheel, &slot->timer);
        if (slot->on_run)
            slot->forgotten = true;
        else
            ap_slot_unref(slot);
        return;
    }
    if (ap_has_ended(poller))
        return;
    if (bits & AP_BOX_DEADLINE) {
        ap_slot_lock(slot);
        int64_t at = slot->timer_at;
        ap_slot_unlock(slot);
        if (at != AP_FOREVER)
            ap_wheel_file(&poller->wheel, &slot->timer, at);
    }
    if (bits & AP_BOX_SWEEP)
        sweep_later(poller);
    if (bits & AP_BOX_WORK)
        run_later(poller, slot);
}

static void drain_inbox(ap_poller *poller)
{
    ap_slot *slot = atomic_exchange_explicit(&poller->inbox, NULL, memory_order_seq_cst);
    while (slot) {
        /* next before the bits: once they are 0 the slot may be pushed again */
        ap_slot *next = atomic_load_explicit(&slot->box_next, memory_order_relaxed);
        uint32_t bits = atomic_exchange_explicit(&slot->box_bits, 0, memory_order_seq_cst);
        handle_box(poller, slot, bits);
        slot = next;
    }
}

/* ---- waiting ---------------------------------------------------------- */

static int64_t earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rounded up: waking before the tick would be waking for nothing. */
static int milliseconds(int64_t nanoseconds)
{
    int64_t ms = (nanoseconds + 999999) / 1000000;
    return ms < 0 ? 0 : ms > INT32_MAX ? INT32_MAX : (int)ms;
}

static int poll_events(ap_poller *poller, struct epoll_event *events, int timeout_ms)
{
    ap_count(&poller->polls, 1);
    return ap_sys_epoll_wait(poller->epfd, events, EVENTS, timeout_ms);
}

static int block(ap_poller *poller, struct epoll_event *events, int64_t until)
{
    int64_t now = ap_now();
    int timeout = until == AP_FOREVER ? -1 : milliseconds(until - now);
    if (timeout == 0)
        return poll_events(poller, events, 0);
    /* seq_cst; pairs with the load in wake_driver */
    atomic_exchange_explicit(&poller->blocked_until, until, memory_order_seq_cst);
    if (atomic_load_explicit(&poller->inbox, memory_order_seq_cst) ||
        atomic_load_explicit(&poller->stopping, memory_order_acquire))
        timeout = 0;
    else
        ap_count(&poller->waits, 1);
    int n = poll_events(poller, events, timeout);
    atomic_store_explicit(&poller->blocked_until, 0, memory_order_seq_cst);
    return n;
}

/* After a wait that found something it polls once more before it blocks: one
 * wake-up of a sleeping thread costs 30 µs on a virtual machine, a system call
 * on a busy one 1 µs. */
static int wait_events(ap_poller *poller, struct epoll_event *events, int timeout_ms)
{
    if (poller->run_head || timeout_ms == 0)
        return poll_events(poller, events, 0);
    if (poller->busy) {
        int n = poll_events(poller, events, 0);
        if (n != 0)
            return n;
    }
    int64_t limit = timeout_ms < 0 ? AP_FOREVER : ap_now() + (int64_t)timeout_ms * 1000000;
    int64_t due = earlier(ap_wheel_next(&poller->wheel), poller->sweep_at);
    return block(poller, events, earlier(limit, due));
}

/* ---- events ----------------------------------------------------------- */

static uint8_t flags_of(uint32_t events)
{
    uint8_t flags = 0;
    if (events & EPOLLIN)
        flags |= AP_READABLE;
    if (events & EPOLLOUT)
        flags |= AP_WRITABLE;
    if (events & EPOLLPRI)
        flags |= AP_PRI | AP_READABLE;
    if (events & EPOLLRDHUP)
        flags |= AP_RDHUP | AP_READABLE;
    if (events & EPOLLHUP)
        flags |= AP_HUP | AP_READABLE | AP_WRITABLE;
    if (events & EPOLLERR)
        flags |= AP_ERR | AP_ERR_SEEN | AP_READABLE | AP_WRITABLE;
    return flags;
}

static void remember(ap_poller *poller, uint64_t tag, uint32_t events)
{
    ap_slot *slot = ap_slot_at((uint32_t)tag);
    if (!slot)
        return;
    ap_slot_lock(slot);
    bool current = !slot->closed && ap_slot_tag(slot) == tag;
    if (current)
        slot->ready |= flags_of(events);
    else
        ap_count(&poller->stale_tokens, 1);
    ap_slot_unlock(slot);
    /* Closed meanwhile or not, it is ours until we take AP_BOX_CLOSED. */
    if (current)
        run_later(poller, slot);
}

static void remember_all(ap_poller *poller, const struct epoll_event *events, int n)
{
    ap_count(&poller->events, (uint64_t)n);
    for (int i = 0; i < n; i++) {
        if (events[i].data.u64 != SELF)
            remember(poller, events[i].data.u64, events[i].events);
    }
}

/* ---- the run list ----------------------------------------------------- */

static bool serve(ap_poller *poller, ap_slot *slot)
{
    bool more = false;
    ap_slot_lock(slot);
    if (slot->kind == AP_SLOT_CONN) {
        if (!slot->closed)
            more = ap_conn_serve(&poller->context, (ap_conn *)slot);
        ap_conn_unlock((ap_conn *)slot);
        return more;
    }
    if (!slot->closed)
        more = ap_listener_serve((ap_listener *)slot);
    ap_slot_unlock(slot);
    return more;
}

/* Each slot once: those that have work left go behind the last one, and wait for
 * the next step, so that events, the inbox and the timers get their turn. */
static int run(ap_poller *poller, int budget)
{
    ap_slot **end = poller->run_tail;
    int served = 0;
    for (bool last = false; poller->run_head && !last && served < budget; served++) {
        ap_slot *slot = poller->run_head;
        last = &slot->run_next == end;
        poller->run_head = slot->run_next;
        if (!poller->run_head)
            poller->run_tail = &poller->run_head;
        slot->on_run = false;
        if (slot->forgotten)
            ap_slot_unref(slot);
        else if (serve(poller, slot))
            run_later(poller, slot);
    }
    return served;
}

void ap_poller_clear(ap_poller *poller)
{
    AP_ASSERT_DRIVER(poller);
    while (poller->run_head) {
        ap_slot *slot = poller->run_head;
        poller->run_head = slot->run_next;
        slot->on_run = false;
        if (slot->forgotten)
            ap_slot_unref(slot);
    }
    poller->run_tail = &poller->run_head;
    drain_inbox(poller);
    ap_pool_trim(poller->context.pool);
}

/* ---- timers ----------------------------------------------------------- */

static int64_t expire(ap_slot *slot, int64_t now)
{
    if (slot->closed)
        return AP_FOREVER;
    if (slot->kind == AP_SLOT_CONN) {
        ap_conn_expire((ap_conn *)slot, now);
        return ap_conn_next_deadline((ap_conn *)slot);
    }
    ap_listener_expire((ap_listener *)slot, now);
    return ap_listener_next_deadline((ap_listener *)slot);
}

static void fire_timers(ap_poller *poller)
{
    ap_timer *timer;
    while ((timer = ap_wheel_expire(&poller->wheel, poller->now)) != NULL) {
        ap_slot *slot = AP_CONTAINER(timer, ap_slot, timer);
        ap_slot_lock(slot);
        int64_t next = slot->timer_at = expire(slot, poller->now);
        ap_slot_unlock(slot);
        if (next != AP_FOREVER)
            ap_wheel_file(&poller->wheel, timer, next);
    }
}

/* ---- driving ---------------------------------------------------------- */

int ap_poller_step(ap_poller *poller, int timeout_ms, int budget)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    if (ap_has_ended(poller))
        return ap_state(poller);
    if (pthread_mutex_trylock(&poller->lease) != 0)
        return -EBUSY;
    DRIVING(poller);
    struct epoll_event events[EVENTS];
    drain_inbox(poller);
    int n = wait_events(poller, events, timeout_ms);
    poller->busy = n > 0;
    poller->now = ap_now();
    if (n > 0)
        remember_all(poller, events, n);
    int served = run(poller, budget);
    if (served > 0)
        sweep_later(poller);
    fire_timers(poller);
    sweep(poller);
    ap_poller_judge(poller, n);
    ap_poller_end_drained(poller);
    DRIVING(NULL);
    pthread_mutex_unlock(&poller->lease);
    return n < 0 ? n : served;
}

/* ---- statistics ------------------------------------------------------- */

int ap_poller_statistics(ap_poller *poller, ap_poller_stats *out)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    *out = (ap_poller_stats){
        .connections = ap_counted(&poller->connections),
        .waits = ap_counted(&poller->waits),
        .polls = ap_counted(&poller->polls),
        .events = ap_counted(&poller->events),
        .reads = ap_counted(&poller->reads),
        .writes = ap_counted(&poller->writes),
        .again = ap_counted(&poller->again),
        .accepts = ap_counted(&poller->accepts),
        .bytes_received = ap_counted(&poller->bytes_received),
        .bytes_sent = ap_counted(&poller->bytes_sent),
        .wakeups = ap_counted(&poller->wakeups),
        .wakeups_coalesced = ap_counted(&poller->wakeups_coalesced),
        .stale_tokens = ap_counted(&poller->stale_tokens),
        .stalls = ap_counted(&poller->stalls),
        .timeouts = ap_counted(&poller->timeouts),
        .slots = ap_counted(&poller->slots),
    };
    ap_pool_statistics(poller->context.pool, out);
    return 0;
}
