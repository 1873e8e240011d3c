/* The table of slots: what epoll's data and the mailbox's tokens name.
 *
 * A slot's memory is never freed, only used again, so that a late event may
 * look at it: `generation << 32 | index` tells, under the slot's mutex, that it
 * is about somebody else. A slot is used again when its last reference is gone.
 * References are held by
 *   - the handle (Python's object),
 *   - the driver, until it has taken AP_BOX_CLOSED from its inbox, which it does
 *     between two batches of events,
 *   - a mailbox the slot is queued in,
 *   - a kill of the hub, while it closes the slot,
 *   - each block that only views keep alive (pool.c).
 *
 * Life of a slot; the verbs are the only ones that change it:
 *
 *   state    | take  register  arm/read/send  close   unref to 0
 *   FREE     | OPEN     -           -           -         -
 *   OPEN     |  -      OPEN        OPEN       CLOSED  (cannot: the driver has one)
 *   CLOSED   |  -     -EBADF      -EBADF      -EBADF     FREE
 *
 * Closing (ap_slot_close_locked) is done by the caller at once, because AnyIO
 * demands that the descriptor is closed when aclose() returns, and a driver may
 * be in the middle of a batch with it. The order: mark closed, EPOLL_CTL_DEL,
 * bump the generation, close(2) last, since that is what lets the number be
 * used again. An event for the descriptor that epoll_wait had already returned
 * carries the old generation.
 */
#include "slot.h"

#include "clock.h"
#include "connection.h"
#include "ending.h"
#include "epoch.h"
#include "hub.h"
#include "inbox.h"
#include "listener.h"
#include "owned.h"
#include "poller.h"
#include "sysio.h"

#include <sys/epoll.h>
#include <sys/socket.h>

#define CHUNK 64u
#define CHUNKS (1u << 15) /* two million slots */

typedef union {
    ap_slot slot;
    ap_conn conn;
    ap_listener listener;
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
    /* Everything behind the common part; the common part field by field, since
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

int ap_slot_take(int kind, ap_poller *poller, ap_hub *hub, int fd, ap_slot **out)
{
    ap_slot *slot;
    int rc = ap_poller_admit(poller);
    if (rc < 0)
        return rc;
    rc = take_free(&slot);
    if (rc < 0) {
        ap_poller_dismiss(poller);
        return rc;
    }
    ap_slot_lock(slot); /* against a late event of the last generation */
    clear(slot);
    slot->kind = (uint8_t)kind;
    slot->epoch = ap_epoch_now();
    slot->ready = AP_READABLE | AP_WRITABLE; /* until EAGAIN says otherwise */
    slot->fd = fd;
    slot->id = ap_slot_tag(slot);
    slot->poller = poller;
    slot->hub = hub;
    slot->orphaned = ap_has_ended(poller); /* ap_slot_each has been here already */
    atomic_init(&slot->refs, 2);           /* the handle and the driver */
    ap_slot_unlock(slot);
    ap_poller_ref(poller);
    ap_hub_ref(hub);
    ap_count(&poller->slots, 1);
    *out = slot;
    return 0;
}

void ap_slot_ref(ap_slot *slot)
{
    /* relaxed: whoever takes a reference holds one */
    atomic_fetch_add_explicit(&slot->refs, 1, memory_order_relaxed);
}

void ap_slot_unref(ap_slot *slot)
{
    /* acq_rel; pairs with itself: the last one sees what the others wrote */
    if (atomic_fetch_sub_explicit(&slot->refs, 1, memory_order_acq_rel) != 1)
        return;
    ap_poller *poller = slot->poller;
    ap_hub *hub = slot->hub;
    ap_slot_lock(slot);
    if (slot->kind == AP_SLOT_CONN)
        ap_conn_drop((ap_conn *)slot);
    else if (slot->kind == AP_SLOT_LISTENER)
        ap_listener_drop((ap_listener *)slot);
    slot->kind = AP_SLOT_FREE;
    slot->poller = NULL;
    slot->hub = NULL;
    ap_slot_unlock(slot);
    ap_uncount(&poller->slots, 1);
    pthread_mutex_lock(&table_mutex);
    slot->free_next = free_list;
    free_list = slot;
    pthread_mutex_unlock(&table_mutex);
    ap_hub_unref(hub);
    ap_poller_unref(poller);
}

/* In the child of a fork: the parent's slots are left where they are, since
 * their mutexes may be locked for ever. Its own numbers begin behind them. */
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

int ap_slot_watch(ap_slot *slot, uint32_t events)
{
    AP_ASSERT_LOCKED(slot);
    int rc = slot->orphaned ? ap_state(slot->poller)
                            : ap_sys_epoll_ctl(slot->poller->epfd, EPOLL_CTL_ADD, slot->fd, events,
                                               ap_slot_tag(slot));
    slot->watched = rc == 0;
    return rc;
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

int ap_slot_close_locked(ap_slot *slot)
{
    AP_ASSERT_LOCKED(slot);
    int fd = slot->fd;
    slot->closed = true;
    slot->fd = -1;
    /* Fails with ENOENT for one that was never registered: as good. */
    int rc = ap_sys_epoll_ctl(slot->poller->epfd, EPOLL_CTL_DEL, fd, 0, 0);
    (void)rc;
    atomic_fetch_add_explicit(&slot->generation, 1, memory_order_relaxed);
    ap_inbox_push(slot, AP_BOX_CLOSED, AP_FOREVER);
    return fd;
}

int ap_slot_closed(ap_slot *slot, int fd, bool reset, bool keep_fd)
{
    ap_hub_unlink(slot);
    ap_poller_dismiss(slot->poller);
    if (reset)
        ap_sys_linger_now(fd);
    if (!keep_fd)
        ap_sys_close(fd);
    else
        ap_fd_disown(fd);
    if (slot->orphaned)      /* constant from the close on */
        ap_slot_unref(slot); /* for the driver, which is no more */
    return keep_fd ? fd : 0;
}
