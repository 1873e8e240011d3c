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
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "tls.h"
#include "tls_output.h"
#include "tls_shake.h"
#include "window.h"

#include <unistd.h>

#define PAUSE 200 /* microseconds */
#define TRIES 5000

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
    conn->lent = conn->paused = false;
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
    if (conn->read_end)
        ap_tls_cut_off(conn);
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
    if (conn->slot.orphaned)
        return ap_state(conn->slot.poller);
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
        if (conn->shut)
            return -EPIPE;
        if (tls->held || conn->out_count || tls->phase == AP_TLS_SHAKING)
            return -EBUSY;
        ap_gate_enter();
        ap_ssl.err_clear();
        int rc = ap_ssl.shutdown(tls->ssl); /* once: twice would read the peer's */
        ap_gate_leave();
        if (rc < 0) {
            ap_tls_fail(conn, rc);
            return conn->write_error;
        }
        conn->goodbye = true;
        ap_tls_push(conn);
        if (conn->slot.ready & AP_READABLE)
            ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW); /* answers have stopped input */
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

/* Asks again while the answer is -EAGAIN: a thread computes. That takes milliseconds and is seldom,
 * so there is nothing to wake. */
static int patiently(ap_conn *conn, int (*ask)(ap_conn *conn))
{
    int rc = -EAGAIN;
    for (int tries = 0; rc == -EAGAIN && tries < TRIES; tries++) {
        if (tries > 0)
            usleep(PAUSE);
        ap_slot_lock(&conn->slot);
        rc = ask(conn);
        ap_slot_unlock(&conn->slot);
    }
    return rc == -EAGAIN ? -EBUSY : rc;
}

static int hold(ap_conn *conn)
{
    if (conn->tls && conn->tls->computing)
        return -EAGAIN;
    if (!conn->tls || conn->slot.closed)
        return -EBADF;
    ap_tls_hold(conn->tls);
    return 0;
}

int ap_conn_hold_tls(ap_conn *conn)
{
    return conn->slot.epoch == ap_epoch_now() ? patiently(conn, hold) : -ECHILD;
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

static int settle(ap_conn *conn)
{
    if (!conn->tls)
        return 0;
    return conn->slot.closed ? -EAGAIN : -EBUSY;
}

int ap_conn_settle_tls(ap_conn *conn)
{
    return conn->slot.epoch == ap_epoch_now() ? patiently(conn, settle) : 0;
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
