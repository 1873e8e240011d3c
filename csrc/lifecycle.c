/* A connection's lifecycle: opening, lingering, closing, detaching.
 *
 * The order of a close is in endpoint.c; what each verb does in each state is in
 * docs/internals/lifecycle.md.
 */
#include "anypoll.h"

#include "chain.h"
#include "clock.h"
#include "connection.h"
#include "endpoint.h"
#include "epoch.h"
#include "fds.h"
#include "hub.h"
#include "input.h"
#include "output.h"
#include "owned.h"
#include "poller.h"
#include "pool.h"
#include "queue.h"
#include "read.h"
#include "serve.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"
#include "tls_shake.h"
#include "window.h"

#include <stdlib.h>

/* ---- as a slot -------------------------------------------------------- */

_Static_assert(sizeof(ap_conn) <= sizeof(ap_slot) + AP_SLOT_ROOM, "AP_SLOT_ROOM is too small");

static void close_slot(ap_slot *slot, bool keep_fd)
{
    ap_conn_close(ap_conn_of(slot), 0, keep_fd);
}

/* Frees what only this slot had. Its input was dropped earlier: a block pinned by a view
 * takes a reference to the slot, which must not be the first. */
static void drop(ap_slot *slot)
{
    ap_conn *conn = ap_conn_of(slot);
    ap_slot_lock(slot);
    AP_ASSERT(!conn->input.head);
    ap_queue_drop(conn);
    ap_tls_drop(conn);
    if (conn->delimiter != conn->delimiter_inline)
        free(conn->delimiter);
    conn->delimiter = conn->delimiter_inline;
    ap_slot_unlock(slot);
    ap_endpoint_free(slot);
}

static const ap_slot_ops operations = {
    .serve = ap_conn_serve,
    .close = close_slot,
    .drop = drop,
    .expire = ap_conn_expire,
    .fail = ap_conn_fail,
    .resolve = ap_conn_resolve,
    .job = ap_tls_job,
};

/* ---- pinned blocks ---------------------------------------------------- */

static void hold(ap_pins *pins)
{
    ap_slot_ref(&AP_CONTAINER(pins, ap_conn, pins)->slot);
}

static void release(ap_pins *pins)
{
    ap_slot_unref(&AP_CONTAINER(pins, ap_conn, pins)->slot);
}

/* ---- opening ---------------------------------------------------------- */

int ap_conn_new(ap_poller *poller, ap_hub *hub, int fd, int kind, uint32_t high_water,
                ap_conn **out)
{
    if (poller->epoch != ap_epoch_now() || hub->epoch != ap_epoch_now())
        return -ECHILD;
    if (fd < 0 || kind < AP_TCP || kind > AP_SEQPACKET || high_water == 0)
        return -EINVAL;
    ap_slot *slot;
    int rc = ap_endpoint_open(&operations, poller, hub, fd, &slot);
    if (rc < 0)
        return rc;
    ap_conn *conn = ap_conn_of(slot);
    conn->type = (uint8_t)kind;
    conn->high = high_water;
    conn->low = high_water / 4;
    conn->window = AP_WINDOW;
    conn->grow = conn->base = AP_BLOCK_MIN;
    conn->trim_at = AP_FOREVER;
    conn->delimiter = conn->delimiter_inline;
    conn->request_at = UINT64_MAX; /* no call has begun */
    conn->pins.hold = hold;
    conn->pins.release = release;
    conn->created_at = ap_now();
    atomic_init(&conn->last_activity, conn->created_at);
    rc = ap_hub_link(slot);
    if (rc < 0) { /* the hub is dead: give back the slot, but not the descriptor */
        ap_conn_close(conn, 0, 1);
        ap_slot_unref(slot);
        return rc;
    }
    ap_fd_own(fd);
    *out = conn;
    return 0;
}

int ap_fd_nodelay(int fd)
{
    return ap_sys_nodelay(fd);
}

