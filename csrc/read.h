/* The loop's read calls: bytes, a request, a delimiter. */
#ifndef ANYPOLL_READ_H
#define ANYPOLL_READ_H

#include "connection.h"

/* Only waiting is left: sends the output that came along, and arms. Under the slot's mutex.
 * Returns as ap_conn_read when that has to wait: -EAGAIN, AP_EQUEUED, AP_ELATE, -ENOMEM. */
int64_t ap_read_wait(ap_conn *conn, enum ap_want want, size_t n, int flags, int64_t deadline,
                     const char *output, size_t output_size);

#endif
