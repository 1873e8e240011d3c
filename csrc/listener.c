/* Listening sockets: credit-based accepting, handed over in batches.
 *
 * A listener is edge-triggered and remembers that it is readable (measured: three
 * in the backlog, one accepted, no further event). Before each accept4 one credit
 * is taken from the account, which several listeners may share, so that no more
 * descriptors exist than were asked for: the kernel's backlog holds the rest.
 * Whoever adds credits accepts at once.
 *
 * When descriptors or memory run out, a listener pauses for 100 ms, as often as
 * necessary. The loop is told once per episode, which ends with the next
 * descriptor accepted. Errors of a connection that died in the backlog are not the
 * listener's, and are ignored (the list is trio's).
 */
#include "listener.h"

#include "clock.h"
#include "endpoint.h"
#include "epoch.h"
#include "hub.h"
#include "inbox.h"
#include "owned.h"
#include "poller.h"
#include "slot.h"
#include "sysio.h"

#include <stdlib.h>
#include <sys/epoll.h>

/* ---- accounts --------------------------------------------------------- */

int ap_account_new(ap_account **out)
{
    ap_account *account = ap_sys_alloc(sizeof *account);
    if (!account)
        return -ENOMEM;
    atomic_init(&account->refs, 1);
    account->epoch = ap_epoch_now();
    pthread_mutex_init(&account->mutex, NULL);
    *out = account;
    return 0;
}

void ap_account_unref(ap_account *account)
{
    if (account->epoch != ap_epoch_now())
        return;
    /* acq_rel; pairs with itself */
    if (atomic_fetch_sub_explicit(&account->refs, 1, memory_order_acq_rel) != 1)
        return;
    pthread_mutex_destroy(&account->mutex);
    free(account);
}

static void join(ap_listener *listener)
{
    ap_account *account = listener->account;
    atomic_fetch_add_explicit(&account->refs, 1, memory_order_relaxed);
    pthread_mutex_lock(&account->mutex);
    listener->account_next = account->listeners;
    account->listeners = listener;
    pthread_mutex_unlock(&account->mutex);
}

static void leave(ap_listener *listener)
{
    ap_account *account = listener->account;
    pthread_mutex_lock(&account->mutex);
    for (ap_listener **at = &account->listeners; *at; at = &(*at)->account_next) {
        if (*at == listener) {
            *at = listener->account_next;
            break;
        }
    }
    pthread_mutex_unlock(&account->mutex);
}

static bool take_credit(ap_account *account)
{
    int32_t credits = atomic_load_explicit(&account->credits, memory_order_relaxed);
    while (credits > 0) {
        if (atomic_compare_exchange_weak_explicit(&account->credits, &credits, credits - 1,
                                                  memory_order_acq_rel, memory_order_relaxed))
            return true;
    }
    return false;
}

static void give_credit(ap_account *account)
{
    atomic_fetch_add_explicit(&account->credits, 1, memory_order_acq_rel);
}

int ap_account_take_back(ap_account *account)
{
    return account->epoch == ap_epoch_now() ? take_credit(account) : -ECHILD;
}

/* ---- accepting -------------------------------------------------------- */

static bool worth_ignoring(int error)
{
    static const int errors[] = {
        EPERM,     ECONNABORTED, EPROTO,          ENETDOWN,        ENOPROTOOPT,
        EHOSTDOWN, ENONET,       EHOSTUNREACH,    EOPNOTSUPP,      ENETUNREACH,
        ENOSR,     ETIMEDOUT,    ESOCKTNOSUPPORT, EPROTONOSUPPORT, ECONNRESET,
    };
    for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
        if (errors[i] == error)
            return true;
    }
    return false;
}

