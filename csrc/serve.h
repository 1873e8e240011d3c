/* A driver's connection handler: I/O, deadlines, and notifications to the loop. */
#ifndef ANYPOLL_SERVE_H
#define ANYPOLL_SERVE_H

#include "connection.h"
#include "context.h"

/* Four of a slot's operations; slot.h describes them. */
bool ap_conn_serve(ap_slot *slot, ap_context *context);
int64_t ap_conn_expire(ap_slot *slot, int64_t now);
void ap_conn_fail(ap_slot *slot, int error);
uint32_t ap_conn_resolve(ap_slot *slot, uint32_t bits, int32_t *value);

#endif
