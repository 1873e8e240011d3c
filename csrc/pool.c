/* A slab allocator of refcounted blocks: the memory of received bytes.
 *
 * There is one per poller and one per hub. Why not malloc: blocks are taken in one
 * thread and freed in another, and some live for seconds but most for microseconds.
 * Measured with malloc, 400 MB of 64 KiB blocks of which every eighth survived kept
 * 412 MB resident. So:
 *   - blocks of 32 KiB and more are mapped one by one, in powers of two, with a
 *     bounded cache; what exceeds it goes back to the system at once;
 *   - smaller ones come from slabs of one size, and an empty slab goes back too,
 *     except for one per size.
 *
 * Only the owner takes. Any thread gives back, by pushing onto `returned`; the
 * owner takes that list whole, so there is no ABA. The pool is refcounted by its
 * owner and by every block in use, so that a view may outlive the loop, the
 * poller, and the connection it came from.
 */
#include "pool.h"

#include "epoch.h"
#include "sysio.h"

#include <stdlib.h>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define POISON(p, n) __asan_poison_memory_region(p, n)
#define UNPOISON(p, n) __asan_unpoison_memory_region(p, n)
#else
#define POISON(p, n) ((void)(p), (void)(n))
#define UNPOISON(p, n) ((void)(p), (void)(n))
#endif

#define SMALL_CLASSES 4  /* 2, 4, 8, 16 KiB: from slabs */
#define CACHED_CLASSES 9 /* 32 KiB to 8 MiB: mapped, and cached if the limit allows */
#define UNCACHED 255     /* other sizes: mapped, never kept */
#define SLAB_MIN (64u * 1024)
#define SLAB_BLOCKS_MIN 8u
#define CACHE_LIMIT (4u * 1024 * 1024)
#define PAGE 4096u

struct ap_slab {
    struct ap_slab *prev, *next; /* (o) slabs of one size that have a free block */
    uint8_t *memory;             /* (c) */
    ap_block *free;              /* (o) */
    uint32_t size, used;         /* (c) (o) */
};

struct ap_pool {
    _Atomic uint32_t refs;            /* (a) acq_rel on the way down */
    uint32_t epoch;                   /* (c) */
    ap_slab partial[SMALL_CLASSES];   /* (o) ring heads */
    uint32_t empty[SMALL_CLASSES];    /* (o) slabs in the ring that are wholly free */
    ap_block *cached[CACHED_CLASSES]; /* (o) */
    _Atomic size_t cached_bytes;      /* (a) relaxed: a bound, not a ledger */
    ap_block *_Atomic returned;       /* (a) release in give_back, acquire in reclaim */
    ap_counter blocks_in_use, bytes_in_use, blocks_free, bytes_free, bytes_pinned;
    ap_pool *prev, *next; /* under pools_mutex */
};

/* All pools, for statistics: views keep memory even of pollers and loops that have ended. */
static pthread_mutex_t pools_mutex = PTHREAD_MUTEX_INITIALIZER;
static ap_pool *pools; /* under pools_mutex */

static void enlist(ap_pool *pool)
{
    pthread_mutex_lock(&pools_mutex);
    pool->next = pools;
    if (pools)
        pools->prev = pool;
    pools = pool;
    pthread_mutex_unlock(&pools_mutex);
}

static void delist(ap_pool *pool)
{
    pthread_mutex_lock(&pools_mutex);
    if (pool->prev)
        pool->prev->next = pool->next;
    else
        pools = pool->next;
    if (pool->next)
        pool->next->prev = pool->prev;
    pthread_mutex_unlock(&pools_mutex);
}

void ap_pools_reset(void)
{
    pthread_mutex_init(&pools_mutex, NULL);
    pools = NULL;
}

ap_pool *ap_pool_new(void)
{
    ap_pool *pool = ap_sys_alloc(sizeof *pool);
    if (!pool)
        return NULL;
    atomic_init(&pool->refs, 1);
    pool->epoch = ap_epoch_now();
    for (int i = 0; i < SMALL_CLASSES; i++)
        pool->partial[i].prev = pool->partial[i].next = &pool->partial[i];
    enlist(pool);
    return pool;
}

/* ---- slabs ------------------------------------------------------------ */

static uint32_t small_size(int size_class)
{
    return AP_BLOCK_MIN << size_class;
}

static uint32_t slab_bytes(int size_class)
{
    uint32_t least = small_size(size_class) * SLAB_BLOCKS_MIN;
    return least > SLAB_MIN ? least : SLAB_MIN;
}

static void slab_link(ap_slab *head, ap_slab *slab)
{
    slab->prev = head;
    slab->next = head->next;
    head->next->prev = slab;
    head->next = slab;
}

static void slab_unlink(ap_slab *slab)
{
    slab->prev->next = slab->next;
    slab->next->prev = slab->prev;
    slab->prev = slab->next = NULL;
}