static int register_one(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    rc = ap_endpoint_watch(&conn->slot, ap_queue_events(conn));
    ap_slot_unlock(&conn->slot);
    return rc;
}

int ap_conn_register(ap_conn **conns, int *results, int count)
{
    int failed = 0;
    for (int i = 0; i < count; i++) {
        results[i] = register_one(conns[i]);
        failed += results[i] < 0;
    }
    return failed;
}

/* ---- end -------------------------------------------------------------- */

/* Whether only the session has ended so: the connection's input may go on. */
static bool is_of_session(const ap_conn *conn, int end)
{
    return end == AP_ETLS ||
           (end == AP_EEOF && conn->tls && conn->tls->phase == AP_TLS_ENDED && !conn->discarding);
}

static bool has_ended(const ap_conn *conn, int end)
{
    return end && !is_of_session(conn, end);
}

/* A close would send an RST if input is unread, or if some arrives while output is
 * still unsent. If the kernel cannot be asked, there may be some. */
static bool may_close(const ap_conn *conn)
{
    int fd = conn->slot.fd;
    if (conn->type != AP_TCP || has_ended(conn, conn->read_end) ||
        has_ended(conn, conn->write_error))
        return true;
    return conn->input.size == 0 && !conn->discarding && ap_sys_unread(fd) == 0 &&
           ap_sys_unsent(fd) == 0;
}

static int linger_locked(ap_conn *conn, int64_t deadline)
{
    if (conn->out_bytes)
        return -EBUSY;
    if (may_close(conn))
        return 0;
    if (!conn->shut) {
        conn->shut = true;
        if (ap_sys_shutdown(conn->slot.fd, SHUT_WR) < 0) {
            ap_conn_ask(conn);
            return 0; /* no longer connected: nothing to wait for */
        }
    }
    if (is_of_session(conn, conn->read_end))
        conn->read_end = 0;
    conn->discarding = true;
    ap_input_drop(conn);
    return (int)ap_read_wait(conn, AP_WANT_END, 0, 0, deadline, NULL, 0);
}

int ap_conn_linger(ap_conn *conn, uint32_t pos, int64_t deadline)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    rc = linger_locked(conn, deadline);
    ap_conn_unlock(conn);
    return rc;
}

int ap_conn_close(ap_conn *conn, int reset, int keep_fd)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_input_drop(conn);
    ap_queue_drop(conn);
    ap_tls_drop(conn);
    int fd = ap_endpoint_close(&conn->slot);
    ap_conn_unlock(conn);
    return ap_endpoint_closed(&conn->slot, fd, reset != 0, keep_fd != 0);
}

int ap_conn_detach(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (conn->out_bytes || conn->tls) {
        ap_slot_unlock(&conn->slot);
        return -EBUSY;
    }
    ap_window_to(conn, pos);
    ap_fds_doom(conn);
    int fd = ap_endpoint_close(&conn->slot);
    ap_conn_unlock(conn);
    return ap_endpoint_closed(&conn->slot, fd, false, true);
}

int64_t ap_conn_rest(ap_conn *conn, char *buffer, size_t size)
{
    if (conn->slot.epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot_lock(&conn->slot);
    size_t n = size < conn->input.size ? size : conn->input.size;
    ap_chain_copy(&conn->input, 0, (uint8_t *)buffer, n);
    ap_chain_consume(&conn->input, n, &conn->pins);
    conn->shown = NULL;
    ap_slot_unlock(&conn->slot);
    return (int64_t)n;
}

void ap_conn_release(ap_conn *conn)
{
    if (conn->slot.epoch != ap_epoch_now())
        return;
    if (ap_conn_close(conn, 0, conn->slot.disowned) <
        0) { /* detached, perhaps: what nobody fetched */
        ap_slot_lock(&conn->slot);
        ap_input_drop(conn);
        ap_slot_unlock(&conn->slot);
    }
    ap_slot_unref(&conn->slot);
}
