/* A connection: its wait, its deadlines, its end, and what the loop may call.
 *
 * Two sides work on it: the driver (ap_conn_serve, ap_conn_expire) and the
 * loop, each under the slot's mutex. The loop consumes and the driver only
 * appends, so whatever the loop was handed stays as it is.
 *
 * A connection's ends are independent of one another:
 *   read_end     nothing more will be received: FIN (AP_EEOF), an error, or
 *                idleness. What is buffered stays readable.
 *   write_error  nothing more can be sent.
 *   shut         this side has sent its FIN.
 *   slot.closed  the owner has closed it: everything else is moot.
 * Half-close is not close: read_end of AP_EEOF leaves writing as it was.
 */
#include "internal.h"

#include <stdlib.h>
#include <sys/epoll.h>

/* ---- opening ---------------------------------------------------------- */

int ap_conn_new(ap_poller *poller, ap_hub *hub, int fd, int kind, uint32_t high_water,
                ap_conn **out)
{
    if (poller->epoch != ap_epoch_now() || hub->epoch != ap_epoch_now())
        return -ECHILD;
    if (fd < 0 || kind < AP_TCP || kind > AP_SEQPACKET || high_water == 0)
        return -EINVAL;
    ap_slot *slot;
    int rc = ap_slot_take(AP_SLOT_CONN, poller, hub, fd, &slot);
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
    conn->created_at = ap_now();
    atomic_init(&conn->last_activity, conn->created_at);
    rc = ap_hub_link(slot);
    if (rc < 0) { /* the hub is dead: give the slot back, but not the descriptor */
        ap_conn_close(conn, 0, 1);
        ap_slot_unref(slot);
        return rc;
    }
    ap_fd_own(fd);
    *out = conn;
    return 0;
}

