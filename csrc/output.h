/* A connection's send queue. */
#ifndef ANYPOLL_OUTPUT_H
#define ANYPOLL_OUTPUT_H

#include "connection.h"

/* All of it is under the slot's mutex. */

/* Sends pieces, and queues what the kernel does not take. Returns the bytes queued; -ENOMEM; the
 * write error. */
int64_t ap_output_send(ap_conn *conn, const ap_piece *pieces, int count);
/* Queues Python's pieces, without their first skip bytes. False: no memory. */
bool ap_output_queue(ap_conn *conn, const struct iovec *iov, size_t count, size_t skip);
/* Copies a little output, for the driver to send. False: the caller must send it otherwise. */
bool ap_output_hand_over(ap_conn *conn, const char *data, size_t size);
/* Lets the driver continue with the queue. True: work is left. */
bool ap_output_write(ap_conn *conn);

/* After whatever makes the queue empty, or no longer empty: the guard wants to know. */
void ap_output_count(ap_conn *conn);

/* The kernel took n bytes of the offered. */
void ap_output_took(ap_conn *conn, size_t n, size_t offered);
/* The kernel took nothing: EAGAIN. */
void ap_output_again(ap_conn *conn);

/* Whether a wait for output is over, if there is one: nothing is queued, or nothing can be sent. */
bool ap_output_over(const ap_conn *conn);
/* The events epoll should watch. */
uint32_t ap_output_events(const ap_conn *conn);
/* Has epoll report room; not on TCP, where it always does. */
void ap_output_watch(ap_conn *conn, bool on);
/* Nothing is stalled any more, unless someone waits for room. */
void ap_output_unwatch(ap_conn *conn);

/* Nothing can be sent any more: drops the queue, and tells whoever waits. */
void ap_output_fail(ap_conn *conn, int error);
/* The same after a system call, whose error is the socket's: the input ends too. */
void ap_output_break(ap_conn *conn, int error);
/* Drops the queue without telling anyone: the connection is closed. */
void ap_output_drop(ap_conn *conn);

#endif