static ap_slab *slab_new(ap_pool *pool, int size_class)
{
    ap_slab *slab = ap_sys_alloc(sizeof *slab);
    if (!slab)
        return NULL;
    slab->size = slab_bytes(size_class);
    slab->memory = ap_sys_map(slab->size);
    if (!slab->memory) {
        free(slab);
        return NULL;
    }
    uint32_t size = small_size(size_class), n = slab->size / size;
    for (uint32_t i = n; i-- > 0;) {
        ap_block *block = (ap_block *)(slab->memory + (size_t)i * size);
        block->next = slab->free;
        slab->free = block;
    }
    slab_link(&pool->partial[size_class], slab);
    pool->empty[size_class]++;
    ap_count(&pool->blocks_free, n);
    ap_count(&pool->bytes_free, slab->size);
    return slab;
}

static void slab_free(ap_pool *pool, ap_slab *slab, int size_class)
{
    uint32_t n = slab->size / small_size(size_class);
    slab_unlink(slab);
    pool->empty[size_class]--;
    ap_uncount(&pool->blocks_free, n);
    ap_uncount(&pool->bytes_free, slab->size);
    UNPOISON(slab->memory, slab->size);
    ap_sys_unmap(slab->memory, slab->size);
    free(slab);
}

static ap_block *slab_take(ap_pool *pool, int size_class)
{
    ap_slab *head = &pool->partial[size_class];
    ap_slab *slab = head->next != head ? head->next : slab_new(pool, size_class);
    if (!slab)
        return NULL;
    if (slab->used++ == 0)
        pool->empty[size_class]--;
    ap_block *block = slab->free;
    UNPOISON(block, small_size(size_class));
    slab->free = block->next;
    if (!slab->free)
        slab_unlink(slab);
    block->slab = slab;
    ap_uncount(&pool->blocks_free, 1);
    ap_uncount(&pool->bytes_free, small_size(size_class));
    return block;
}

static void slab_give(ap_pool *pool, ap_block *block, int size_class)
{
    ap_slab *slab = block->slab;
    if (!slab->free)
        slab_link(&pool->partial[size_class], slab);
    block->next = slab->free;
    slab->free = block;
    POISON(ap_block_at(block, AP_BLOCK_HEADER), small_size(size_class) - AP_BLOCK_HEADER);
    ap_count(&pool->blocks_free, 1);
    ap_count(&pool->bytes_free, small_size(size_class));
    if (--slab->used == 0 && pool->empty[size_class]++ > 0)
        slab_free(pool, slab, size_class);
}

/* ---- mapped blocks ---------------------------------------------------- */

static ap_block *large_take(ap_pool *pool, uint32_t size, int size_class)
{
    if (size_class != UNCACHED && pool->cached[size_class - SMALL_CLASSES]) {
        ap_block *block = pool->cached[size_class - SMALL_CLASSES];
        UNPOISON(block, size);
        pool->cached[size_class - SMALL_CLASSES] = block->next;
        atomic_fetch_sub_explicit(&pool->cached_bytes, size, memory_order_relaxed);
        ap_uncount(&pool->blocks_free, 1);
        ap_uncount(&pool->bytes_free, size);
        return block;
    }
    return ap_sys_map(size);
}

static void large_free(ap_block *block)
{
    ap_sys_unmap(block, block->size);
}

static void large_give(ap_pool *pool, ap_block *block, int size_class)
{
    ap_block **list = &pool->cached[size_class - SMALL_CLASSES];
    block->next = *list;
    *list = block;
    POISON(ap_block_at(block, AP_BLOCK_HEADER), block->size - AP_BLOCK_HEADER);
    ap_count(&pool->blocks_free, 1);
    ap_count(&pool->bytes_free, block->size);
}

/* ---- taking and giving back ------------------------------------------- */

static int class_of(size_t total, uint32_t *size)
{
    int size_class = 0;
    for (*size = AP_BLOCK_MIN; *size < total; *size <<= 1) {
        if (++size_class == SMALL_CLASSES + CACHED_CLASSES) {
            *size = (uint32_t)((total + PAGE - 1) & ~(size_t)(PAGE - 1));
            return UNCACHED;
        }
    }
    return size_class;
}

/* Takes the whole list of returned blocks, and files them. */
static void reclaim(ap_pool *pool)
{
    /* acquire; pairs with the release in give_back */
    ap_block *block = atomic_exchange_explicit(&pool->returned, NULL, memory_order_acquire);
    while (block) {
        ap_block *next = block->next;
        if (block->size_class < SMALL_CLASSES)
            slab_give(pool, block, block->size_class);
        else
            large_give(pool, block, block->size_class);
        block = next;
    }
}

ap_block *ap_pool_take(ap_pool *pool, size_t room)
{
    uint32_t size;
    if (room > UINT32_MAX - AP_BLOCK_HEADER - PAGE)
        return NULL;
    int size_class = class_of(room + AP_BLOCK_HEADER, &size);
    /* relaxed: only a hint; the exchange in reclaim synchronises */
    if (atomic_load_explicit(&pool->returned, memory_order_relaxed))
        reclaim(pool);
    ap_block *block = size_class < SMALL_CLASSES ? slab_take(pool, size_class)
                                                 : large_take(pool, size, size_class);
    if (!block)
        return NULL;
    atomic_init(&block->refs, 1);
    block->size = size;
    block->start = block->end = AP_BLOCK_HEADER;
    block->epoch = pool->epoch;
    block->size_class = (uint8_t)size_class;
    block->next = NULL;
    block->home = pool;
    block->pins = NULL;
    /* relaxed: the owner holds a reference of its own */
    atomic_fetch_add_explicit(&pool->refs, 1, memory_order_relaxed);
    ap_count(&pool->blocks_in_use, 1);
    ap_count(&pool->bytes_in_use, size);
    return block;
}

