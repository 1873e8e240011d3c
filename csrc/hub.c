/* A hub: an event loop's mailbox with an event descriptor, the one way pollers reach the loop.
 *
 * The mailbox is an intrusive list that any thread pushes to and the loop takes
 * whole. A slot has bits and is in it at most once, so it cannot overflow. The
 * event descriptor is written only if the loop was not already signalled.
 *
 * The order of the steps was measured; any other loses wake-ups:
 *   post: bits, then (if they were 0) the push, then exchange `signalled` for 1,
 *         and write the descriptor if it was 0;
 *   take: read the descriptor, then *exchange* `signalled` for 0, then take the
 *         list. A poster that finds 1 pushed before that exchange, so its slot
 *         is in the list; one that finds 0 writes a descriptor that was read
 *         before. A release store instead of the exchange may move after the
 *         taking of the list: 200 to 1,100 of 12 million wake-ups were lost.
 *   per slot: read `next`, then exchange the bits for 0, then look at what the
 *         slot waits for. Once the bits are 0 the slot may be pushed again,
 *         which overwrites `next`; and whatever happened before a poster found
 *         the bits set is seen by the look that follows.
 *
 * A wake-up is a hint. What is reported was true under the slot's mutex, but the
 * woken task looks again.
 */
#include "hub.h"

#include "context.h"
#include "epoch.h"
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"

#include <stdlib.h>

#define AP_MAIL_QUEUED (1u << 31) /* beside the bits of tokens: the slot is in the mailbox */

int ap_hub_new(ap_hub **out)
{
    int rc = ap_epoch_watch();
    ap_hub *hub = rc < 0 ? NULL : ap_sys_alloc(sizeof *hub);
    if (!hub)
        return rc < 0 ? rc : -ENOMEM;
    rc = hub->efd = ap_sys_eventfd();
    if (rc < 0)
        goto no_fd;
    rc = ap_context_init(&hub->context);
    if (rc < 0)
        goto no_context;
    hub->epoch = ap_epoch_now();
    atomic_init(&hub->refs, 1);
    pthread_mutex_init(&hub->mutex, NULL);
    *out = hub;
    return 0;
no_context:
    ap_sys_close(hub->efd);
no_fd:
    free(hub);
    return rc;
}

int ap_hub_fd(ap_hub *hub)
{
    return hub->epoch == ap_epoch_now() ? hub->efd : -ECHILD;
}

void ap_hub_ref(ap_hub *hub)
{
    atomic_fetch_add_explicit(&hub->refs, 1, memory_order_relaxed);
}

/* Under the mutex that signallers hold around their write, so that none writes
 * to someone else's file. */
static void close_signal(ap_hub *hub)
{
    pthread_mutex_lock(&hub->mutex);
    hub->dead = true;
    if (hub->efd >= 0)
        ap_sys_close(hub->efd);
    hub->efd = -1;
    pthread_mutex_unlock(&hub->mutex);
}

void ap_hub_unref(ap_hub *hub)
{
    if (hub->epoch != ap_epoch_now())
        return;
    /* acq_rel; pairs with itself */
    if (atomic_fetch_sub_explicit(&hub->refs, 1, memory_order_acq_rel) != 1)
        return;
    close_signal(hub);
    ap_context_free(&hub->context);
    pthread_mutex_destroy(&hub->mutex);
    free(hub);
}

/* ---- the open slots of a hub ------------------------------------------ */

int ap_hub_link(ap_slot *slot)
{
    ap_hub *hub = slot->hub;
    pthread_mutex_lock(&hub->mutex);
    int rc = hub->dead ? -EBADF : 0;
    if (rc == 0) {
        slot->hub_next = hub->open;
        if (hub->open)
            hub->open->hub_prev = slot;
        hub->open = slot;
        slot->hub_linked = true;
    }
    pthread_mutex_unlock(&hub->mutex);
    return rc;
}

static void unlink_locked(ap_hub *hub, ap_slot *slot)
{
    if (!slot->hub_linked)
        return;
    if (slot->hub_prev)
        slot->hub_prev->hub_next = slot->hub_next;
    else
        hub->open = slot->hub_next;
    if (slot->hub_next)
        slot->hub_next->hub_prev = slot->hub_prev;
    slot->hub_prev = slot->hub_next = NULL;
    slot->hub_linked = false;
}

void ap_hub_unlink(ap_slot *slot)
{
    pthread_mutex_lock(&slot->hub->mutex);
    unlink_locked(slot->hub, slot);
    pthread_mutex_unlock(&slot->hub->mutex);
}

/* ---- posting ---------------------------------------------------------- */

/* The mutex is held around the write: a dying hub waits for it, so the
 * descriptor being written to is still the hub's. */
static void signal_loop(ap_hub *hub)
{
    pthread_mutex_lock(&hub->mutex);
    if (!hub->dead)
        ap_sys_signal(hub->efd);
    pthread_mutex_unlock(&hub->mutex);
}

void ap_hub_post(ap_slot *slot, uint32_t bits)
{
    ap_hub *hub = slot->hub;
    /* seq_cst; pairs with the exchange in take_one */
    uint32_t old =
        atomic_fetch_or_explicit(&slot->mail_bits, bits | AP_MAIL_QUEUED, memory_order_seq_cst);
    if (old & AP_MAIL_QUEUED) {
        ap_count(&slot->poller->wakeups_coalesced, 1);
        return;
    }
    ap_slot_ref(slot);
    ap_slot *head = atomic_load_explicit(&hub->mailbox, memory_order_relaxed);
    do /* relaxed: the exchange that takes the list acquires what the push releases */
        atomic_store_explicit(&slot->mail_next, head, memory_order_relaxed);
    while (!atomic_compare_exchange_weak_explicit(&hub->mailbox, &head, slot, memory_order_seq_cst,
                                                  memory_order_relaxed));
    /* seq_cst; pairs with the exchange in take_list */
    if (atomic_exchange_explicit(&hub->signalled, 1, memory_order_seq_cst) == 0) {
        signal_loop(hub);
        ap_count(&slot->poller->wakeups, 1);
    } else {
        ap_count(&slot->poller->wakeups_coalesced, 1);
    }
}

