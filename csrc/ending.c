/* A poller's shutdown: a state machine that ends in drained or failed.
 *
 * States, and who may change them:
 *
 *   ACTIVE    it serves what it has, and gets more
 *   DRAINING  it ends with its last connection or listener (ap_poller_drain, any
 *             thread; back to ACTIVE likewise)
 *   ENDING    the driver has found none left, and looks once more; back to ACTIVE
 *             as from DRAINING
 *   < 0       it has ended, for good: AP_EPOLLER - ECANCELED if drained, or the
 *             errno of epoll_wait (the driver)
 *
 * Drained, against a connection that is being opened:
 *   opener: count, then load the state, and take back the count if it is ENDING or
 *           has ended;
 *   driver: change DRAINING to ENDING, then load the count, and change back unless
 *           it is 0.
 *   All of it is seq_cst, so one of the two sees the other. Whoever takes the count
 *   to 0 while the poller drains wakes the driver, which may be asleep.
 *
 * Failed: nothing that is open can be served any more. Each slot is ended with
 * the error, so that its waiters are told, and orphaned: from then on nothing is
 * pushed to its poller, and whoever closes it drops the driver's reference too. A
 * slot that is taken meanwhile finds, under its mutex, that the poller has ended,
 * or is found by ap_slot_each. A poller's descriptors are closed with the last
 * reference, because loops may be in the middle of a call with them.
 */
#include "ending.h"

#include "epoch.h"
#include "poller.h"
#include "runlist.h"
#include "slot.h"
#include "sysio.h"
#include "timer.h"

#define TRIES 20 /* of an epoll_wait that may recover: about a second */
#define DRAINED (AP_EPOLLER - ECANCELED)

/* ---- counting --------------------------------------------------------- */

int ap_poller_admit(ap_poller *poller)
{
    /* seq_cst; pairs with ap_poller_end_drained */
    atomic_fetch_add_explicit(&poller->connections, 1, memory_order_seq_cst);
    int state = ap_state(poller);
    if (state == AP_ACTIVE || state == AP_DRAINING)
        return 0;
    ap_poller_dismiss(poller);
    return state < 0 ? state : DRAINED;
}

void ap_poller_dismiss(ap_poller *poller)
{
    /* seq_cst; pairs with ap_poller_end_drained */
    if (atomic_fetch_sub_explicit(&poller->connections, 1, memory_order_seq_cst) == 1 &&
        ap_state(poller) > AP_ACTIVE)
        ap_poller_rouse(poller);
}

/* ---- draining --------------------------------------------------------- */

static bool change(ap_poller *poller, int from, int to)
{
    return atomic_compare_exchange_strong_explicit(&poller->state, &from, to, memory_order_seq_cst,
                                                   memory_order_seq_cst);
}

int ap_poller_drain(ap_poller *poller, int on)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    if (on) {
        change(poller, AP_ACTIVE, AP_DRAINING);
        ap_poller_rouse(poller);
        int state = ap_state(poller);
        return state < 0 && state != DRAINED ? state : 0;
    }
    /* Out of ENDING too: the driver may still find a connection, and go on. */
    int state;
    while ((state = ap_state(poller)) > AP_ACTIVE)
        change(poller, state, AP_ACTIVE);
    return state;
}

int ap_poller_state(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    int state = ap_state(poller);
    return state == AP_ENDING ? AP_DRAINING : state;
}

static uint64_t open_slots(ap_poller *poller)
{
    return atomic_load_explicit(&poller->connections, memory_order_seq_cst);
}

void ap_poller_end_drained(ap_poller *poller)
{
    AP_ASSERT_DRIVER(poller);
    if (ap_state(poller) != AP_DRAINING || open_slots(poller) > 0 ||
        !change(poller, AP_DRAINING, AP_ENDING))
        return;
    if (open_slots(poller) > 0) { /* pairs with ap_poller_admit */
        change(poller, AP_ENDING, AP_DRAINING);
        return;
    }
    if (change(poller, AP_ENDING, DRAINED)) /* otherwise it is to stay after all */
        ap_run_clear(poller); /* closed slots are in the inbox, because that comes first */
}

/* ---- failing ---------------------------------------------------------- */

typedef struct {
    ap_poller *poller;
    int error;
    ap_slot *orphans; /* linked by run_next, with a reference: they may be in the inbox */
} failure;

static void end_slot(ap_slot *slot, void *arg)
{
    failure *f = arg;
    ap_slot_lock(slot);
    if (slot->poller == f->poller && !slot->closed && !slot->orphaned) {
        ap_slot_ref(slot);
        slot->run_next = f->orphans;
        f->orphans = slot;
        slot->orphaned = true;
        ap_wheel_unfile(&f->poller->wheel, &slot->timer);
        if (slot->watched)
            slot->ops->fail(slot, f->error);
    }
    ap_slot_unlock(slot);
}

static void fail(ap_poller *poller, int error)
{
    failure f = {.poller = poller, .error = error};
    atomic_store_explicit(&poller->state, error, memory_order_seq_cst);
    ap_run_clear(poller); /* the run list, which also uses run_next */
    ap_slot_each(end_slot, &f);
    ap_run_clear(poller); /* what was closed or pushed before it was orphaned */
    while (f.orphans) {
        ap_slot *slot = f.orphans;
        f.orphans = slot->run_next;
        ap_slot_unref(slot);
    }
}

static bool may_pass(int error)
{
    return error == -ENOMEM || error == -ENOBUFS || error == -EAGAIN;
}

void ap_poller_judge(ap_poller *poller, int result)
{
    AP_ASSERT_DRIVER(poller);
    if (result >= 0)
        poller->failures = 0;
    else if (!may_pass(result) || ++poller->failures == TRIES)
        fail(poller, AP_EPOLLER + result);
}
