/* An endpoint: a registered descriptor's slot, with its poller and its hub.
 *
 * The caller closes at once, because AnyIO demands that the descriptor is closed when
 * aclose() returns, although a driver may be in the middle of a batch that contains it.
 * The order: mark closed, EPOLL_CTL_DEL, bump the generation, and close(2) last, because
 * that lets the number be reused. An event for the descriptor that epoll_wait had already
 * returned carries the old generation.
 */
#include "endpoint.h"

#include "clock.h"
#include "ending.h"
#include "hub.h"
#include "inbox.h"
#include "owned.h"
#include "poller.h"
#include "slot.h"
#include "sysio.h"

#include <sys/epoll.h>

int ap_endpoint_open(const ap_slot_ops *ops, ap_poller *poller, ap_hub *hub, int fd, ap_slot **out)
{
    ap_slot *slot;
    int rc = ap_poller_admit(poller);
    if (rc < 0)
        return rc;
    rc = ap_slot_take(ops, fd, &slot);
    if (rc < 0) {
        ap_poller_dismiss(poller);
        return rc;
    }
    slot->poller = poller;
    slot->hub = hub;
    slot->orphaned = ap_has_ended(poller); /* ap_slot_each has already been here */
    atomic_init(&slot->refs, 2);           /* the handle and the driver */
    ap_slot_unlock(slot);
    ap_poller_ref(poller);
    ap_hub_ref(hub);
    ap_count(&poller->slots, 1);
    *out = slot;
    return 0;
}

void ap_endpoint_free(ap_slot *slot)
{
    ap_poller *poller = slot->poller;
    ap_hub *hub = slot->hub;
    ap_slot_lock(slot);
    slot->poller = NULL;
    slot->hub = NULL;
    ap_slot_unlock(slot);
    ap_uncount(&poller->slots, 1);
    ap_slot_give(slot);
    ap_hub_unref(hub);
    ap_poller_unref(poller);
}

int ap_endpoint_watch(ap_slot *slot, uint32_t events)
{
    AP_ASSERT_LOCKED(slot);
    int rc = slot->orphaned ? ap_state(slot->poller)
                            : ap_sys_epoll_ctl(slot->poller->epfd, EPOLL_CTL_ADD, slot->fd, events,
                                               ap_slot_tag(slot));
    slot->watched = rc == 0;
    return rc;
}

int ap_endpoint_close(ap_slot *slot)
{
    AP_ASSERT_LOCKED(slot);
    int fd = slot->fd;
    slot->closed = true;
    slot->fd = -1;
    /* Fails with ENOENT if it was never registered, which is just as good. */
    int rc = ap_sys_epoll_ctl(slot->poller->epfd, EPOLL_CTL_DEL, fd, 0, 0);
    (void)rc;
    atomic_fetch_add_explicit(&slot->generation, 1, memory_order_relaxed);
    ap_inbox_push(slot, AP_BOX_CLOSED, AP_FOREVER);
    return fd;
}

int ap_endpoint_closed(ap_slot *slot, int fd, bool reset, bool keep_fd)
{
    ap_hub_unlink(slot);
    ap_poller_dismiss(slot->poller);
    if (reset)
        ap_sys_linger_now(fd);
    if (!keep_fd)
        ap_sys_close(fd);
    else
        ap_fd_disown(fd);
    if (slot->orphaned)      /* constant from the close on */
        ap_slot_unref(slot); /* for the driver, which no longer exists */
    return keep_fd ? fd : 0;
}
