/* The loop's calls for a TLS session: its beginning and its end, and questions about it. */
#include "anypoll.h"

#include "bytes.h"
#include "chain.h"
#include "connection.h"
#include "epoch.h"
#include "fds.h"
#include "gate.h"
#include "hub.h"
#include "inbox.h"
#include "input.h"
#include "openssl.h"
#include "pool.h"
#include "slot.h"
#include "tls.h"
#include "tls_output.h"
#include "tls_shake.h"
#include "window.h"

#include <unistd.h>

#define SETTLE_PAUSE 200 /* microseconds */
#define SETTLE_TRIES 5000

/* ---- beginning and end ------------------------------------------------ */

/* What is unread is ciphertext. */
static bool take_input(ap_conn *conn, ap_tls *tls)
{
    for (ap_block *block = conn->input.head; block; block = block->next) {
        size_t size = block->end - block->start;
        if (!ap_bytes_append(&tls->ahead, ap_block_at(block, block->start), size))
            return false;
    }
    ap_input_drop(conn);
    conn->lent = false;
    return true;
}

static int start(ap_conn *conn, ap_ossl_ssl *ssl, int flags)
{
    if (conn->tls || conn->type == AP_SEQPACKET || conn->want != AP_WANT_NOTHING || conn->shut ||
        conn->out_bytes)
        return -EBUSY;
    conn->tls = ap_tls_new(ssl, flags);
    if (!conn->tls)
        return -ENOMEM;
    if (!take_input(conn, conn->tls)) {
        ap_tls_drop(conn);
        return -ENOMEM;
    }
    conn->straight = false;
    if (ap_tls_wants_step(conn))
        ap_tls_step_later(conn);
    return 0;
}

int ap_conn_start_tls(ap_conn *conn, uint32_t pos, void *ssl, int flags)
{
    if (!ap_ssl.read)
        return -ENOSYS;
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    rc = start(conn, ssl, flags);
    ap_conn_unlock(conn);
    return rc;
}

static int end_locked(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    if (!tls || tls->held || tls->phase != AP_TLS_ENDED || !conn->goodbye || conn->out_bytes ||
        conn->input.size || conn->want != AP_WANT_NOTHING)
        return -EBUSY;
    size_t size = ap_bytes_size(&tls->ahead);
    ap_block *block = size ? ap_pool_take(conn->slot.hub->context.pool, size) : NULL;
    if (size && !block)
        return -ENOMEM;
    ap_input_drop(conn);
    conn->lent = false;
    if (block) {
        memcpy(ap_block_at(block, block->start), ap_bytes_front(&tls->ahead), size);
        block->end += (uint32_t)size;
        ap_window_put_front(conn, block);
    }
    conn->read_end = 0;
    conn->goodbye = false;
    conn->peer_gone = false; /* by what the session said; what the socket shows is looked at anew */
    conn->slot.ready |= AP_READABLE;
    ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    return 0;
}

int ap_conn_end_tls(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    rc = end_locked(conn);
    if (rc == 0)
        ap_tls_drop(conn);
    ap_conn_unlock(conn);
    return rc;
}

/* ---- goodbye ---------------------------------------------------------- */

static int64_t say_goodbye(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    if (conn->write_error)
        return conn->write_error;
    if (!conn->goodbye) {
        if (tls->held || conn->out_count || tls->phase == AP_TLS_SHAKING)
            return -EBUSY;
        ap_ssl.err_clear();
        ap_gate_enter();
        int rc = ap_ssl.shutdown(tls->ssl); /* once: twice would read the peer's */
        ap_gate_leave();
        if (rc < 0) {
            ap_tls_fail(conn, rc);
            return conn->write_error;
        }
        conn->goodbye = true;
        if (conn->slot.ready & AP_WRITABLE)
            ap_tls_push(conn);
    }
    return conn->write_error ? conn->write_error : (int64_t)conn->out_bytes;
}

int64_t ap_conn_say_goodbye(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t left = conn->tls ? say_goodbye(conn) : -EINVAL;
    ap_slot_unlock(&conn->slot);
    return left;
}

/* ---- asking ----------------------------------------------------------- */

int ap_conn_hold_tls(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (conn->tls)
        ap_tls_hold(conn->tls);
    else
        rc = -EBADF;
    ap_slot_unlock(&conn->slot);
    return rc;
}

/* The connection may be closed by now. */
int ap_conn_release_tls(ap_conn *conn)
{
    if (conn->slot.epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot_lock(&conn->slot);
    ap_tls_release(conn);
    if (!conn->slot.closed)
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW); /* for what was left undone */
    ap_slot_unlock(&conn->slot);
    return 0;
}

static bool is_settled(ap_conn *conn, bool *may_settle)
{
    ap_slot_lock(&conn->slot);
    bool settled = !conn->tls;
    *may_settle = conn->slot.closed;
    ap_slot_unlock(&conn->slot);
    return settled;
}

/* A step of a handshake takes milliseconds, and this is seldom: there is nothing to wake. */
int ap_conn_settle_tls(ap_conn *conn)
{
    bool may_settle = conn->slot.epoch == ap_epoch_now();
    if (!may_settle)
        return 0;
    for (int i = 0; i < SETTLE_TRIES; i++) {
        if (is_settled(conn, &may_settle))
            return 0;
        if (!may_settle)
            return -EBUSY;
        usleep(SETTLE_PAUSE);
    }
    return -EBUSY;
}

int ap_conn_tls_status(ap_conn *conn, ap_tls_status *out)
{
    if (conn->slot.epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot_lock(&conn->slot);
    if (conn->tls)
        ap_tls_describe(conn->tls, out);
    else
        *out = (ap_tls_status){0};
    ap_slot_unlock(&conn->slot);
    return 0;
}
