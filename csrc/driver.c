/* A poller's step.
 *
 * Whoever holds the lease drives, and nothing below assumes which thread that is: the
 * poller's own (guard.c), or that of an event loop which watches the epoll descriptor
 * (loan.c).
 *
 * A step: the inbox (requests from the loops), then one epoll_wait, whose events
 * are all recorded in their slots before any is served, then the run list, then
 * the timers. Timers come last so that data wins a tie.
 *
 * The thread steps again at once: between two steps blocked_until is 0, "running". A loop
 * does other things between, and its poller has several drivers in turn: the loop, the
 * guard, and who asks for news. So while a poller is lent, no step blocks, and each driver
 * rests before it lets go of the lease: it publishes that nobody runs, and if anything is
 * left to do, it makes the epoll descriptor readable, which brings the loop.
 */
#include "driver.h"

#include "clock.h"
#include "ending.h"
#include "epoch.h"
#include "inbox.h"
#include "poller.h"
#include "runlist.h"
#include "slot.h"
#include "sysio.h"
#include "timer.h"

#include <sys/epoll.h>

#define EVENTS 256

/* ---- waiting ---------------------------------------------------------- */

static int64_t earlier(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

/* Rounded up: a wake-up before the tick would be in vain. */
static int milliseconds(int64_t nanoseconds)
{
    int64_t ms = (nanoseconds + 999999) / 1000000;
    return ms < 0 ? 0 : ms > INT32_MAX ? INT32_MAX : (int)ms;
}

int64_t ap_driver_due(const ap_poller *poller)
{
    return earlier(ap_wheel_next(&poller->wheel), poller->sweep_at);
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
    if (!ap_inbox_sleep(poller, until) || ap_borrower(poller) ||
        atomic_load_explicit(&poller->stopping, memory_order_acquire))
        timeout = 0;
    else
        ap_count(&poller->waits, 1);
    int n = poll_events(poller, events, timeout);
    ap_inbox_awake(poller);
    return n;
}

/* After a wait that found something it polls once more before it blocks: waking
 * a sleeping thread costs 30 µs on a virtual machine, a system call on a busy
 * one 1 µs. */
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
    return block(poller, events, earlier(limit, ap_driver_due(poller)));
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
        ap_run_later(poller, slot);
}

static void remember_all(ap_poller *poller, const struct epoll_event *events, int n)
{
    ap_count(&poller->events, (uint64_t)n);
    for (int i = 0; i < n; i++) {
        if (events[i].data.u64 != AP_TAG_OF_EFD)
            remember(poller, events[i].data.u64, events[i].events);
    }
}

/* ---- timers ----------------------------------------------------------- */

static void fire_timers(ap_poller *poller)
{
    ap_timer *timer;
    while ((timer = ap_wheel_expire(&poller->wheel, poller->now)) != NULL) {
        ap_slot *slot = AP_CONTAINER(timer, ap_slot, timer);
        ap_slot_lock(slot);
        int64_t next = slot->closed ? AP_FOREVER : slot->ops->expire(slot, poller->now);
        slot->timer_at = next;
        ap_slot_unlock(slot);
        if (next != AP_FOREVER)
            ap_wheel_file(&poller->wheel, timer, next);
    }
}

/* ---- driving ---------------------------------------------------------- */

void ap_driver_rest(ap_poller *poller)
{
    AP_ASSERT_DRIVER(poller);
    if (!ap_inbox_sleep(poller, AP_RESTING) || poller->run_head) {
        ap_inbox_awake(poller); /* whoever is brought by this will look */
        ap_sys_signal(poller->efd);
    }
    ap_inbox_wake_guard(poller, ap_driver_due(poller));
}

static int step(ap_poller *poller, int timeout_ms, int budget)
{
    struct epoll_event events[EVENTS];
    if (ap_borrower(poller))
        ap_inbox_awake(poller);
    ap_run_inbox(poller);
    int n = wait_events(poller, events, timeout_ms);
    poller->busy = n > 0;
    poller->now = ap_now();
    if (n > 0)
        remember_all(poller, events, n);
    int served = ap_run(poller, budget);
    if (served > 0)
        ap_run_sweep_later(poller);
    fire_timers(poller);
    ap_run_sweep(poller);
    ap_poller_judge(poller, n);
    ap_poller_end_drained(poller);
    if (ap_borrower(poller) && !ap_has_ended(poller))
        ap_driver_rest(poller);
    return n < 0 ? n : served;
}

int ap_driver_step(ap_poller *poller, int timeout_ms, int budget)
{
    if (ap_has_ended(poller))
        return ap_state(poller);
    AP_DRIVING(poller);
    int rc = step(poller, timeout_ms, budget);
    AP_DRIVING(NULL);
    return rc;
}

int ap_poller_step(ap_poller *poller, int timeout_ms, int budget)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    if (ap_has_ended(poller))
        return ap_state(poller);
    if (pthread_mutex_trylock(&poller->lease) != 0)
        return -EBUSY;
    int rc = ap_driver_step(poller, timeout_ms, budget);
    pthread_mutex_unlock(&poller->lease);
    return rc;
}

void ap_driver_catch_up(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now() || !ap_borrower(poller))
        return;
    /* Waits for the guard, which may be in the middle of a step or of a look: having tried is
     * not having looked. It does not sleep with the lease, and the caller holds no lock. */
    pthread_mutex_lock(&poller->lease);
    int rc, served = 0;
    do { /* a step that has read so much ends early */
        rc = ap_driver_step(poller, 0, AP_LOOP_BUDGET);
        served += rc;
    } while (rc > 0 && poller->run_head && served < AP_LOOP_BUDGET);
    pthread_mutex_unlock(&poller->lease);
}

int ap_poller_nudge(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    ap_sys_signal(poller->efd);
    ap_driver_catch_up(poller);
    return 0;
}
