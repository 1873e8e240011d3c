/* An allocation context for reading sockets: a block pool and a scratch buffer.
 *
 * The readers are each poller's driver and each hub's loop; each has a context of its own.
 */
#ifndef ANYPOLL_CONTEXT_H
#define ANYPOLL_CONTEXT_H

#include "pool.h"

#define AP_SCRATCH (64u * 1024)

typedef struct ap_context {
    ap_pool *pool;    /* (o) */
    uint8_t *scratch; /* (o) AP_SCRATCH bytes */
} ap_context;

AP_MUST_CHECK int ap_context_init(ap_context *context);
void ap_context_free(ap_context *context);

#endif
