/* When, how much, and into what a connection is read. */
#ifndef ANYPOLL_INPUT_H
#define ANYPOLL_INPUT_H

#include "connection.h"
#include "context.h"

/* The caller holds the mutex. */
bool ap_input_wanted(ap_conn *conn);
bool ap_input_read(ap_context *context, ap_conn *conn);
bool ap_input_over(ap_conn *conn);
bool ap_input_idle(const ap_conn *conn);
void ap_input_probe(ap_conn *conn);
void ap_input_consume(ap_conn *conn, size_t n);
void ap_input_arm(ap_conn *conn, enum ap_want want, size_t n, int64_t deadline);
void ap_input_drop(ap_conn *conn);
/* recvmsg said EAGAIN. */
void ap_input_nothing(ap_conn *conn);
/* recvmsg said 0: AP_EEOF, or the error that somebody else was told. */
int ap_input_end(const ap_conn *conn);
void ap_input_note(ap_conn *conn, size_t got);
/* A last block that was read to its end, and that no view needs, begins anew. */
void ap_input_rewind(ap_conn *conn);

#endif