static bool starves(int error)
{
    return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

static bool reserve(ap_listener *listener)
{
    if (listener->first + listener->count < listener->capacity)
        return true;
    if (listener->first > 0) {
        memmove(listener->queue, listener->queue + listener->first,
                listener->count * sizeof *listener->queue);
        listener->first = 0;
        return true;
    }
    uint32_t capacity = listener->capacity ? 2 * listener->capacity : 4;
    ap_accepted *grown = ap_sys_alloc(capacity * sizeof *grown);
    if (!grown)
        return false;
    if (listener->count)
        memcpy(grown, listener->queue, listener->count * sizeof *grown);
    free(listener->queue);
    listener->queue = grown;
    listener->capacity = capacity;
    return true;
}

static void pause_accepting(ap_listener *listener, int error)
{
    ap_slot *slot = &listener->slot;
    listener->paused_until = ap_now() + AP_ACCEPT_PAUSE;
    if (listener->paused_until < slot->timer_at) {
        slot->timer_at = listener->paused_until;
        ap_inbox_push(slot, AP_BOX_DEADLINE, slot->timer_at);
    }
    if (atomic_exchange_explicit(&listener->account->starving, true, memory_order_relaxed))
        return;
    listener->starved_error = error;
    ap_hub_post(slot, AP_MAIL_STARVED);
}

/* Accepts one connection for the credit that was taken. False: no more for now. */
static bool accept_one(ap_listener *listener)
{
    ap_slot *slot = &listener->slot;
    ap_accepted accepted;
    int rc = reserve(listener) ? ap_sys_accept(slot->fd, &accepted) : -ENOMEM;
    if (rc == 0) {
        listener->queue[listener->first + listener->count++] = accepted;
        atomic_store_explicit(&listener->account->starving, false, memory_order_relaxed);
        ap_count(&slot->poller->accepts, 1);
        return true;
    }
    give_credit(listener->account);
    if (worth_ignoring(-rc))
        return true;
    if (rc == -EAGAIN) {
        ap_count(&slot->poller->again, 1);
        slot->ready &= (uint8_t)~AP_READABLE;
    } else if (starves(-rc)) {
        pause_accepting(listener, -rc);
    } else {
        listener->error = rc; /* accepting pauses until it is taken */
    }
    return false;
}

/* Under the slot's mutex, by the driver or whoever adds credits. True: it stopped
 * at the bound. */
static bool accept_some(ap_listener *listener)
{
    bool more = true;
    int left = AP_ACCEPT_BATCH;
    uint32_t before = listener->count;
    while (more && left > 0 && (listener->slot.ready & AP_READABLE) && !listener->error &&
           !listener->paused_until && take_credit(listener->account)) {
        more = accept_one(listener);
        left--;
    }
    if (left == 0 && listener->count == before)
        pause_accepting(listener, EPERM); /* nothing but ignored errors: do not spin */
    if (listener->count > 0 || listener->error)
        ap_hub_post(&listener->slot, AP_MAIL_ACCEPT);
    return more && left == 0;
}

int ap_listener_take(ap_listener *listener, ap_accepted *out, int max)
{
    int rc = ap_slot_enter(&listener->slot);
    if (rc < 0)
        return rc;
    int n = 0;
    for (; n < max && listener->count > 0; n++, listener->count--)
        out[n] = listener->queue[listener->first++];
    if (listener->count == 0)
        listener->first = 0;
    if (n == 0 && listener->error) {
        n = listener->error;
        if (!listener->slot.orphaned)
            listener->error = 0;
        /* the backlog has no edge of its own */
        ap_inbox_push(&listener->slot, AP_BOX_WORK, AP_DUE_NOW);
    }
    ap_slot_unlock(&listener->slot);
    return n;
}

/* ---- giving credits --------------------------------------------------- */

/* The first listener becomes the last: otherwise one with a long backlog would take
 * every credit. */
static void take_turns(ap_account *account)
{
    ap_listener *first = account->listeners, **end = &account->listeners;
    if (!first)
        return;
    account->listeners = first->account_next;
    while (*end)
        end = &(*end)->account_next;
    first->account_next = NULL;
    *end = first;
}

int ap_account_add(ap_account *account, int credits)
{
    if (account->epoch != ap_epoch_now())
        return -ECHILD;
    atomic_fetch_add_explicit(&account->credits, credits, memory_order_acq_rel);
    pthread_mutex_lock(&account->mutex);
    for (ap_listener *listener = account->listeners; listener; listener = listener->account_next) {
        ap_slot_lock(&listener->slot);
        if (!listener->slot.closed && accept_some(listener))
            ap_inbox_push(&listener->slot, AP_BOX_WORK, AP_DUE_NOW);
        ap_slot_unlock(&listener->slot);
    }
    take_turns(account);
    pthread_mutex_unlock(&account->mutex);
    return 0;
}

/* ---- as a slot -------------------------------------------------------- */

static bool serve(ap_slot *slot, ap_context *context)
{
    (void)context; /* nothing is read */
    ap_slot_lock(slot);
    bool more = !slot->closed && accept_some(ap_listener_of(slot));
    ap_slot_unlock(slot);
    return more;
}

static int64_t expire(ap_slot *slot, int64_t now)
{
    ap_listener *listener = ap_listener_of(slot);
    if (listener->paused_until && now >= listener->paused_until) {
        listener->paused_until = 0;
        if (accept_some(listener))
            ap_inbox_push(slot, AP_BOX_WORK, AP_DUE_NOW);
    }
    return listener->paused_until ? listener->paused_until : AP_FOREVER;
}

static void fail(ap_slot *slot, int error)
{
    ap_listener_of(slot)->error = error;
    ap_hub_post(slot, AP_MAIL_FAILED | AP_MAIL_ACCEPT);
}

static uint32_t resolve(ap_slot *slot, uint32_t bits, int32_t *value)
{
    ap_listener *listener = ap_listener_of(slot);
    uint32_t told = listener->count > 0 || listener->error ? AP_MAIL_ACCEPT : 0;
    if (bits & AP_MAIL_FAILED) {
        *value = ap_state(slot->poller);
        told |= AP_MAIL_FAILED;
    } else if (bits & AP_MAIL_STARVED) {
        *value = listener->starved_error;
        told |= AP_MAIL_STARVED;
    }
    return told;
}

static void close_slot(ap_slot *slot, bool keep_fd)
{
    ap_listener_close(ap_listener_of(slot), keep_fd);
}

/* Returns how many there were: their credits are given back. */
static int close_untaken(ap_listener *listener)
{
    int n = (int)listener->count;
    for (; listener->count > 0; listener->count--)
        ap_sys_close(listener->queue[listener->first++].fd);
    free(listener->queue);
    listener->queue = NULL;
    listener->first = listener->capacity = 0;
    return n;
}

static void drop(ap_slot *slot)
{
    ap_listener *listener = ap_listener_of(slot);
    ap_slot_lock(slot);
    close_untaken(listener);
    ap_account_unref(listener->account);
    listener->account = NULL;
    ap_slot_unlock(slot);
    ap_endpoint_free(slot);
}

_Static_assert(sizeof(ap_listener) <= sizeof(ap_slot) + AP_SLOT_ROOM, "AP_SLOT_ROOM is too small");

static const ap_slot_ops operations = {
    .serve = serve,
    .close = close_slot,
    .drop = drop,
    .expire = expire,
    .fail = fail,
    .resolve = resolve,
};

/* ---- opening and closing ---------------------------------------------- */

int ap_listener_new(ap_poller *poller, ap_hub *hub, int fd, ap_account *account, ap_listener **out)
{
    uint32_t now = ap_epoch_now();
    if (poller->epoch != now || hub->epoch != now || account->epoch != now)
        return -ECHILD;
    ap_slot *slot;
    int rc = ap_endpoint_open(&operations, poller, hub, fd, &slot);
    if (rc < 0)
        return rc;
    ap_listener *listener = (ap_listener *)slot;
    listener->account = account;
    join(listener);
    rc = ap_hub_link(slot);
    if (rc == 0) {
        ap_slot_lock(slot);
        rc = ap_endpoint_watch(slot, EPOLLIN | EPOLLET);
        ap_slot_unlock(slot);
    }
    if (rc < 0) {
        ap_listener_close(listener, 1);
        ap_slot_unref(slot);
        return rc;
    }
    ap_fd_own(fd);
    *out = listener;
    return 0;
}

int ap_listener_close(ap_listener *listener, int keep_fd)
{
    int rc = ap_slot_enter(&listener->slot);
    if (rc < 0)
        return rc;
    int untaken = close_untaken(listener);
    int fd = ap_endpoint_close(&listener->slot);
    ap_slot_unlock(&listener->slot);
    leave(listener); /* the account's mutex comes before the slot's */
    if (untaken)
        ap_account_add(listener->account, untaken);
    return ap_endpoint_closed(&listener->slot, fd, false, keep_fd != 0);
}

void ap_listener_release(ap_listener *listener)
{
    if (listener->slot.epoch != ap_epoch_now())
        return;
    ap_listener_close(listener, listener->slot.disowned);
    ap_slot_unref(&listener->slot);
}

uint64_t ap_listener_id(ap_listener *listener)
{
    return listener->slot.id;
}

int ap_listener_fd(ap_listener *listener, int disown)
{
    int rc = ap_slot_enter(&listener->slot);
    if (rc < 0)
        return rc;
    rc = listener->slot.fd;
    if (disown) {
        listener->slot.disowned = true;
        ap_fd_disown(rc);
    }
    ap_slot_unlock(&listener->slot);
    return rc;
}
