/* The loop's write calls: sending, waiting for completion, giving up, a FIN. */
#include "anypoll.h"

#include "clock.h"
#include "connection.h"
#include "inbox.h"
#include "output.h"
#include "poller.h"
#include "queue.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"

int64_t ap_conn_send(ap_conn *conn, const ap_piece *pieces, int count)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t left = ap_conn_is_shut(conn) ? -EPIPE : ap_output_send(conn, pieces, count);
    ap_slot_unlock(&conn->slot);
    return left;
}

int64_t ap_conn_write(ap_conn *conn, const char *data, size_t size)
{
    ap_piece piece = {.data = data, .size = size};
    return ap_conn_send(conn, &piece, 1);
}

static int drain_locked(ap_conn *conn, int64_t deadline)
{
    if (conn->write_error)
        return conn->write_error;
    if (ap_queue_over(conn))
        return 0;
    if (deadline && ap_now() >= deadline) {
        ap_count(&conn->slot.poller->timeouts, 1);
        return AP_ELATE;
    }
    /* another task may already wait: the earliest of all deadlines counts */
    if (!conn->drain_armed || !conn->drain_deadline ||
        (deadline && deadline < conn->drain_deadline))
        conn->drain_deadline = deadline;
    conn->drain_armed = true;
    if (deadline)
        ap_conn_note_deadline(conn, deadline);
    if (!(conn->slot.ready & AP_WRITABLE))
        ap_queue_watch(conn, true);
    return -EAGAIN;
}

int ap_conn_drain(ap_conn *conn, int until_writable, int64_t deadline)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (!conn->drain_armed)
        conn->drain_expired = conn->drain_writable = false;
    conn->drain_writable |= until_writable != 0;
    rc = drain_locked(conn, deadline);
    ap_slot_unlock(&conn->slot);
    return rc;
}

int64_t ap_conn_queued(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t left = (int64_t)conn->out_bytes;
    ap_slot_unlock(&conn->slot);
    return left;
}

int64_t ap_conn_awaited(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    size_t records = conn->tls ? conn->tls->given_up : 0;
    int64_t left = (int64_t)(conn->out_bytes - conn->given_up - records);
    ap_slot_unlock(&conn->slot);
    return left;
}

int ap_conn_give_up(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->given_up = conn->out_bytes - conn->own_bytes;
    if (conn->tls)
        conn->tls->given_up = conn->tls->counted;
    ap_slot_unlock(&conn->slot);
    return 0;
}

int ap_conn_disarm_write(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->drain_armed = false;
    ap_queue_unwatch(conn);
    ap_slot_unlock(&conn->slot);
    return 0;
}

int64_t ap_conn_hold(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t left = (int64_t)(conn->out_bytes - conn->own_bytes);
    conn->held = left > 0;
    ap_slot_unlock(&conn->slot);
    return left;
}

int64_t ap_conn_requeue(ap_conn *conn, const ap_piece *pieces, int count)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->held = false;
    conn->out_count = conn->own_count;
    conn->out_bytes = conn->own_bytes;
    int64_t left = conn->write_error;
    if (!left && count > 0 &&
        !ap_queue_append(conn, (const struct iovec *)pieces, (size_t)count, 0)) {
        left = -ENOMEM;
        ap_queue_fail(conn, -ENOMEM);
    }
    size_t given = conn->out_bytes - conn->own_bytes;
    conn->owed = given > 0;
    if (conn->given_up > given)
        conn->given_up = given;
    ap_queue_count(conn);
    ap_queue_unwatch(conn);
    if (conn->out_bytes && (conn->slot.ready & AP_WRITABLE))
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    if (!left)
        left = (int64_t)conn->out_bytes;
    ap_slot_unlock(&conn->slot);
    return left;
}

int ap_conn_shutdown(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (conn->write_error)
        rc = conn->write_error;
    else if (conn->out_bytes || conn->tls)
        rc = -EBUSY;
    else if (!conn->shut) {
        rc = ap_sys_shutdown(conn->slot.fd, SHUT_WR);
        conn->shut = true;
        if (rc < 0)
            ap_conn_ask(conn);
    }
    ap_slot_unlock(&conn->slot);
    return rc;
}
