/* Reading for the loop: bytes, a request, a delimiter. */
#ifndef ANYPOLL_READ_H
#define ANYPOLL_READ_H

#include "connection.h"

/* Nothing will do but waiting: sends the output that came along, and arms. */
int64_t ap_read_wait(ap_conn *conn, enum ap_want want, size_t n, int flags, int64_t deadline,
                     const char *output, size_t output_size);

#endif
