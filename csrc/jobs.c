/* Long computations for slots, in a thread of the poller's own.
 *
 * A TLS handshake computes for a millisecond. In the poller's thread that would hold up
 * a thousand other connections, in an event loop all tasks. What it is that is computed
 * is not known here: the slot has an operation for it.
 *
 *   push    Any thread, under the slot's mutex: the slot is queued, with a reference,
 *           unless it is already. What has begun goes before what has not: of a thousand
 *           new clients the first are served while the last wait.
 *   a turn  The thread takes the first slot, and calls its job without any lock. The job
 *           takes the slot's mutex, finds what there is to do, and may let go of it while
 *           it computes. The slot may have been closed, or orphaned, at any moment.
 *
 * No push is lost: a slot leaves the queue before its job begins, so whoever finds it
 * queued knows that the job will still look; and a push during the job queues it again. Jobs of one
 * slot do not overlap, because there is one thread.
 *
 * The thread begins with the first push, since most pollers never need it. Then it sleeps,
 * without a timeout, while there is nothing to do. It could end instead: but handshakes
 * that are few and far between would each begin three threads, at twice the price of
 * waking one that sleeps, and somebody would have to join it. One that sleeps costs a
 * stack of a few pages.
 *
 * It ends in ap_poller_stop, and not before: not with a poller that is drained or has
 * failed, whose owner stops it in any case. A failed poller's jobs are still called; they
 * find the error in the slot. The thread has a reference to the poller, which the stop
 * drops after it has joined it. So the poller is never freed under the thread, nor by it,
 * though the last reference to a slot may well go here.
 *
 * After the stop, pushes are refused until ap_poller_start. What was queued is forgotten,
 * like everything else that a stopped poller would have done.
 *
 * In the child of a fork there is no such thread, and whoever wants to push has been
 * refused with -ECHILD. What jobs hold of other libraries: gate.c.
 */
#include "jobs.h"

#include "poller.h"
#include "slot.h"
#include "sysio.h"

/* ---- the thread ------------------------------------------------------- */

/* With the mutex. */
static ap_slot *take_first(ap_jobs *jobs)
{
    ap_slot *slot = jobs->head;
    jobs->head = slot->job_next;
    if (!jobs->head)
        jobs->tail = &jobs->head;
    if (!jobs->head || jobs->begun == &slot->job_next)
        jobs->begun = &jobs->head;
    slot->job_queued = false;
    return slot;
}

/* Waits for it. NULL: the thread is to end. */
static ap_slot *next(ap_jobs *jobs)
{
    pthread_mutex_lock(&jobs->mutex);
    while (!jobs->head && !jobs->stopped)
        pthread_cond_wait(&jobs->wake, &jobs->mutex);
    ap_slot *slot = jobs->stopped ? NULL : take_first(jobs);
    pthread_mutex_unlock(&jobs->mutex);
    return slot;
}

static void *run(void *arg)
{
    ap_poller *poller = arg;
    ap_slot *slot;
    ap_sys_thread_name("anypoll-jobs");
    while ((slot = next(&poller->jobs)) != NULL) {
        slot->ops->job(slot);
        ap_slot_unref(slot);
    }
    return NULL;
}

/* With the mutex. */
static int need_thread(ap_poller *poller)
{
    ap_jobs *jobs = &poller->jobs;
    if (jobs->has_thread)
        return 0;
    int rc = ap_sys_thread(&jobs->thread, run, poller);
    if (rc == 0) {
        jobs->has_thread = true;
        ap_poller_ref(poller);
    }
    return rc;
}

/* ---- pushing ---------------------------------------------------------- */

static void insert(ap_jobs *jobs, ap_slot *slot, ap_slot **at)
{
    slot->job_queued = true;
    slot->job_next = *at;
    *at = slot;
    if (jobs->tail == at)
        jobs->tail = &slot->job_next;
}

int ap_jobs_push(ap_slot *slot, bool begun)
{
    AP_ASSERT_LOCKED(slot);
    AP_ASSERT(slot->ops->job);
    ap_jobs *jobs = &slot->poller->jobs;
    pthread_mutex_lock(&jobs->mutex);
    int rc = jobs->stopped ? -ECANCELED : need_thread(slot->poller);
    if (rc == 0 && !slot->job_queued) {
        ap_slot_ref(slot);
        insert(jobs, slot, begun ? jobs->begun : jobs->tail);
        if (begun)
            jobs->begun = &slot->job_next;
    }
    pthread_mutex_unlock(&jobs->mutex);
    if (rc == 0)
        pthread_cond_signal(&jobs->wake); /* no system call unless it sleeps */
    return rc;
}

/* ---- beginning and end ------------------------------------------------ */

void ap_jobs_allow(ap_poller *poller)
{
    pthread_mutex_lock(&poller->jobs.mutex);
    poller->jobs.stopped = false;
    pthread_mutex_unlock(&poller->jobs.mutex);
}

/* A slot's last reference must not go under the mutex. */
static ap_slot *forget_first(ap_jobs *jobs)
{
    pthread_mutex_lock(&jobs->mutex);
    ap_slot *slot = jobs->head ? take_first(jobs) : NULL;
    pthread_mutex_unlock(&jobs->mutex);
    return slot;
}

void ap_jobs_stop(ap_poller *poller)
{
    ap_jobs *jobs = &poller->jobs;
    pthread_mutex_lock(&jobs->mutex);
    jobs->stopped = true;
    bool mine = jobs->has_thread; /* of two that stop, one joins */
    jobs->has_thread = false;
    pthread_mutex_unlock(&jobs->mutex);
    if (!mine)
        return;
    pthread_cond_signal(&jobs->wake);
    pthread_join(jobs->thread, NULL);
    ap_slot *slot;
    while ((slot = forget_first(jobs)) != NULL)
        ap_slot_unref(slot);
    ap_poller_unref(poller);
}
