/* A poller's inbox: a lock-free MPSC list of slots, from many threads to the driver.
 *
 * Any thread pushes, under the slot's mutex, and the driver takes the whole list. A slot
 * has bits and is in the list at most once, so it cannot overflow.
 *
 * Sleeping and being woken (push against sleep):
 *   pusher: push (seq_cst), then load blocked_until (seq_cst), and write the
 *           event descriptor if the driver sleeps beyond what was pushed;
 *   driver: *exchange* blocked_until for the time it will sleep to (seq_cst),
 *           then look at the inbox (seq_cst), then sleep, then 0.
 *   One of the two sees the other. With a release store in the driver 293,000
 *   of 3 million pushes were missed.
 *
 * While a loop drives, there are two sleepers (guard.c). The loop rests until AP_RESTING,
 * so that only what is due now wakes it. All else is the guard's, which sleeps until
 * guarded_until, with a descriptor of its own and by the same protocol.
 */
#include "inbox.h"

#include "poller.h"
#include "slot.h"
#include "sysio.h"

static void wake(_Atomic int64_t *asleep_until, int efd, int64_t due)
{
    /* seq_cst; pairs with the exchange in fall_asleep */
    int64_t until = atomic_load_explicit(asleep_until, memory_order_seq_cst);
    /* whoever turns it to 0 writes, the others need not */
    if (until != 0 && due < until &&
        atomic_compare_exchange_strong_explicit(asleep_until, &until, 0, memory_order_seq_cst,
                                                memory_order_relaxed))
        ap_sys_signal(efd);
}

void ap_inbox_wake_guard(ap_poller *poller, int64_t due)
{
    wake(&poller->guarded_until, poller->gfd, due);
}

void ap_inbox_push(ap_slot *slot, uint32_t bits, int64_t due)
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
    wake(&poller->blocked_until, poller->efd, due);
    if (due != AP_DUE_NOW)
        ap_inbox_wake_guard(poller, due);
}

ap_slot *ap_inbox_take(ap_poller *poller)
{
    return atomic_exchange_explicit(&poller->inbox, NULL, memory_order_seq_cst);
}

ap_slot *ap_inbox_pop(ap_slot **list, uint32_t *bits)
{
    ap_slot *slot = *list;
    /* next before the bits: once they are 0 the slot may be pushed again */
    *list = atomic_load_explicit(&slot->box_next, memory_order_relaxed);
    *bits = atomic_exchange_explicit(&slot->box_bits, 0, memory_order_seq_cst);
    return slot;
}

static bool fall_asleep(ap_poller *poller, _Atomic int64_t *asleep_until, int64_t until)
{
    /* seq_cst; pairs with the load in wake */
    atomic_exchange_explicit(asleep_until, until, memory_order_seq_cst);
    return !atomic_load_explicit(&poller->inbox, memory_order_seq_cst);
}

bool ap_inbox_sleep(ap_poller *poller, int64_t until)
{
    return fall_asleep(poller, &poller->blocked_until, until);
}

void ap_inbox_awake(ap_poller *poller)
{
    atomic_store_explicit(&poller->blocked_until, 0, memory_order_seq_cst);
}

bool ap_inbox_guard_sleep(ap_poller *poller, int64_t until)
{
    return fall_asleep(poller, &poller->guarded_until, until);
}

void ap_inbox_guard_awake(ap_poller *poller)
{
    atomic_store_explicit(&poller->guarded_until, 0, memory_order_seq_cst);
}
