/* An endpoint: a registered descriptor's slot, with its poller and its hub.
 *
 * This is the common part of connections and listeners, which add what they do
 * with it (ap_slot_ops).
 */
#ifndef ANYPOLL_ENDPOINT_H
#define ANYPOLL_ENDPOINT_H

#include "slot.h"

/* Takes a slot for fd, with two references: the handle's and the driver's. Neither the poller
 * nor the hub knows it yet. 0; -ENOMEM; AP_EPOLLER. */
AP_MUST_CHECK int ap_endpoint_open(const ap_slot_ops *ops, ap_poller *poller, ap_hub *hub, int fd,
                                   ap_slot **out);
/* Has epoll watch the slot, under its mutex. 0; -errno; AP_EPOLLER. */
AP_MUST_CHECK int ap_endpoint_watch(ap_slot *slot, uint32_t events);

/* The first part of closing, under the slot's mutex: removes it from epoll, and bumps
 * the generation. Returns the descriptor. */
int ap_endpoint_close(ap_slot *slot);
/* The second part, without the mutex: removes it from the hub, and closes the descriptor
 * last, because that may block (SO_LINGER). Returns the descriptor, if kept, or 0. */
int ap_endpoint_closed(ap_slot *slot, int fd, bool reset, bool keep_fd);
/* Called when the last reference, and with it the connection's or listener's own part, is gone. */
void ap_endpoint_free(ap_slot *slot);

#endif