static bool cache_has_room(ap_pool *pool, const ap_block *block)
{
    if (block->size_class == UNCACHED)
        return false;
    size_t had = atomic_fetch_add_explicit(&pool->cached_bytes, block->size, memory_order_relaxed);
    if (had + block->size <= CACHE_LIMIT)
        return true;
    atomic_fetch_sub_explicit(&pool->cached_bytes, block->size, memory_order_relaxed);
    return false;
}

static void give_back(ap_block *block)
{
    ap_pool *pool = block->home;
    ap_uncount(&pool->blocks_in_use, 1);
    ap_uncount(&pool->bytes_in_use, block->size);
    if (block->size_class >= SMALL_CLASSES && !cache_has_room(pool, block)) {
        large_free(block);
    } else {
        ap_block *head = atomic_load_explicit(&pool->returned, memory_order_relaxed);
        do
            block->next = head;
        while (!atomic_compare_exchange_weak_explicit(&pool->returned, &head, block,
                                                      memory_order_release, /* with reclaim */
                                                      memory_order_relaxed));
    }
    ap_pool_unref(pool);
}

void ap_pool_reclaim(ap_pool *pool)
{
    if (atomic_load_explicit(&pool->returned, memory_order_relaxed)) /* as in ap_pool_take */
        reclaim(pool);
}

void ap_pool_trim(ap_pool *pool)
{
    reclaim(pool);
    for (int i = 0; i < CACHED_CLASSES; i++) {
        while (pool->cached[i]) {
            ap_block *block = pool->cached[i];
            pool->cached[i] = block->next;
            atomic_fetch_sub_explicit(&pool->cached_bytes, block->size, memory_order_relaxed);
            ap_uncount(&pool->blocks_free, 1);
            ap_uncount(&pool->bytes_free, block->size);
            UNPOISON(block, block->size);
            large_free(block);
        }
    }
}

bool ap_pool_can_trim(const ap_pool *pool)
{
    return ap_counted(&pool->bytes_in_use) + ap_counted(&pool->bytes_free) > SLAB_MIN;
}

void ap_pool_unref(ap_pool *pool)
{
    /* acq_rel; pairs with itself: the last one sees what the others wrote */
    if (atomic_fetch_sub_explicit(&pool->refs, 1, memory_order_acq_rel) != 1)
        return;
    delist(pool);
    ap_pool_trim(pool);
    for (int i = 0; i < SMALL_CLASSES; i++) {
        while (pool->partial[i].next != &pool->partial[i])
            slab_free(pool, pool->partial[i].next, i);
    }
    free(pool);
}

void ap_pool_statistics(ap_pool *pool, ap_poller_stats *out)
{
    out->blocks_in_use += ap_counted(&pool->blocks_in_use);
    out->bytes_in_use += ap_counted(&pool->bytes_in_use);
    out->blocks_free += ap_counted(&pool->blocks_free);
    out->bytes_free += ap_counted(&pool->bytes_free);
    out->bytes_pinned += ap_counted(&pool->bytes_pinned);
}

int ap_memory_statistics(ap_poller_stats *out)
{
    memset(out, 0, sizeof *out);
    pthread_mutex_lock(&pools_mutex);
    for (ap_pool *pool = pools; pool; pool = pool->next)
        ap_pool_statistics(pool, out);
    pthread_mutex_unlock(&pools_mutex);
    return 0;
}

/* ---- references ------------------------------------------------------- */

void ap_block_unref(ap_block *block)
{
    if (block->epoch != ap_epoch_now())
        return; /* inherited through fork: it leaks, but only in the child */
    /* acq_rel; pairs with itself: whoever frees sees every use before */
    if (atomic_fetch_sub_explicit(&block->refs, 1, memory_order_acq_rel) != 1)
        return;
    ap_pins *pins = block->pins;
    ap_uncount(&block->home->bytes_pinned, pins ? block->size : 0);
    if (pins)
        ap_uncount(&pins->bytes, block->size);
    give_back(block);
    if (pins)
        pins->release(pins);
}

void ap_block_leave(ap_block *block, ap_pins *pins)
{
    /* acquire; pairs with the decrement of the last view: if none is left, none
     * can appear, because views are created under the mutex that is held here */
    if (pins && atomic_load_explicit(&block->refs, memory_order_acquire) > 1) {
        pins->hold(pins);
        block->pins = pins;
        ap_count(&pins->bytes, block->size);
        ap_count(&block->home->bytes_pinned, block->size);
    }
    ap_block_unref(block);
}
