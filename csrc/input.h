/* A connection's receive side: when it is read, how much, and into what. */
#ifndef ANYPOLL_INPUT_H
#define ANYPOLL_INPUT_H

#include "connection.h"
#include "context.h"

/* All of it is under the slot's mutex. */

/* Whether more should be received, if there is any. */
bool ap_input_wanted(ap_conn *conn);
/* Receives what is wanted, at most AP_BOUND. True: there may be more. */
bool ap_input_read(ap_context *context, ap_conn *conn);
/* Whether input may go straight from the socket to who asks for it. */
bool ap_input_may_go_straight(const ap_conn *conn);
/* Receives plain input into memory of the caller's, which consumes it. Returns the bytes; 0: none,
 * or nothing more will come. */
size_t ap_input_receive(ap_conn *conn, void *memory, size_t size);
/* Nothing is to be received now: checks what only events show. */
void ap_input_probe(ap_conn *conn);

/* Arms a wait for input. */
void ap_input_arm(ap_conn *conn, enum ap_want want, size_t n, int64_t deadline);
/* Whether there is a wait, and it is over: met, expired, or nothing more will come. */
bool ap_input_over(ap_conn *conn);

/* Consumes unread bytes; below low water reading resumes. */
void ap_input_consume(ap_conn *conn, size_t n);
/* The loop has read the block that is shown up to pos, and has no views of it: restarts it if
 * nothing else is unread. It stays shown. False: it stays as it is. */
bool ap_input_restart(ap_conn *conn, uint32_t pos);
/* Whether there is memory that nobody needs: an empty block. */
bool ap_input_idle(const ap_conn *conn);
/* Discards unread input, with its descriptors, and the wait. */
void ap_input_drop(ap_conn *conn);

#endif