/* ---- taking ----------------------------------------------------------- */

static ap_slot *next_of(ap_slot *slot)
{
    return atomic_load_explicit(&slot->mail_next, memory_order_relaxed);
}

/* The whole mailbox, in the order of arrival. */
static ap_slot *take_list(ap_hub *hub)
{
    atomic_exchange_explicit(&hub->signalled, 0, memory_order_seq_cst);
    ap_slot *slot = atomic_exchange_explicit(&hub->mailbox, NULL, memory_order_seq_cst);
    ap_slot *list = NULL;
    while (slot) { /* all of them are queued, so nobody else touches mail_next */
        ap_slot *next = next_of(slot);
        atomic_store_explicit(&slot->mail_next, list, memory_order_relaxed);
        list = slot;
        slot = next;
    }
    return list;
}

/* Takes the first slot of the list; the caller inherits the mailbox's reference. */
static ap_slot *take_one(ap_hub *hub, uint32_t *bits)
{
    ap_slot *slot = hub->taken;
    hub->taken = next_of(slot);
    *bits = atomic_exchange_explicit(&slot->mail_bits, 0, memory_order_seq_cst);
    return slot;
}

static uint32_t resolve(ap_slot *slot, uint32_t bits, int32_t *value)
{
    ap_slot_lock(slot);
    uint32_t told = 0;
    if (slot->closed)
        ap_count(&slot->poller->stale_tokens, 1);
    else
        told = slot->ops->resolve(slot, bits, value);
    ap_slot_unlock(slot);
    return told;
}

static int take_tokens(ap_hub *hub, ap_token *tokens, int max)
{
    int n = 0;
    while (hub->taken && n < max) {
        uint32_t bits;
        int32_t value = 0;
        ap_slot *slot = take_one(hub, &bits);
        bits = resolve(slot, bits, &value);
        if (bits)
            tokens[n++] = (ap_token){.id = slot->id, .bits = bits, .value = value};
        ap_slot_unref(slot);
    }
    hub->batch += n;
    return n;
}

int ap_hub_again(ap_hub *hub)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    /* seq_cst; pairs with the exchange in take_list */
    if (atomic_exchange_explicit(&hub->signalled, 1, memory_order_seq_cst) == 0)
        signal_loop(hub);
    return 0;
}

int ap_hub_take(ap_hub *hub, ap_token *tokens, int max)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    if (!hub->taken) {
        ap_sys_drain(hub->efd);
        hub->taken = take_list(hub);
        hub->batch = 0; /* otherwise this call continues with a list */
    }
    return take_tokens(hub, tokens, max);
}

/* ---- taking while the loop drives ------------------------------------- */

void ap_hub_hush(ap_hub *hub)
{
    /* seq_cst; pairs with the exchange in ap_hub_post */
    atomic_exchange_explicit(&hub->signalled, 1, memory_order_seq_cst);
}

bool ap_hub_has_mail(ap_hub *hub)
{
    /* relaxed: the exchange that takes the list acquires */
    return hub->taken || atomic_load_explicit(&hub->mailbox, memory_order_relaxed);
}

/* If a poster had signalled before, the descriptor stays readable: the loop comes once more,
 * reads it, and finds nothing. The rest of an earlier list, which an exception has left, goes
 * first. */
int ap_hub_take_hushed(ap_hub *hub, ap_token *tokens, int max)
{
    ap_slot *list = take_list(hub);
    if (!hub->taken) {
        hub->taken = list;
        hub->batch = 0;
    } else {
        ap_slot *last = hub->taken;
        while (next_of(last))
            last = next_of(last);
        atomic_store_explicit(&last->mail_next, list, memory_order_relaxed);
    }
    return take_tokens(hub, tokens, max);
}

int ap_hub_trim(ap_hub *hub)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    ap_pool_trim(hub->context.pool);
    return 0;
}

int ap_hub_statistics(ap_hub *hub, ap_poller_stats *out)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    memset(out, 0, sizeof *out);
    ap_pool_statistics(hub->context.pool, out);
    return 0;
}

/* ---- the end ---------------------------------------------------------- */

static ap_slot *pop_open(ap_hub *hub)
{
    pthread_mutex_lock(&hub->mutex);
    hub->dead = true;
    ap_slot *slot = hub->open;
    if (slot) {
        unlink_locked(hub, slot);
        ap_slot_ref(slot); /* it is open, so the driver's reference is still there */
    }
    pthread_mutex_unlock(&hub->mutex);
    return slot;
}

int ap_hub_kill(ap_hub *hub)
{
    if (hub->epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot *slot;
    while ((slot = pop_open(hub)) != NULL) {
        ap_slot_lock(slot);
        bool keep_fd = slot->disowned;
        ap_slot_unlock(slot);
        slot->ops->close(slot, keep_fd);
        ap_slot_unref(slot);
    }
    /* Posts are made under the mutex of an open slot, so none comes after this. */
    do {
        if (!hub->taken)
            hub->taken = take_list(hub);
        while (hub->taken) {
            uint32_t bits;
            ap_slot_unref(take_one(hub, &bits));
        }
    } while (atomic_load_explicit(&hub->mailbox, memory_order_seq_cst));
    close_signal(hub);
    return 0;
}
