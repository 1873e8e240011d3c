/* A driver's connection handler: I/O, deadlines, and notifications to the loop.
 *
 * The mailbox says only that a look is worthwhile. What the loop is told is what is true
 * when it takes the token (ap_conn_resolve).
 */
#include "serve.h"

#include "chain.h"
#include "clock.h"
#include "connection.h"
#include "fds.h"
#include "hub.h"
#include "inbox.h"
#include "input.h"
#include "output.h"
#include "poller.h"
#include "pool.h"
#include "queue.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"
#include "tls_shake.h"
#include "window.h"

/* ---- serving and telling ---------------------------------------------- */

static bool serve(ap_context *context, ap_conn *conn)
{
    bool more = false;
    if (conn->tls && ap_tls_wants_step(conn))
        ap_tls_step_later(conn);
    if (conn->slot.closed)
        return false;
    if (conn->type == AP_SEQPACKET) /* whatever has come, looking is harmless */
        conn->slot.ready |= AP_READABLE;
    if ((conn->slot.ready & AP_READABLE) && ap_input_wanted(conn))
        more = ap_input_read(context, conn);
    else
        ap_input_probe(conn);
    if (conn->out_bytes || conn->drain_armed || conn->watching_out)
        more |= ap_output_write(conn);
    if (conn->tls && (conn->slot.ready & AP_READABLE) && ap_input_wanted(conn))
        more = true; /* it did not read for all that it had to answer */
    if (ap_input_over(conn))
        ap_hub_post(&conn->slot, AP_MAIL_READ);
    ap_conn_learn(conn);
    return more;
}

bool ap_conn_serve(ap_slot *slot, ap_context *context)
{
    ap_conn *conn = ap_conn_of(slot);
    ap_slot_lock(slot);
    bool more = !slot->closed && serve(context, conn);
    ap_conn_unlock(conn);
    return more;
}

/* What the loop is told about a slot in its mailbox. Everything is checked again: the bits
 * only say that a look is worthwhile. */
uint32_t ap_conn_resolve(ap_slot *slot, uint32_t bits, int32_t *value)
{
    ap_conn *conn = ap_conn_of(slot);
    uint32_t told = bits & (AP_MAIL_IDLE | AP_MAIL_GONE);
    if (ap_input_over(conn)) {
        if (conn->want == AP_WANT_BYTES && conn->input.size >= conn->want_bytes)
            *value = (int32_t)ap_window_shown(conn, conn->want_bytes);
        conn->want = AP_WANT_NOTHING;
        told |= AP_MAIL_READ;
    }
    if (conn->drain_armed && ap_queue_over(conn)) {
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
        ap_chain_drop(&conn->input, &conn->pins);
        conn->shown = NULL;
        conn->lent = false;
        told |= AP_MAIL_TRIM;
        /* later than the sweep that may be planned: many trims need only that one */
        ap_inbox_push(&conn->slot, AP_BOX_SWEEP, ap_now_coarse() + 2 * AP_TRIM_AFTER);
    }
    ap_count(&conn->wakeups, told != 0);
    return told;
}

/* ---- deadlines -------------------------------------------------------- */

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

static int64_t next_deadline(const ap_conn *conn)
{
    int64_t waits = sooner(read_deadline(conn), write_deadline(conn));
    return sooner(waits, sooner(idle_deadline(conn), conn->trim_at));
}

/* Buffered input stays readable; nothing else goes in or out. */
static void end_idle(ap_conn *conn)
{
    conn->idle = 0;
    ap_conn_cut(conn);
    int rc = ap_sys_shutdown(conn->slot.fd, SHUT_RDWR);
    (void)rc; /* no longer connected: just as good */
    if (!conn->read_end)
        conn->read_end = AP_EIDLE;
    ap_queue_fail(conn, AP_EIDLE);
    ap_hub_post(&conn->slot, AP_MAIL_IDLE | AP_MAIL_READ);
}

/* An empty block whose wrapper the loop has is dropped by both: the loop is told. Without
 * a wrapper nobody else needs to know. */
static void trim(ap_conn *conn)
{
    conn->trim_at = AP_FOREVER;
    if (!ap_input_idle(conn))
        return;
    if (conn->lent)
        ap_hub_post(&conn->slot, AP_MAIL_TRIM);
    else
        ap_chain_drop(&conn->input, &conn->pins);
}

/* Whether something has come that no step knows of: epoll gives so many events at once, and the
 * driver may have been late. Messages are for the loop to look for. */
static bool has_news(const ap_conn *conn)
{
    const ap_slot *slot = &conn->slot;
    /* a step of a handshake, or who holds the session, may be late as well */
    bool late = conn->tls && (conn->tls->held || conn->tls->phase == AP_TLS_SHAKING);
    bool in =
        conn->type != AP_SEQPACKET && !conn->read_end && (late || !(slot->ready & AP_READABLE));
    bool out = conn->out_bytes && !(slot->ready & AP_WRITABLE);
    return (in && ap_sys_readable(slot->fd)) || (out && ap_sys_writable(slot->fd));
}

/* A step may end before it has come to all that is ready (ap_run). What has arrived in time, and
 * what can be sent, counts as activity all the same: a later step serves it first. */
int64_t ap_conn_expire(ap_slot *slot, int64_t now)
{
    ap_conn *conn = ap_conn_of(slot);
    if (now >= read_deadline(conn)) {
        conn->want_expired = true;
        ap_hub_post(&conn->slot, AP_MAIL_READ);
    }
    if (now >= write_deadline(conn)) {
        conn->drain_expired = true;
        ap_hub_post(&conn->slot, AP_MAIL_WRITE);
    }
    if (now >= idle_deadline(conn) && !slot->on_run && !has_news(conn))
        end_idle(conn);
    if (now >= conn->trim_at)
        trim(conn);
    int64_t next = next_deadline(conn);
    return next > now ? next : now + COARSE_TICK;
}

/* Buffered input stays readable; the socket is unchanged, but nobody looks after it. */
void ap_conn_fail(ap_slot *slot, int error)
{
    ap_conn *conn = ap_conn_of(slot);
    ap_conn_cut(conn);
    if (!conn->read_end)
        conn->read_end = error;
    ap_queue_fail(conn, error);
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
