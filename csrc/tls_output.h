/* TLS output: plaintext from the queue becomes records, which the kernel gets at once. */
#ifndef ANYPOLL_TLS_OUTPUT_H
#define ANYPOLL_TLS_OUTPUT_H

#include "connection.h"

/* All of it is under the slot's mutex. */

/* Encrypts from the front of the pieces, without their first skip bytes, as much as goes out at
 * once. Returns the bytes of plaintext; 0: nothing may be encrypted now, or it has failed. */
size_t ap_tls_seal(ap_conn *conn, const struct iovec *iov, size_t count, size_t skip);
/* Counts what OpenSSL has made as queued, and sends it. False: the kernel takes no more now, or
 * the connection has failed. */
bool ap_tls_push(ap_conn *conn);

/* OpenSSL's result was rc <= 0: notes why, sends the alert, and ends both directions. */
void ap_tls_fail(ap_conn *conn, int rc);
/* The same for another reason, without an alert. */
void ap_tls_break(ap_conn *conn, int error);
/* The peer has ended the connection: read_end says whether it may. */
void ap_tls_cut_off(ap_conn *conn);

#endif
