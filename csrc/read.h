/* What the loop asks of a connection's input. */
#ifndef ANYPOLL_READ_H
#define ANYPOLL_READ_H

#include "connection.h"

/* Consumes up to pos in the block that is shown; what is unread behind it. */
void ap_read_to(ap_conn *conn, uint32_t pos);
size_t ap_read_left(const ap_conn *conn, uint32_t pos);
/* The end of the window, if n bytes lie in the block that was shown; else 0. */
uint32_t ap_read_shown(const ap_conn *conn, size_t n);
/* Nothing will do but waiting: sends the output that came along, and arms. */
int64_t ap_read_wait(ap_conn *conn, enum ap_want want, size_t n, int flags, int64_t deadline,
                     const char *output, size_t output_size);

#endif
