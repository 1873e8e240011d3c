/* Writing a connection. */
#ifndef ANYPOLL_OUTPUT_H
#define ANYPOLL_OUTPUT_H

#include "connection.h"

uint32_t ap_output_events(const ap_conn *conn);
bool ap_output_write(ap_conn *conn);
bool ap_output_over(const ap_conn *conn);
int64_t ap_output_send(ap_conn *conn, const ap_piece *pieces, int count);
/* Copies a little output, for the driver to send. False: do it otherwise. */
bool ap_output_hand_over(ap_conn *conn, const char *data, size_t size);
void ap_output_fail(ap_conn *conn, int error);
/* The same after a system call, whose error is the socket's: the input ends too. */
void ap_output_break(ap_conn *conn, int error);
/* The kernel took n bytes of the offered. */
void ap_output_took(ap_conn *conn, size_t n, size_t offered);
/* The kernel took nothing: EAGAIN. */
void ap_output_again(ap_conn *conn);
void ap_output_drop(ap_conn *conn);

#endif
