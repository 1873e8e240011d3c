/* A slot map with generations: one slot for each registered descriptor.
 *
 * epoll's data and the mailbox's tokens carry `generation << 32 | index`. A slot's
 * memory is never freed, only reused, so that a late event may look at it: the tag
 * shows, under the slot's mutex, that the event is about another occupant. A slot is
 * reused when its last reference is gone. References are held by
 *   - the handle (Python's object),
 *   - the driver, until it has taken AP_BOX_CLOSED from its inbox, which it does
 *     between two batches of events,
 *   - a mailbox in which the slot is queued,
 *   - the jobs in which it is queued, until that job is over,
 *   - a kill of the hub, while it closes the slot,
 *   - each block that only views keep alive (pool.c).
 *
 * A slot's life; only the verbs change it:
 *
 *   state    | take  register  arm/read/send  close   unref to 0
 *   FREE     | OPEN     -           -           -         -
 *   OPEN     |  -      OPEN        OPEN       CLOSED  (cannot: the driver has one)
 *   CLOSED   |  -     -EBADF      -EBADF      -EBADF     FREE
 */
#include "slot.h"

#include "clock.h"
#include "epoch.h"
#include "sysio.h"

#define CHUNK 64u
#define CHUNKS (1u << 15) /* two million slots */

typedef union {
    ap_slot slot; /* of a connection or a listener, whose rest follows it */
    char memory[sizeof(ap_slot) + AP_SLOT_ROOM];
} slot_memory;

static pthread_mutex_t table_mutex = PTHREAD_MUTEX_INITIALIZER;
static slot_memory *_Atomic chunks[CHUNKS]; /* (a) release in grow, acquire in ap_slot_at */
static uint32_t chunk_count;                /* (s) */
static uint32_t first_chunk;                /* (s) those before it are the parent's of a fork */
static ap_slot *free_list;                  /* (s) */

ap_slot *ap_slot_at(uint32_t index)
{
    if (index / CHUNK >= CHUNKS)
        return NULL;
    /* acquire; pairs with the release in grow: the mutexes are initialised */
    slot_memory *chunk = atomic_load_explicit(&chunks[index / CHUNK], memory_order_acquire);
    return chunk ? &chunk[index % CHUNK].slot : NULL;
}

static int grow(void)
{
    slot_memory *chunk = chunk_count < CHUNKS ? ap_sys_alloc(CHUNK * sizeof *chunk) : NULL;
    if (!chunk)
        return -ENOMEM;
    for (uint32_t i = CHUNK; i-- > 0;) {
        ap_slot *slot = &chunk[i].slot;
        slot->index = chunk_count * CHUNK + i;
        atomic_init(&slot->generation, 1);
        pthread_mutex_init(&slot->mutex, NULL);
        slot->free_next = free_list;
        free_list = slot;
    }
    /* release; pairs with the acquire in ap_slot_at */
    atomic_store_explicit(&chunks[chunk_count++], chunk, memory_order_release);
    return 0;
}

static void clear(ap_slot *slot)
{
    /* Clears everything after the common part, and that field by field, because
     * its mutex, index and generation live on. */
    memset((char *)slot + sizeof(ap_slot), 0, sizeof(slot_memory) - sizeof(ap_slot));
    slot->closed = slot->disowned = slot->on_run = slot->forgotten = slot->hub_linked = false;
    slot->watched = false;
    slot->run_next = slot->hub_prev = slot->hub_next = slot->free_next = NULL;
    slot->timer.prev = slot->timer.next = NULL;
    slot->timer_at = AP_FOREVER;
    atomic_init(&slot->box_bits, 0);
    atomic_init(&slot->mail_bits, 0);
}

static int take_free(ap_slot **out)
{
    pthread_mutex_lock(&table_mutex);
    int rc = free_list ? 0 : grow();
    if (rc == 0) {
        *out = free_list;
        free_list = free_list->free_next;
    }
    pthread_mutex_unlock(&table_mutex);
    return rc;
}

int ap_slot_take(const ap_slot_ops *ops, int fd, ap_slot **out)
{
    ap_slot *slot;
    int rc = take_free(&slot);
    if (rc < 0)
        return rc;
    ap_slot_lock(slot); /* against a late event of the last generation */
    clear(slot);
    slot->ops = ops;
    slot->epoch = ap_epoch_now();
    slot->ready = AP_READABLE | AP_WRITABLE; /* until EAGAIN says otherwise */
    slot->fd = fd;
    slot->id = ap_slot_tag(slot);
    *out = slot;
    return 0;
}

void ap_slot_give(ap_slot *slot)
{
    pthread_mutex_lock(&table_mutex);
    slot->free_next = free_list;
    free_list = slot;
    pthread_mutex_unlock(&table_mutex);
}

void ap_slot_ref(ap_slot *slot)
{
    /* relaxed: whoever takes a reference holds one */
    atomic_fetch_add_explicit(&slot->refs, 1, memory_order_relaxed);
}

void ap_slot_unref(ap_slot *slot)
{
    /* acq_rel; pairs with itself: the last one sees what the others wrote */
    if (atomic_fetch_sub_explicit(&slot->refs, 1, memory_order_acq_rel) == 1)
        slot->ops->drop(slot);
}

/* In the child of a fork: the parent's slots stay where they are, because their
 * mutexes may be locked forever. The child's own numbers begin after them. */
void ap_slot_table_reset(void)
{
    pthread_mutex_init(&table_mutex, NULL);
    free_list = NULL;
    first_chunk = chunk_count;
}

void ap_slot_each(void (*visit)(ap_slot *slot, void *arg), void *arg)
{
    pthread_mutex_lock(&table_mutex);
    uint32_t first = first_chunk * CHUNK, end = chunk_count * CHUNK;
    pthread_mutex_unlock(&table_mutex);
    for (uint32_t i = first; i < end; i++)
        visit(ap_slot_at(i), arg);
}

int ap_slot_enter(ap_slot *slot)
{
    if (slot->epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot_lock(slot);
    if (!slot->closed)
        return 0;
    ap_slot_unlock(slot);
    return -EBADF;
}
