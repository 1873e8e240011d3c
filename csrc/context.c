/* An allocation context for reading sockets: a block pool and a scratch buffer.
 *
 * Input of unknown size is first received into the scratch buffer, so that a block of
 * the right size can be taken for it (input.c).
 */
#include "context.h"

#include "pool.h"
#include "sysio.h"

#include <stdlib.h>

int ap_context_init(ap_context *context)
{
    context->pool = ap_pool_new();
    context->scratch = context->pool ? ap_sys_alloc(AP_SCRATCH) : NULL;
    if (context->scratch)
        return 0;
    if (context->pool)
        ap_pool_unref(context->pool);
    return -ENOMEM;
}

void ap_context_free(ap_context *context)
{
    free(context->scratch);
    ap_pool_unref(context->pool);
}
