/* A poller's thread: it drives, or guards a loop that drives.
 *
 * While the poller is lent (loan.c), the loop does all that an event asks for. The thread
 * sleeps, without the lease and without looking at the epoll descriptor, so that a request
 * wakes one thread only. It wakes for what must happen even if Python computes, sleeps, or
 * never comes back:
 *
 *   time     Deadlines, idle timeouts, the sweep. It sleeps until the next of them is due,
 *            and then makes a whole step: what has arrived in time is read first, so data
 *            wins a tie. A loop with a timer of its own would have to wake for timers that
 *            turn out to be nothing, which most do, and the guard would have to wake after
 *            it all the same.
 *   output   While any is queued (with_output), it looks after GRACE whether anybody has
 *            stepped since. If so, it looks again later. If not, it watches the epoll
 *            descriptor too. When that becomes readable, the loop gets another GRACE to come;
 *            then the guard takes over, and steps at each event until somebody else has
 *            stepped, or nothing is queued. If nothing happens, because the peer does not
 *            read, it sleeps. Work that is left on the run list counts as output: it may be
 *            what was handed over to this thread (output.c) before the loan.
 *   the end  Of a poller that drains, and of the loan.
 *
 * Input is not read ahead for a loop that is busy: it would be read for nobody.
 *
 * Falling asleep follows the inbox's protocol with guarded_until. Whoever queues output
 * counts it in with_output, then loads guarded_until, and wakes the guard if it would sleep
 * longer than GRACE; the guard exchanges guarded_until, then looks at with_output (all
 * seq_cst). What is rare wakes it always: the end of the loan, draining, stopping.
 */
#include "guard.h"

#include "clock.h"
#include "driver.h"
#include "epoch.h"
#include "inbox.h"
#include "jobs.h"
#include "poller.h"
#include "runlist.h"
#include "sysio.h"

#include <unistd.h>

#define PAUSE_MOST 6 /* the pause is 2^n ms */

typedef struct {
    ap_poller *poller;
    uint64_t polls; /* of the poller when the guard last looked or stepped */
    bool took_over; /* the guard has stepped for the loop, and nobody else since */
} guard;

typedef struct {
    int64_t until, due;
    bool watch; /* the epoll descriptor too */
} plan;

/* ---- output ----------------------------------------------------------- */

static bool output_queued(ap_poller *poller)
{
    return atomic_load_explicit(&poller->with_output, memory_order_seq_cst) > 0;
}

void ap_guard_output(ap_poller *poller, bool queued)
{
    if (!queued) {
        atomic_fetch_sub_explicit(&poller->with_output, 1, memory_order_seq_cst);
        return;
    }
    /* seq_cst; pairs with the exchange in ap_inbox_guard_sleep */
    atomic_fetch_add_explicit(&poller->with_output, 1, memory_order_seq_cst);
    if (ap_borrower(poller))
        ap_inbox_wake_guard(poller, ap_now() + AP_GRACE);
}

/* ---- guarding --------------------------------------------------------- */

static bool others_have_stepped(guard *g)
{
    uint64_t polls = ap_counted(&g->poller->polls);
    bool stepped = polls != g->polls;
    g->polls = polls;
    if (stepped)
        g->took_over = false;
    return stepped;
}

static int step(guard *g)
{
    int rc = ap_poller_step(g->poller, 0, AP_THREAD_BUDGET);
    g->polls = ap_counted(&g->poller->polls);
    return rc;
}

/* With the lease. False: look again at once. */
static bool make_plan(guard *g, plan *p)
{
    ap_poller *poller = g->poller;
    AP_DRIVING(poller);
    ap_run_inbox(poller);
    ap_driver_rest(poller); /* also for the steps that this thread made before the loan */
    AP_DRIVING(NULL);
    bool queued = output_queued(poller) || poller->run_head, stepped = others_have_stepped(g);
    p->due = p->until = ap_driver_due(poller);
    p->watch = queued && !stepped;
    int64_t grace = ap_now() + AP_GRACE;
    if (queued && stepped && grace < p->until)
        p->until = grace;
    return ap_inbox_guard_sleep(poller, p->until) && (queued || !output_queued(poller));
}

static int take_over(guard *g)
{
    if (!g->took_over) {
        int rc = ap_sys_sleep(g->poller->gfd, -1, ap_now() + AP_GRACE);
        if (rc < 0 || others_have_stepped(g))
            return rc;
    }
    g->took_over = true;
    return step(g);
}

/* Looks once, and sleeps. Returns 0, or what keeps it from guarding. */
static int turn(guard *g)
{
    ap_poller *poller = g->poller;
    plan p;
    ap_sys_drain(poller->gfd); /* then the look: a signal that comes after this is not lost */
    if (ap_state(poller) > AP_ACTIVE) { /* it may have nothing left to wait for */
        int rc = step(g);
        if (rc < 0)
            return rc;
    }
    if (pthread_mutex_trylock(&poller->lease) != 0)
        return -EBUSY;
    bool sleeps = make_plan(g, &p);
    pthread_mutex_unlock(&poller->lease);
    int woken = sleeps ? ap_sys_sleep(poller->gfd, p.watch ? poller->epfd : -1, p.until) : 0;
    ap_inbox_guard_awake(poller);
    if (woken < 0)
        return woken;
    if (p.due <= ap_now())
        return step(g);
    return woken & AP_SLEEP_OTHER ? take_over(g) : 0;
}

/* ---- the thread ------------------------------------------------------- */

static void *run(void *arg)
{
    guard g = {.poller = arg};
    ap_poller *poller = arg;
    ap_sys_thread_name("anypoll-poller");
    /* acquire; pairs with the release in ap_poller_stop */
    for (int failures = 0; !atomic_load_explicit(&poller->stopping, memory_order_acquire);) {
        int rc = ap_borrower(poller) ? turn(&g) : ap_poller_step(poller, -1, AP_THREAD_BUDGET);
        if (ap_has_ended(poller))
            break;
        if (rc >= 0 || rc == -EBUSY)
            failures = 0;
        if (rc < 0) /* someone else drives, or a system call has failed: do not spin */
            usleep(1000u << (failures < PAUSE_MOST ? failures++ : PAUSE_MOST));
    }
    return NULL;
}

int ap_poller_start(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    if (ap_has_ended(poller))
        return ap_state(poller);
    if (atomic_load_explicit(&poller->started, memory_order_relaxed))
        return -EALREADY;
    ap_jobs_allow(poller);
    int rc = ap_sys_thread(&poller->thread, run, poller);
    if (rc == 0)
        atomic_store_explicit(&poller->started, true, memory_order_relaxed);
    return rc;
}

int ap_poller_stop(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return -ECHILD;
    ap_jobs_stop(poller); /* first: the last step, below, takes what its jobs have pushed */
    if (!atomic_exchange_explicit(&poller->started, false, memory_order_relaxed))
        return 0;
    atomic_store_explicit(&poller->borrower, NULL, memory_order_seq_cst);
    atomic_store_explicit(&poller->stopping, true, memory_order_release); /* with run */
    ap_poller_rouse(poller);
    pthread_join(poller->thread, NULL);
    atomic_store_explicit(&poller->stopping, false, memory_order_relaxed);
    /* Lets go of what was closed meanwhile. What is closed later stays until someone steps: at
     * the end of the process nobody misses it. A loop that drove may be in the middle of its
     * last step, hence the lock: nothing is read or written after this. */
    pthread_mutex_lock(&poller->lease);
    ap_driver_step(poller, 0, AP_THREAD_BUDGET);
    pthread_mutex_unlock(&poller->lease);
    return 0;
}
