/* A connection's send queue. */
#ifndef ANYPOLL_QUEUE_H
#define ANYPOLL_QUEUE_H

#include "connection.h"

/* All of it is under the slot's mutex. */

/* Room for so many more pieces, at the end of the array. False: no memory. */
AP_MUST_CHECK bool ap_queue_reserve(ap_conn *conn, uint32_t more);
/* Queues Python's pieces, without their first skip bytes. False: no memory. */
AP_MUST_CHECK bool ap_queue_append(ap_conn *conn, const struct iovec *iov, size_t count,
                                   size_t skip);
/* The first n bytes of the pieces are done. */
void ap_queue_advance(ap_conn *conn, size_t n);
/* All of them are. */
void ap_queue_forget(ap_conn *conn);
/* After whatever makes the queue empty, or no longer empty: the guard wants to know. */
void ap_queue_count(ap_conn *conn);
/* Tells the loop whatever the state of the queue requires. */
void ap_queue_tell(ap_conn *conn);

/* Makes one system call, with a bounded number of pieces and bytes. False: the kernel takes no more
 * now, or the connection has failed. */
bool ap_queue_offer(ap_conn *conn, const struct iovec *iov, size_t count, size_t *sent);
/* The kernel took n bytes of the offered. */
void ap_queue_took(ap_conn *conn, size_t n, size_t offered);
/* The kernel took nothing: EAGAIN. */
void ap_queue_again(ap_conn *conn);

/* Whether a wait for output is over, if there is one: nothing is queued, or nothing can be sent. */
bool ap_queue_over(const ap_conn *conn);
/* The events epoll should watch. */
uint32_t ap_queue_events(const ap_conn *conn);
/* Has epoll report room; not on TCP, where it always does. */
void ap_queue_watch(ap_conn *conn, bool on);
/* Nothing is stalled any more, unless someone waits for room. */
void ap_queue_unwatch(ap_conn *conn);

/* Nothing can be sent any more: drops the queue, and tells whoever waits. */
void ap_queue_fail(ap_conn *conn, int error);
/* The same after a system call, whose error is the socket's: the input ends too. */
void ap_queue_break(ap_conn *conn, int error);
/* Drops the queue without telling anyone: the connection is closed. */
void ap_queue_drop(ap_conn *conn);

#endif
