/* A connection's state, and the queries about it. */
#include "connection.h"

#include "clock.h"
#include "driver.h"
#include "epoch.h"
#include "hub.h"
#include "inbox.h"
#include "owned.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"

/* ---- shared by all parts ---------------------------------------------- */

void ap_conn_note_deadline(ap_conn *conn, int64_t deadline)
{
    if (deadline >= conn->slot.timer_at)
        return; /* the entry that exists, or is under way, comes first and files again */
    conn->slot.timer_at = deadline;
    ap_inbox_push(&conn->slot, AP_BOX_DEADLINE, deadline);
}

void ap_conn_note_activity(ap_conn *conn)
{
    int64_t now = ap_now_coarse();
    atomic_store_explicit(&conn->last_activity, now, memory_order_relaxed);
    conn->idle_from = now;
}

size_t ap_conn_left(const ap_conn *conn, uint32_t pos)
{
    const ap_block *block = conn->shown;
    bool behind = block && pos > block->start && pos <= block->end;
    return conn->input.size - (behind ? pos - block->start : 0);
}

/* ---- the peer ---------------------------------------------------------- */

/* There are several ways to learn of the peer's end, and each may be the only one:
 *
 *   events     EPOLLRDHUP and EPOLLHUP, for a FIN or an RST that nobody has read. The
 *              driver may be slow to get to them.
 *   reading    recvmsg returns 0, or the socket's error.
 *   writing    sendmsg returns the error. That takes it away from the reader, and the
 *              handler that gets it may end before any event comes.
 *   shutting   shutdown finds the socket no longer connected.
 *   asking     before this side ends the socket itself (an idle end, a write that failed
 *              for lack of memory): everything it shows afterwards is of our own making.
 *
 * So whoever learns something calls ap_conn_learn, in either thread. What is known stays
 * known, and after the cut nothing more is learned.
 */

/* Errors that reach the socket from the network, or from the other process. ENOBUFS, ENOMEM,
 * EPERM and the like concern this side only. */
bool ap_is_of_peer(int error)
{
    switch (-error) {
    case EPIPE:
    case ECONNRESET:
    case ECONNABORTED:
    case ECONNREFUSED:
    case ETIMEDOUT:
    case EHOSTUNREACH:
    case EHOSTDOWN:
    case ENETUNREACH:
    case ENETDOWN:
    case ENETRESET: return true;
    default: return false;
    }
}

static bool peer_gone(const ap_conn *conn)
{
    bool hung_up = conn->slot.ready & (AP_RDHUP | AP_HUP);
    bool ended =
        conn->read_end == AP_EEOF || conn->read_end == AP_ECUT || ap_is_of_peer(conn->read_end);
    return conn->peer_gone || (!conn->cut && (hung_up || ended || conn->was_reset));
}

void ap_conn_learn(ap_conn *conn)
{
    AP_ASSERT_LOCKED(&conn->slot);
    AP_ASSERT(!conn->slot.closed); /* as ap_hub_post requires */
    conn->peer_gone = peer_gone(conn);
    if (!conn->watching_peer || !conn->peer_gone)
        return;
    conn->watching_peer = false;
    ap_hub_post(&conn->slot, AP_MAIL_GONE);
}

void ap_conn_ask(ap_conn *conn)
{
    conn->peer_gone |= !conn->cut && ap_sys_hung_up(conn->slot.fd);
    ap_conn_learn(conn);
}

void ap_conn_cut(ap_conn *conn)
{
    if (conn->cut)
        return;
    conn->peer_gone = peer_gone(conn) || ap_sys_hung_up(conn->slot.fd);
    conn->cut = true;
    ap_conn_learn(conn);
}

int ap_conn_watch_peer(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->watching_peer = true;
    ap_conn_learn(conn);
    ap_slot_unlock(&conn->slot);
    return 0;
}

/* ---- queries ---------------------------------------------------------- */

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
    ap_driver_catch_up(conn->slot.poller);
    ap_slot_lock(&conn->slot);
    int status = conn->slot.closed ? AP_IS_CLOSED : 0;
    if (conn->read_end == AP_EEOF)
        status |= AP_IS_EOF;
    else if (conn->read_end)
        status |= AP_IS_BROKEN;
    if (conn->read_end == AP_ETLS)
        status |= AP_IS_FAILED;
    if (conn->read_end == AP_ECUT)
        status |= AP_IS_CUT;
    if (conn->write_error || conn->was_reset)
        status |= AP_IS_BROKEN;
    if (conn->read_end == AP_EIDLE || conn->write_error == AP_EIDLE)
        status |= AP_IS_IDLE_END | AP_IS_BROKEN;
    if (ap_conn_is_shut(conn))
        status |= AP_IS_SHUT;
    if (peer_gone(conn))
        status |= AP_IS_GONE;
    ap_slot_unlock(&conn->slot);
    return status;
}

int ap_conn_statistics(ap_conn *conn, uint32_t pos, ap_conn_stats *out)
{
    if (conn->slot.epoch != ap_epoch_now())
        return -ECHILD;
    ap_driver_catch_up(conn->slot.poller);
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
