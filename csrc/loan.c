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
 *
 * Looking again. A loop that has done all that the tokens asked for would go to sleep: it asks
 * its own epoll, which asks ours, blocks, and is woken. With a client that answers at once all
 * of this costs more than the request. So within the same turn the loop looks again, and then
 * spins: it polls for at most the limit, while others may run Python.
 *
 *   the turn   ends for others that wait for the loop: no look begins later than TURN limits
 *              after the turn has begun
 *   the doubt  A look that leads to nothing doubles the number of chances that are passed up
 *              before the next one, and one that finds something halves it. So looking goes on
 *              only while most looks find something
 *   one core   What runs on it has to stop before anything can come, so there is no spinning.
 *              One look is worthwhile all the same: a client that a send has woken often runs
 *              at once, and has sent the next request when the send returns
 *   late       Another thread had Python when the spin was over, and the loop has waited for
 *              it: whatever was found, that was in vain
 *
 * Whether anybody else waits is for the caller to know.
 */
#include "anypoll.h"

#include "clock.h"
#include "driver.h"
#include "epoch.h"
#include "hub.h"
#include "poller.h"
#include "sysio.h"

#define TURN 8        /* limits */
#define DOUBT_MOST 10 /* 1023 chances */
#define LATE ((int64_t)200 * 1000)
#define LIMIT_MOST ((int64_t)1000 * 1000 * 1000 * 1000)

static _Atomic int64_t spin_limit; /* (a) relaxed: whoever reads it late spins a little more */

int ap_poller_lend(ap_poller *poller, ap_hub *hub)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    if (hub)
        hub->spin.alone = ap_sys_one_core();
    atomic_store_explicit(&poller->borrower, hub, memory_order_seq_cst);
    ap_poller_rouse(poller);
    return ap_has_ended(poller) ? ap_state(poller) : 0;
}

int ap_poller_fd(ap_poller *poller)
{
    return poller->epoch == ap_epoch_now() ? poller->epfd : -ECHILD;
}

static int64_t limit_now(void)
{
    return atomic_load_explicit(&spin_limit, memory_order_relaxed);
}

/* Both descriptors are written for the thread's sake. The loop may see nothing of that, for the
 * thread takes the event of efd; so whoever drives asks whether it still does. */
static void end_loan(ap_poller *poller, ap_hub *hub)
{
    if (atomic_compare_exchange_strong_explicit(&poller->borrower, &hub, NULL, memory_order_seq_cst,
                                                memory_order_seq_cst))
        ap_poller_rouse(poller);
}

int ap_hub_drives(const ap_hub *hub, ap_poller *poller)
{
    return ap_borrower(poller) == hub;
}

/* ---- driving ---------------------------------------------------------- */

static void step(ap_hub *hub, ap_poller *poller)
{
    int rc = ap_poller_step(poller, 0, AP_LOOP_BUDGET);
    if (rc < 0 && rc != -EBUSY)
        end_loan(poller, hub); /* the thread knows how to wait for better times */
}

static int step_once(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max)
{
    ap_hub_hush(hub);
    step(hub, poller);
    return ap_hub_take_hushed(hub, tokens, max);
}

int ap_hub_drive(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    if (ap_borrower(poller) != hub)
        return -EPERM;
    if (limit_now() > 0)
        hub->spin.began = ap_now();
    return step_once(hub, poller, tokens, max);
}

/* ---- looking again ---------------------------------------------------- */

int ap_spin_limit(int64_t nanoseconds)
{
    if (nanoseconds < 0 || nanoseconds > LIMIT_MOST)
        return -EINVAL;
    atomic_store_explicit(&spin_limit, nanoseconds, memory_order_relaxed);
    return 0;
}

static bool may_look(ap_spin *spin, int64_t limit)
{
    if (limit == 0)
        return false;
    if (spin->pause > 0) {
        spin->pause--;
        return false;
    }
    return ap_now() - spin->began < TURN * limit;
}

static void judge(ap_hub *hub, ap_poller *poller, bool hit)
{
    ap_spin *spin = &hub->spin;
    if (hit) {
        ap_count(&poller->hits, 1);
        spin->doubt -= spin->doubt > 0;
        return;
    }
    spin->doubt += spin->doubt < DOUBT_MOST;
    spin->pause = (1u << spin->doubt) - 1;
}

int ap_hub_look(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    if (ap_borrower(poller) != hub)
        return -EPERM;
    if (!may_look(&hub->spin, limit_now()))
        return 0;
    ap_count(&poller->looks, 1);
    int n = step_once(hub, poller, tokens, max);
    if (n == 0 && !hub->spin.alone)
        return -EAGAIN;
    judge(hub, poller, n > 0);
    return n;
}

int ap_hub_spin(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    int64_t until = ap_now() + limit_now();
    ap_count(&poller->spins, 1);
    ap_hub_hush(hub);
    while (ap_borrower(poller) == hub && !ap_hub_has_mail(hub) && ap_now() < until)
        step(hub, poller);
    int n = ap_hub_take_hushed(hub, tokens, max);
    hub->spin.ended = ap_now();
    hub->spin.found = n > 0;
    return n;
}

void ap_hub_spun(ap_hub *hub, ap_poller *poller)
{
    judge(hub, poller, hub->spin.found && ap_now() - hub->spin.ended < LATE);
}
