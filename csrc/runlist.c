/* A driver's run list: slots with work left, served round robin.
 *
 * A slot that stopped at a bound stays on the list, and while the list is not empty
 * epoll_wait does not block: with edge-triggered epoll, leftover work has no event of its
 * own (measured: 256 KiB accepted whole by sendmsg, and no EPOLLOUT ever; 20 of 60 KB
 * read, and no EPOLLIN).
 *
 * A closed slot is released here: after all events of one batch have been looked at, and
 * before epoll is asked for the next. So no event that names it is left.
 */
#include "runlist.h"

#include "clock.h"
#include "inbox.h"
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "timer.h"

/* ---- giving memory back ----------------------------------------------- */

/* Blocks come back from loops and views while the driver sleeps. While there is
 * something to do, it checks once a second what can be given back; but a few small
 * connections are not worth a wake-up. */
void ap_run_sweep(ap_poller *poller)
{
    if (poller->now < poller->sweep_at)
        return;
    ap_pool_trim(poller->context.pool);
    poller->sweep_at = AP_FOREVER;
}

void ap_run_sweep_later(ap_poller *poller)
{
    if (poller->sweep_at == AP_FOREVER && ap_pool_can_trim(poller->context.pool))
        poller->sweep_at = poller->now + AP_TRIM_AFTER + AP_TRIM_AFTER / 4;
}

/* ---- the inbox -------------------------------------------------------- */

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
        ap_run_sweep_later(poller);
    if (bits & AP_BOX_WORK)
        ap_run_later(poller, slot);
}

void ap_run_inbox(ap_poller *poller)
{
    ap_slot *list = ap_inbox_take(poller);
    while (list) {
        uint32_t bits;
        ap_slot *slot = ap_inbox_pop(&list, &bits);
        handle_box(poller, slot, bits);
    }
}

/* ---- the run list ----------------------------------------------------- */

void ap_run_later(ap_poller *poller, ap_slot *slot)
{
    AP_ASSERT_DRIVER(poller);
    if (slot->on_run)
        return;
    slot->on_run = true;
    slot->run_next = NULL;
    *poller->run_tail = slot;
    poller->run_tail = &slot->run_next;
}

/* A loop that drives reads no more at once than stays in the processor's cache until the
 * handlers come to it. A thread's loop has another core, and another cache. */
static bool has_read_enough(ap_poller *poller, uint64_t before)
{
    return ap_counted(&poller->bytes_received) - before >= AP_RUN_BYTES && ap_borrower(poller);
}

/* Each slot once: those with work left go to the end, and wait for the next step, so
 * that events, the inbox and the timers get their turn. */
int ap_run(ap_poller *poller, int budget)
{
    ap_slot **end = poller->run_tail;
    uint64_t before = ap_counted(&poller->bytes_received);
    int served = 0;
    for (bool last = false; poller->run_head && !last && served < budget; served++) {
        if (has_read_enough(poller, before))
            break;
        ap_slot *slot = poller->run_head;
        last = &slot->run_next == end;
        poller->run_head = slot->run_next;
        if (!poller->run_head)
            poller->run_tail = &poller->run_head;
        slot->on_run = false;
        if (slot->forgotten)
            ap_slot_unref(slot);
        else if (slot->ops->serve(slot, &poller->context))
            ap_run_later(poller, slot);
    }
    return served;
}

void ap_run_clear(ap_poller *poller)
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
    ap_run_inbox(poller);
    ap_pool_trim(poller->context.pool);
}
