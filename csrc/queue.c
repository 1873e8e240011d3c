/* A connection's send queue, and the system call that empties it.
 *
 * What is queued is, in this order: records of TLS that were made and not sent (tls_output.c), a
 * copy of our own (output.c), and pieces of Python's, by reference. Their memory belongs to
 * Python, so whenever the queue has emptied or failed a token is owed (AP_MAIL_SENT), whether
 * anyone waits or not; only then does the loop release the objects.
 *
 * AP_WRITABLE is cleared by EAGAIN and by a write that took less than was
 * offered: an edge follows those. A write that our own bound cut short leaves it
 * set, and the slot goes to the run list.
 *
 * On TCP EPOLLOUT is always in the mask. On UNIX sockets it would cost an event
 * for every reply, because there each message that the peer reads makes room; so
 * it is in the mask only while a write is stalled.
 */
#include "queue.h"

#include "connection.h"
#include "guard.h"
#include "hub.h"
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"

#include <stdlib.h>
#include <sys/epoll.h>

#define PIECES_AT_ONCE 64 /* far below IOV_MAX, and a small array on the stack */

void ap_queue_count(ap_conn *conn)
{
    bool queued = conn->out_bytes > 0;
    if (queued == conn->out_counted)
        return;
    conn->out_counted = queued;
    ap_guard_output(conn->slot.poller, queued);
}

bool ap_queue_over(const ap_conn *conn)
{
    if (conn->write_error || conn->drain_expired)
        return true;
    return conn->out_bytes == 0 && (!conn->drain_writable || (conn->slot.ready & AP_WRITABLE));
}

/* Posts whatever the state of the queue requires. */
void ap_queue_tell(ap_conn *conn)
{
    uint32_t bits = 0;
    if (conn->owed && conn->out_bytes == 0)
        bits |= AP_MAIL_SENT;
    if (conn->drain_armed && ap_queue_over(conn))
        bits |= AP_MAIL_WRITE;
    if (bits)
        ap_hub_post(&conn->slot, bits);
}

static void forget_own(ap_conn *conn)
{
    if (conn->own)
        ap_block_unref(conn->own);
    conn->own = NULL;
    conn->own_count = 0;
}

void ap_queue_forget(ap_conn *conn)
{
    forget_own(conn);
    if (conn->tls)
        ap_tls_forget_output(conn);
    conn->out_first = conn->out_count = 0;
    conn->out_bytes = conn->own_bytes = conn->given_up = 0;
    if (conn->out_capacity > 16) { /* one stall must not cost memory forever */
        free(conn->out);
        conn->out = NULL;
        conn->out_capacity = 0;
    }
    ap_queue_count(conn);
}

void ap_queue_fail(ap_conn *conn, int error)
{
    if (!conn->write_error)
        conn->write_error = error;
    ap_queue_forget(conn);
    ap_queue_tell(conn);
}

/* Handles a failed system call. The socket itself may live on (ENOBUFS), and a task that
 * waits for input at either end would wait for an answer that never comes, so it is ended
 * for both. On UNIX sockets EPIPE may only mean that the peer no longer reads; it may
 * still send, unless the socket shows that it has closed. */
void ap_queue_break(ap_conn *conn, int error)
{
    conn->send_error = error;
    ap_queue_fail(conn, error);
    if (error == -EPIPE && conn->type != AP_TCP) {
        ap_conn_ask(conn);
        return;
    }
    conn->peer_gone |= !conn->cut && ap_is_of_peer(error);
    ap_conn_cut(conn);
    int rc = ap_sys_shutdown(conn->slot.fd, SHUT_RDWR);
    (void)rc; /* no longer connected: just as good */
}

void ap_queue_drop(ap_conn *conn)
{
    forget_own(conn);
    if (conn->tls)
        ap_tls_forget_output(conn);
    free(conn->out);
    conn->out = NULL;
    conn->out_first = conn->out_count = conn->out_capacity = 0;
    conn->out_bytes = conn->own_bytes = conn->given_up = 0;
    conn->owed = conn->drain_armed = conn->held = false;
    ap_queue_count(conn);
}

/* ---- the mask of UNIX sockets ----------------------------------------- */

uint32_t ap_queue_events(const ap_conn *conn)
{
    bool out = conn->type == AP_TCP || conn->watching_out;
    return EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET | (out ? EPOLLOUT : 0);
}

void ap_queue_watch(ap_conn *conn, bool on)
{
    ap_slot *slot = &conn->slot;
    if (conn->type == AP_TCP || conn->watching_out == on)
        return;
    conn->watching_out = on;
    if (!slot->watched)
        return; /* it will be registered with this mask */
    int rc = ap_sys_epoll_ctl(slot->poller->epfd, EPOLL_CTL_MOD, slot->fd, ap_queue_events(conn),
                              ap_slot_tag(slot));
    if (rc < 0)
        ap_queue_break(conn, rc);
}

