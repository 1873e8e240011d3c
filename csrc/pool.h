/* A slab allocator of refcounted blocks: the memory of received bytes.
 *
 * Each poller has a pool, and each hub. Only the owner takes blocks; any thread drops
 * references.
 */
#ifndef ANYPOLL_POOL_H
#define ANYPOLL_POOL_H

#include "common.h"

#define AP_BLOCK_MIN (2u * 1024)        /* smallest block, header included */
#define AP_BLOCK_LARGE (32u * 1024)     /* from this size on blocks are mapped one by one */
#define AP_BLOCK_MAX (8u * 1024 * 1024) /* largest block that input is read into */

/* How long unused memory is kept because it may soon be needed, in nanoseconds. */
#define AP_TRIM_AFTER ((int64_t)1000 * 1000 * 1000)

typedef struct ap_pool ap_pool;
typedef struct ap_slab ap_slab;

/* The owner of blocks that it has left but views still hold: a connection. It counts their
 * bytes, and must exist as long as there are any. */
typedef struct ap_pins ap_pins;
struct ap_pins {
    ap_counter bytes;
    void (*hold)(ap_pins *pins);    /* (c) for one more block */
    void (*release)(ap_pins *pins); /* (c) for one fewer */
};

struct ap_block {
    _Atomic uint32_t refs; /* (a) acq_rel on the way down: the last one frees */
    uint32_t size;         /* (c) header included */
    uint32_t start;        /* (m) first unread byte, as an offset from the block */
    uint32_t end;          /* (m) after the last byte received */
    uint32_t epoch;        /* (c) */
    uint8_t size_class;    /* (c) */
    struct ap_block *next; /* (m) in a chain; (o) in a free list; (a) among the returned */
    ap_pool *home;         /* (c) */
    ap_slab *slab;         /* (c) NULL if mapped on its own */
    ap_pins *pins;         /* written before the chain's reference is dropped, read by whoever
                            * drops the last one; NULL if the block was not left to views */
};

#define AP_BLOCK_HEADER ((uint32_t)((sizeof(struct ap_block) + 15) & ~(size_t)15))

ap_pool *ap_pool_new(void);
/* Drops the owner's reference; the pool is freed with its last block. */
void ap_pool_unref(ap_pool *pool);
/* A block with at least that much room, and one reference. NULL: no memory. */
AP_MUST_CHECK ap_block *ap_pool_take(ap_pool *pool, size_t room);
/* Files what others gave back; slabs that are empty then go to the system, but for one of a size.
 */
void ap_pool_reclaim(ap_pool *pool);
/* Returns unneeded memory that others gave back to the system. */
void ap_pool_trim(ap_pool *pool);
/* Whether that can be worthwhile, now or when blocks that are out have come back: the pool has more
 * memory than one slab. */
bool ap_pool_can_trim(const ap_pool *pool);
/* Adds the pool's numbers to out. */
void ap_pool_statistics(ap_pool *pool, ap_poller_stats *out);
/* In the child of a fork: the parent's pools are not counted there. */
void ap_pools_reset(void);

static inline void ap_block_ref(ap_block *block)
{
    /* relaxed: whoever takes a reference holds one, so the block cannot vanish */
    atomic_fetch_add_explicit(&block->refs, 1, memory_order_relaxed);
}
/* Drops a chain's reference: if the block remains, views pin it, and it is
 * counted in pins (which may be NULL) for as long as they do. */
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
