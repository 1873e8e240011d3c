/* A slab allocator of refcounted blocks: the memory of received bytes.
 *
 * Each poller has a pool, and each hub. Only the owner takes blocks; any thread drops
 * references.
 */
#ifndef ANYPOLL_POOL_H
#define ANYPOLL_POOL_H

#include "common.h"

#define AP_BLOCK_MIN (2u * 1024)        /* smallest block, header included */
#define AP_BLOCK_LARGE (32u * 1024)     /* from here on blocks are mapped one by one */
#define AP_BLOCK_MAX (8u * 1024 * 1024) /* largest block that input is read to */

/* How long memory that nobody needs is kept for who may need it soon, in nanoseconds. */
#define AP_TRIM_AFTER ((int64_t)1000 * 1000 * 1000)

typedef struct ap_pool ap_pool;
typedef struct ap_slab ap_slab;

/* Whoever leaves blocks that views still hold: a connection. It counts their bytes, and has
 * to stay as long as there are any. */
typedef struct ap_pins ap_pins;
struct ap_pins {
    ap_counter bytes;
    void (*hold)(ap_pins *pins);    /* (c) for one more block */
    void (*release)(ap_pins *pins); /* (c) for one less */
};

struct ap_block {
    _Atomic uint32_t refs; /* (a) acq_rel on the way down: the last one frees */
    uint32_t size;         /* (c) header included */
    uint32_t start;        /* (m) first unread byte, as an offset from the block */
    uint32_t end;          /* (m) behind the last byte received */
    uint32_t epoch;        /* (c) */
    uint8_t size_class;    /* (c) */
    struct ap_block *next; /* (m) in a chain; (o) in a free list; (a) among the returned */
    ap_pool *home;         /* (c) */
    ap_slab *slab;         /* (c) NULL if mapped by itself */
    ap_pins *pins;         /* written before the chain's reference is dropped, read by whoever
                            * drops the last one; NULL if the block was not left to views */
};

#define AP_BLOCK_HEADER ((uint32_t)((sizeof(struct ap_block) + 15) & ~(size_t)15))

ap_pool *ap_pool_new(void);
/* The owner leaves; the pool goes with its last block. */
void ap_pool_unref(ap_pool *pool);
/* A block with so much room at least, and one reference. NULL: no memory. */
AP_MUST_CHECK ap_block *ap_pool_take(ap_pool *pool, size_t room);
/* Gives what others returned back to the system, as far as it is not needed. */
void ap_pool_trim(ap_pool *pool);
/* Adds the pool's numbers to out. */
void ap_pool_statistics(ap_pool *pool, ap_poller_stats *out);
/* In the child of a fork: the parent's pools are not counted there. */
void ap_pools_reset(void);

static inline void ap_block_ref(ap_block *block)
{
    /* relaxed: whoever takes a reference holds one, so the block cannot go */
    atomic_fetch_add_explicit(&block->refs, 1, memory_order_relaxed);
}
/* Drops the reference of a chain: what remains is pinned by views, and counted
 * in pins (which may be NULL) as long as it is. */
void ap_block_leave(ap_block *block, ap_pins *pins);

static inline uint8_t *ap_block_at(ap_block *block, uint32_t offset)
{
    return (uint8_t *)block + offset;
}
static inline uint32_t ap_block_room(const ap_block *block)
{
    return block->size - block->end;
}

#endif
