/* A connection: its state, and what may be asked about it at any time. */
#include "connection.h"

#include "clock.h"
#include "epoch.h"
#include "inbox.h"
#include "owned.h"
#include "pool.h"
#include "slot.h"

/* ---- what all parts do ------------------------------------------------ */

void ap_conn_note_deadline(ap_conn *conn, int64_t deadline)
{
    if (deadline >= conn->slot.timer_at)
        return; /* the entry that is there, or under way, comes first and files again */
    conn->slot.timer_at = deadline;
    ap_inbox_push(&conn->slot, AP_BOX_DEADLINE, deadline);
}

void ap_conn_note_activity(ap_conn *conn)
{
    int64_t now = ap_now_coarse();
    atomic_store_explicit(&conn->last_activity, now, memory_order_relaxed);
    conn->idle_from = now;
}

/* By a FIN or a RST. What this side has done itself, had no memory for, or learns of a poller
 * that has failed, is neither. */
bool ap_conn_peer_gone(const ap_conn *conn)
{
    int end = conn->read_end;
    if (end == AP_EIDLE || conn->write_error == AP_EIDLE || conn->slot.orphaned)
        return false;
    return (conn->slot.ready & (AP_RDHUP | AP_HUP)) || (end && end != -ENOMEM) || conn->gone;
}

size_t ap_conn_left(const ap_conn *conn, uint32_t pos)
{
    const ap_block *block = conn->shown;
    bool behind = block && pos > block->start && pos <= block->end;
    return conn->input.size - (behind ? pos - block->start : 0);
}

/* ---- asking ----------------------------------------------------------- */

uint64_t ap_conn_id(ap_conn *conn)
{
    return conn->slot.id;
}

int ap_conn_fd(ap_conn *conn, int disown)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    rc = conn->slot.fd;
    if (disown) {
        conn->slot.disowned = true;
        ap_fd_disown(rc);
    }
    ap_slot_unlock(&conn->slot);
    return rc;
}

int ap_conn_status(ap_conn *conn)
{
    if (conn->slot.epoch != ap_epoch_now())
        return AP_IS_CLOSED;
    ap_slot_lock(&conn->slot);
    int status = conn->slot.closed ? AP_IS_CLOSED : 0;
    if (conn->read_end == AP_EEOF)
        status |= AP_IS_EOF;
    else if (conn->read_end)
        status |= AP_IS_BROKEN;
    if (conn->write_error || conn->gone)
        status |= AP_IS_BROKEN;
    if (conn->read_end == AP_EIDLE || conn->write_error == AP_EIDLE)
        status |= AP_IS_IDLE_END | AP_IS_BROKEN;
    if (conn->shut)
        status |= AP_IS_SHUT;
    if (ap_conn_peer_gone(conn))
        status |= AP_IS_GONE;
    ap_slot_unlock(&conn->slot);
    return status;
}

int ap_conn_statistics(ap_conn *conn, uint32_t pos, ap_conn_stats *out)
{
    if (conn->slot.epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot_lock(&conn->slot);
    *out = (ap_conn_stats){
        .bytes_received = ap_counted(&conn->bytes_received),
        .bytes_sent = ap_counted(&conn->bytes_sent),
        .reads = ap_counted(&conn->reads),
        .writes = ap_counted(&conn->writes),
        .wakeups = ap_counted(&conn->wakeups),
        .buffered_input = ap_conn_left(conn, pos),
        .buffered_output = conn->out_bytes,
        .pinned = ap_counted(&conn->pins.bytes),
        .created_at = conn->created_at,
        .last_activity = atomic_load_explicit(&conn->last_activity, memory_order_relaxed),
    };
    ap_slot_unlock(&conn->slot);
    return 0;
}
