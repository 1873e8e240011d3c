/* A poller: an epoll descriptor with its event descriptor, its state, and its counters.
 *
 * Each open slot holds a reference. The descriptors are closed with the last one, because
 * loops may be in the middle of a call with them.
 */
#include "poller.h"

#include "clock.h"
#include "context.h"
#include "epoch.h"
#include "pool.h"
#include "sysio.h"
#include "timer.h"

#include <stdlib.h>
#include <sys/epoll.h>

#ifdef AP_DEBUG
_Thread_local ap_poller *ap_driving;
#endif

/* ---- creating and freeing --------------------------------------------- */

static int open_descriptors(ap_poller *poller)
{
    poller->epfd = ap_sys_epoll_create();
    if (poller->epfd < 0)
        return poller->epfd;
    poller->efd = ap_sys_eventfd();
    poller->gfd = poller->efd < 0 ? poller->efd : ap_sys_eventfd();
    int rc = poller->gfd;
    if (rc >= 0) /* edge-triggered, so it never has to be read */
        rc = ap_sys_epoll_ctl(poller->epfd, EPOLL_CTL_ADD, poller->efd, EPOLLIN | EPOLLET,
                              AP_TAG_OF_EFD);
    if (rc >= 0)
        return 0;
    if (poller->gfd >= 0)
        ap_sys_close(poller->gfd);
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
    pthread_mutex_init(&poller->jobs.mutex, NULL);
    pthread_cond_init(&poller->jobs.wake, NULL);
    poller->jobs.tail = poller->jobs.begun = &poller->jobs.head;
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

void ap_poller_rouse(ap_poller *poller)
{
    ap_sys_signal(poller->efd);
    ap_sys_signal(poller->gfd);
}

void ap_poller_unref(ap_poller *poller)
{
    if (poller->epoch != ap_epoch_now())
        return;
    /* acq_rel; pairs with itself */
    if (atomic_fetch_sub_explicit(&poller->refs, 1, memory_order_acq_rel) != 1)
        return;
    ap_sys_close(poller->gfd);
    ap_sys_close(poller->efd);
    ap_sys_close(poller->epfd);
    ap_context_free(&poller->context);
    AP_ASSERT(!poller->jobs.head && !poller->jobs.has_thread);
    pthread_cond_destroy(&poller->jobs.wake);
    pthread_mutex_destroy(&poller->jobs.mutex);
    pthread_mutex_destroy(&poller->lease);
    free(poller);
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
        .looks = ap_counted(&poller->looks),
        .spins = ap_counted(&poller->spins),
        .hits = ap_counted(&poller->hits),
    };
    ap_pool_statistics(poller->context.pool, out);
    return 0;
}
