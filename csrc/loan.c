/* Lending a poller to an event loop: the loop drives it, while it has time.
 *
 * A request that wakes a poller's thread, which wakes the loop, costs two switches of
 * threads and an event descriptor written and read. So a loop that has a poller to itself
 * borrows it: it watches the epoll descriptor, and steps the poller when that is readable,
 * without blocking. The thread becomes the guard (guard.c).
 *
 *   borrower   who drives                          who sleeps, and is woken by
 *   NULL       the thread                          the thread in epoll_wait: efd, in the epoll set
 *   a hub      its loop; the guard, when the       the loop, on the epoll descriptor: efd
 *              loop does not come                  the guard, in ppoll: gfd
 *
 * Which of them steps is decided by the lease alone, so a change needs no agreement: who
 * finds another borrower than itself stops. The change is stored before both descriptors are
 * written (seq_cst; pairs with the look in the driver's block and the guard's turn), so the
 * thread, wherever it sleeps, wakes and finds it. A thread that goes from driving to guarding
 * rests first; a loop that loses its poller in the middle of a step need not, because the
 * thread steps next.
 *
 * While the loop steps, nobody needs to wake it: its hub counts as signalled before the step,
 * and its mailbox is taken after it, without reading the event descriptor. What others post
 * meanwhile is taken too, since signalled is reset before the mailbox is taken (hub.c).
 * What a step outside of this posts is signalled.
 */
#include "anypoll.h"

#include "driver.h"
#include "epoch.h"
#include "hub.h"
#include "poller.h"

int ap_poller_lend(ap_poller *poller, ap_hub *hub)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    atomic_store_explicit(&poller->borrower, hub, memory_order_seq_cst);
    ap_poller_rouse(poller);
    return ap_has_ended(poller) ? ap_state(poller) : 0;
}

int ap_poller_fd(ap_poller *poller)
{
    return poller->epoch == ap_epoch_now() ? poller->epfd : -ECHILD;
}

static void end_loan(ap_poller *poller, ap_hub *hub)
{
    if (atomic_compare_exchange_strong_explicit(&poller->borrower, &hub, NULL, memory_order_seq_cst,
                                                memory_order_seq_cst))
        ap_poller_rouse(poller); /* the loop finds out, too */
}

int ap_hub_drive(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    if (ap_borrower(poller) != hub)
        return -EPERM;
    ap_hub_hush(hub);
    int rc = ap_poller_step(poller, 0, AP_LOOP_BUDGET);
    if (rc < 0 && rc != -EBUSY)
        end_loan(poller, hub); /* the thread knows how to wait for better times */
    return ap_hub_take_hushed(hub, tokens, max);
}
