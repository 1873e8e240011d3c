/* TLS input: ciphertext from the socket becomes plaintext on the chain. */
#ifndef ANYPOLL_TLS_INPUT_H
#define ANYPOLL_TLS_INPUT_H

#include "connection.h"
#include "context.h"

/* All of it is under the slot's mutex. */

/* Whether ciphertext may be received, as far as the session is concerned. */
bool ap_tls_is_open(const ap_tls *tls);
/* Receives ciphertext, about max bytes, and appends the plaintext to the connection's input.
 * Returns the bytes of ciphertext; 0: that was all for now, or for ever. */
size_t ap_tls_receive(ap_context *context, ap_conn *conn, size_t max);

#endif