/* Nothing is stalled any more, unless someone waits for room. */
void ap_queue_unwatch(ap_conn *conn)
{
    if (conn->out_bytes == 0)
        ap_queue_watch(conn, conn->drain_armed && !(conn->slot.ready & AP_WRITABLE));
}

static void stalled(ap_conn *conn)
{
    conn->slot.ready &= (uint8_t)~AP_WRITABLE;
    ap_count(&conn->slot.poller->stalls, 1);
    ap_queue_watch(conn, true);
}

/* ---- the queue -------------------------------------------------------- */

bool ap_queue_reserve(ap_conn *conn, uint32_t more)
{
    if (conn->out_first > 0) {
        memmove(conn->out, conn->out + conn->out_first, conn->out_count * sizeof *conn->out);
        conn->out_first = 0;
    }
    if (conn->out_count + more <= conn->out_capacity)
        return true;
    uint32_t capacity = conn->out_capacity ? conn->out_capacity : 4;
    while (capacity < conn->out_count + more)
        capacity *= 2;
    struct iovec *grown = ap_sys_alloc(capacity * sizeof *grown);
    if (!grown)
        return false;
    if (conn->out_count)
        memcpy(grown, conn->out, conn->out_count * sizeof *grown);
    free(conn->out);
    conn->out = grown;
    conn->out_capacity = capacity;
    return true;
}

/* Queues Python's pieces, without their first skip bytes. */
bool ap_queue_append(ap_conn *conn, const struct iovec *iov, size_t count, size_t skip)
{
    if (!ap_queue_reserve(conn, (uint32_t)count))
        return false;
    for (size_t i = 0; i < count; i++) {
        size_t cut = skip < iov[i].iov_len ? skip : iov[i].iov_len, rest = iov[i].iov_len - cut;
        skip -= cut;
        if (rest == 0)
            continue;
        conn->out[conn->out_count++] =
            (struct iovec){.iov_base = (char *)iov[i].iov_base + cut, .iov_len = rest};
        conn->out_bytes += rest;
    }
    ap_queue_count(conn);
    return true;
}

void ap_queue_advance(ap_conn *conn, size_t n)
{
    size_t own = n < conn->own_bytes ? n : conn->own_bytes, rest = n - own;
    conn->out_bytes -= n;
    conn->own_bytes -= own;
    conn->given_up -= rest < conn->given_up ? rest : conn->given_up;
    while (n > 0) {
        struct iovec *piece = &conn->out[conn->out_first];
        if (n < piece->iov_len) {
            piece->iov_base = (char *)piece->iov_base + n;
            piece->iov_len -= n;
            return;
        }
        n -= piece->iov_len;
        conn->out_first++;
        conn->out_count--;
        if (conn->own_count && --conn->own_count == 0)
            forget_own(conn);
    }
}

/* ---- to the kernel ---------------------------------------------------- */

static void note_sent(ap_conn *conn, size_t n)
{
    ap_poller *poller = conn->slot.poller;
    ap_count(&conn->writes, 1);
    ap_count(&poller->writes, 1);
    ap_count(&conn->bytes_sent, n);
    ap_count(&poller->bytes_sent, n);
    ap_conn_note_activity(conn);
}

void ap_queue_took(ap_conn *conn, size_t n, size_t offered)
{
    note_sent(conn, n);
    if (n < offered)
        stalled(conn);
}

void ap_queue_again(ap_conn *conn)
{
    ap_count(&conn->slot.poller->again, 1);
    stalled(conn);
}

/* Makes one system call with at most PIECES_AT_ONCE pieces and AP_BOUND bytes. False:
 * the kernel takes no more now, or the connection has failed. */
bool ap_queue_offer(ap_conn *conn, const struct iovec *iov, size_t count, size_t *sent)
{
    struct iovec some[PIECES_AT_ONCE];
    size_t n = 0, offered = 0;
    for (; n < count && n < PIECES_AT_ONCE && offered < AP_BOUND; n++) {
        some[n] = iov[n];
        if (some[n].iov_len > AP_BOUND - offered)
            some[n].iov_len = AP_BOUND - offered;
        offered += some[n].iov_len;
    }
    *sent = 0;
    ssize_t took = ap_sys_send(conn->slot.fd, some, n, &offered);
    if (took >= 0) {
        *sent = (size_t)took;
        ap_queue_took(conn, *sent, offered);
        return *sent == offered;
    }
    if (took == -EAGAIN) {
        ap_queue_again(conn);
    } else {
        ap_queue_break(conn, (int)took);
    }
    return false;
}