static int register_one(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    rc = ap_slot_watch(&conn->slot, ap_output_events(conn));
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

uint64_t ap_conn_id(ap_conn *conn)
{
    return conn->slot.id;
}

/* ---- the driver's part ------------------------------------------------ */

/* The end of the peer is learned in several ways, and each of them may be the only one:
 *
 *   events     EPOLLRDHUP and EPOLLHUP, of a FIN or a RST that nobody has read. The driver
 *              may be long in coming to them.
 *   reading    recvmsg says 0, or has the socket's error.
 *   writing    sendmsg has the error. That takes it away from the reader, and the handler
 *              that gets it may end before any event comes.
 *   asking     before this side ends the socket itself (an idle end, a write that has failed
 *              for want of memory): all that it shows afterwards is of our own making.
 *
 * So whoever learns something calls ap_conn_learn, in either thread; what is known stays
 * known; and behind the cut nothing is learned any more.
 */

/* What reaches the socket from the network, or from the other process. ENOBUFS, ENOMEM, EPERM
 * and the like tell of this side only. */
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
    bool ended = conn->read_end == AP_EEOF || ap_is_of_peer(conn->read_end);
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

bool ap_conn_serve(ap_context *context, ap_conn *conn)
{
    bool more = false;
    if (conn->type == AP_SEQPACKET) /* whatever has come, looking is harmless */
        conn->slot.ready |= AP_READABLE;
    if ((conn->slot.ready & AP_READABLE) && ap_input_wanted(conn))
        more = ap_input_read(context, conn);
    else
        ap_input_probe(conn);
    if (conn->out_bytes || conn->drain_armed || conn->watching_out)
        more |= ap_output_write(conn);
    if (ap_input_over(conn))
        ap_hub_post(&conn->slot, AP_MAIL_READ);
    ap_conn_learn(conn);
    return more;
}

/* What the loop is told of a slot in its mailbox. Everything is looked at
 * again: the bits only say that it is worth while. */
uint32_t ap_conn_resolve(ap_conn *conn, uint32_t bits, int32_t *value)
{
    uint32_t told = bits & (AP_MAIL_IDLE | AP_MAIL_GONE);
    if (ap_input_over(conn)) {
        if (conn->want == AP_WANT_BYTES && conn->input.size >= conn->want_bytes)
            *value = (int32_t)ap_read_shown(conn, conn->want_bytes);
        conn->want = AP_WANT_NOTHING;
        told |= AP_MAIL_READ;
    }
    if (conn->drain_armed && ap_output_over(conn)) {
        conn->drain_armed = false;
        told |= AP_MAIL_WRITE;
    }
    if (conn->owed && conn->out_bytes == 0) {
        conn->owed = false;
        told |= AP_MAIL_SENT;
    }
    if ((bits & AP_MAIL_FDS) && conn->carried)
        told |= AP_MAIL_FDS;
    if (bits & AP_MAIL_FAILED) {
        *value = ap_state(conn->slot.poller);
        told |= AP_MAIL_FAILED;
    }
    if ((bits & AP_MAIL_TRIM) && ap_input_idle(conn)) {
        ap_chain_drop(&conn->input, conn);
        conn->shown = NULL;
        conn->lent = false;
        told |= AP_MAIL_TRIM;
        /* later than the sweep that may be planned: many trims need no more than that one */
        ap_poller_push(&conn->slot, AP_BOX_SWEEP, ap_now_coarse() + 2 * AP_TRIM_AFTER);
    }
    ap_count(&conn->wakeups, told != 0);
    return told;
}

/* ---- deadlines -------------------------------------------------------- */

void ap_conn_note_deadline(ap_conn *conn, int64_t deadline)
{
    if (deadline >= conn->slot.timer_at)
        return; /* the entry that is there, or under way, comes first and files again */
    conn->slot.timer_at = deadline;
    ap_poller_push(&conn->slot, AP_BOX_DEADLINE, deadline);
}

void ap_conn_note_activity(ap_conn *conn)
{
    int64_t now = ap_now_coarse();
    atomic_store_explicit(&conn->last_activity, now, memory_order_relaxed);
    conn->idle_from = now;
}

static int64_t sooner(int64_t a, int64_t b)
{
    return a < b ? a : b;
}

static int64_t read_deadline(const ap_conn *conn)
{
    bool set = conn->want != AP_WANT_NOTHING && conn->want_deadline && !conn->want_expired;
    return set ? conn->want_deadline : AP_FOREVER;
}

static int64_t write_deadline(const ap_conn *conn)
{
    bool set = conn->drain_armed && conn->drain_deadline && !conn->drain_expired;
    return set ? conn->drain_deadline : AP_FOREVER;
}

#define COARSE_TICK ((int64_t)10 * 1000 * 1000) /* at CONFIG_HZ=100; others are finer */

static int64_t idle_deadline(const ap_conn *conn)
{
    /* idle_from is up to a tick of the coarse clock behind: never end early */
    return conn->idle ? conn->idle_from + conn->idle + COARSE_TICK : AP_FOREVER;
}

int64_t ap_conn_next_deadline(const ap_conn *conn)
{
    int64_t waits = sooner(read_deadline(conn), write_deadline(conn));
    return sooner(waits, sooner(idle_deadline(conn), conn->trim_at));
}

/* What is buffered stays readable; nothing else goes in or out. */
static void end_idle(ap_conn *conn)
{
    conn->idle = 0;
    ap_conn_cut(conn);
    int rc = ap_sys_shutdown(conn->slot.fd, SHUT_RDWR);
    (void)rc; /* not connected any more: as good */
    if (!conn->read_end)
        conn->read_end = AP_EIDLE;
    ap_output_fail(conn, AP_EIDLE);
    ap_hub_post(&conn->slot, AP_MAIL_IDLE | AP_MAIL_READ);
}

/* An empty block that the loop has a wrapper of is dropped by both: the loop is
 * told. Without a wrapper nobody else needs to know. */
static void trim(ap_conn *conn)
{
    conn->trim_at = AP_FOREVER;
    if (!ap_input_idle(conn))
        return;
    if (conn->lent)
        ap_hub_post(&conn->slot, AP_MAIL_TRIM);
    else
        ap_chain_drop(&conn->input, conn);
}

void ap_conn_expire(ap_conn *conn, int64_t now)
{
    if (now >= read_deadline(conn)) {
        conn->want_expired = true;
        ap_hub_post(&conn->slot, AP_MAIL_READ);
    }
    if (now >= write_deadline(conn)) {
        conn->drain_expired = true;
        ap_hub_post(&conn->slot, AP_MAIL_WRITE);
    }
    if (now >= idle_deadline(conn))
        end_idle(conn);
    if (now >= conn->trim_at)
        trim(conn);
}

/* What is buffered stays readable; the socket is as it was, but nobody looks after it. */
void ap_conn_fail(ap_conn *conn, int error)
{
    ap_conn_cut(conn);
    if (!conn->read_end)
        conn->read_end = error;
    ap_output_fail(conn, error);
    ap_hub_post(&conn->slot, AP_MAIL_FAILED | AP_MAIL_READ | AP_MAIL_WRITE);
}

int ap_conn_set_idle(ap_conn *conn, int64_t nanoseconds)
{
    if (nanoseconds < 0)
        return -EINVAL;
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->idle = nanoseconds;
    conn->idle_from = ap_now_coarse();
    if (nanoseconds)
        ap_conn_note_deadline(conn, idle_deadline(conn));
    ap_slot_unlock(&conn->slot);
    return 0;
}

/* ---- the end ---------------------------------------------------------- */

/* A close would be a RST if input is unread, or if some arrives while output is
 * still unsent. What cannot be asked for may be there. */
static bool may_close(const ap_conn *conn)
{
    int fd = conn->slot.fd;
    if (conn->type != AP_TCP || conn->read_end || conn->write_error)
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
        if (ap_sys_shutdown(conn->slot.fd, SHUT_WR) < 0)
            return 0; /* not connected any more: nothing to wait for */
    }
    conn->discarding = true;
    ap_input_drop(conn);
    return (int)ap_read_wait(conn, AP_WANT_END, 0, 0, deadline, NULL, 0);
}

