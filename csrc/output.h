/* A connection's send path. */
#ifndef ANYPOLL_OUTPUT_H
#define ANYPOLL_OUTPUT_H

#include "connection.h"

/* All of it is under the slot's mutex. */

/* Sends pieces, and queues what the kernel does not take. Returns the bytes queued; -ENOMEM; the
 * write error. */
int64_t ap_output_send(ap_conn *conn, const ap_piece *pieces, int count);
/* Copies a little output, for the driver to send. False: the caller must send it otherwise. */
bool ap_output_hand_over(ap_conn *conn, const char *data, size_t size);
/* Lets the driver continue with the queue. True: work is left. */
bool ap_output_write(ap_conn *conn);

#endif
