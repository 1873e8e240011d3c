/* What the driver does for a connection: it reads, writes, and keeps the deadlines. */
#ifndef ANYPOLL_SERVE_H
#define ANYPOLL_SERVE_H

#include "connection.h"
#include "context.h"

/* What the driver does for a slot, under its mutex. True: work is left. */
bool ap_conn_serve(ap_context *context, ap_conn *conn);
void ap_conn_expire(ap_conn *conn, int64_t now);
/* Its poller has failed: it is broken. */
void ap_conn_fail(ap_conn *conn, int error);
int64_t ap_conn_next_deadline(const ap_conn *conn);
uint32_t ap_conn_resolve(ap_conn *conn, uint32_t bits, int32_t *value);

#endif