int ap_conn_linger(ap_conn *conn, uint32_t pos, int64_t deadline)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_read_to(conn, pos);
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
    ap_output_drop(conn);
    int fd = ap_slot_close_locked(&conn->slot);
    ap_conn_unlock(conn);
    return ap_slot_closed(&conn->slot, fd, reset != 0, keep_fd != 0);
}

int ap_conn_detach(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (conn->out_bytes) {
        ap_slot_unlock(&conn->slot);
        return -EBUSY;
    }
    ap_read_to(conn, pos);
    ap_fds_doom(conn);
    int fd = ap_slot_close_locked(&conn->slot);
    ap_conn_unlock(conn);
    return ap_slot_closed(&conn->slot, fd, false, true);
}

int64_t ap_conn_rest(ap_conn *conn, char *buffer, size_t size)
{
    if (conn->slot.epoch != ap_epoch_now())
        return -ECHILD;
    ap_slot_lock(&conn->slot);
    size_t n = size < conn->input.size ? size : conn->input.size;
    ap_chain_copy(&conn->input, 0, (uint8_t *)buffer, n);
    ap_chain_consume(&conn->input, n, conn);
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

/* The slot becomes free: what only it had. Its input has been dropped before: a
 * block that a view pins takes a reference to the slot, which must not be the first. */
void ap_conn_drop(ap_conn *conn)
{
    AP_ASSERT(!conn->input.head);
    ap_output_drop(conn);
    if (conn->delimiter != conn->delimiter_inline)
        free(conn->delimiter);
    conn->delimiter = conn->delimiter_inline;
}

/* ---- asking ----------------------------------------------------------- */

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
    if (conn->write_error || conn->was_reset)
        status |= AP_IS_BROKEN;
    if (conn->read_end == AP_EIDLE || conn->write_error == AP_EIDLE)
        status |= AP_IS_IDLE_END | AP_IS_BROKEN;
    if (conn->shut)
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
    ap_slot_lock(&conn->slot);
    *out = (ap_conn_stats){
        .bytes_received = ap_counted(&conn->bytes_received),
        .bytes_sent = ap_counted(&conn->bytes_sent),
        .reads = ap_counted(&conn->reads),
        .writes = ap_counted(&conn->writes),
        .wakeups = ap_counted(&conn->wakeups),
        .buffered_input = ap_read_left(conn, pos),
        .buffered_output = conn->out_bytes,
        .pinned = ap_counted(&conn->pinned),
        .created_at = conn->created_at,
        .last_activity = atomic_load_explicit(&conn->last_activity, memory_order_relaxed),
    };
    ap_slot_unlock(&conn->slot);
    return 0;
}
