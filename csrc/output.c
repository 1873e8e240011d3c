/* A connection's send queue.
 *
 * The caller's own thread tries first. Only what the kernel did not take is
 * queued, by reference, and finished by the driver (except for a little output of
 * a busy loop, of which the driver gets a copy: ap_output_hand_over). The memory
 * belongs to Python, so whenever the queue has emptied or failed a token is owed
 * (AP_MAIL_SENT), whether anyone waits or not; only then does the loop release the
 * objects.
 *
 * AP_WRITABLE is cleared by EAGAIN and by a write that took less than was
 * offered: an edge follows those. A write that our own bound cut short leaves it
 * set, and the slot goes to the run list.
 *
 * On TCP EPOLLOUT is always in the mask. On UNIX sockets it would cost an event
 * for every reply, because there each message that the peer reads makes room; so
 * it is in the mask only while a write is stalled.
 */
#include "output.h"

#include "connection.h"
#include "guard.h"
#include "hub.h"
#include "inbox.h"
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"

#include <stdlib.h>
#include <sys/epoll.h>

#define HAND_OVER_FROM 4 /* connections that were ready together */
#define HAND_OVER_MOST (16u * 1024)
#define PIECES_AT_ONCE 64 /* far below IOV_MAX, and a small array on the stack */

static bool offer(ap_conn *conn, const struct iovec *iov, size_t count, size_t *sent);

void ap_output_count(ap_conn *conn)
{
    bool queued = conn->out_bytes > 0;
    if (queued == conn->out_counted)
        return;
    conn->out_counted = queued;
    ap_guard_output(conn->slot.poller, queued);
}

bool ap_output_over(const ap_conn *conn)
{
    if (conn->write_error || conn->drain_expired)
        return true;
    return conn->out_bytes == 0 && (!conn->drain_writable || (conn->slot.ready & AP_WRITABLE));
}

/* Posts whatever the state of the queue requires. */
static void tell(ap_conn *conn)
{
    uint32_t bits = 0;
    if (conn->owed && conn->out_bytes == 0)
        bits |= AP_MAIL_SENT;
    if (conn->drain_armed && ap_output_over(conn))
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
    conn->own_bytes = 0;
}

static void forget_queue(ap_conn *conn)
{
    forget_own(conn);
    conn->out_first = conn->out_count = 0;
    conn->out_bytes = conn->given_up = 0;
    if (conn->out_capacity > 16) { /* one stall must not cost memory forever */
        free(conn->out);
        conn->out = NULL;
        conn->out_capacity = 0;
    }
    ap_output_count(conn);
}

void ap_output_fail(ap_conn *conn, int error)
{
    if (!conn->write_error)
        conn->write_error = error;
    forget_queue(conn);
    tell(conn);
}

/* Handles a failed system call. The socket itself may live on (ENOBUFS), and a task that
 * waits for input at either end would wait for an answer that never comes, so it is ended
 * for both. On UNIX sockets EPIPE may only mean that the peer no longer reads; it may
 * still send, unless the socket shows that it has closed. */
void ap_output_break(ap_conn *conn, int error)
{
    conn->send_error = error;
    ap_output_fail(conn, error);
    if (error == -EPIPE && conn->type != AP_TCP) {
        ap_conn_ask(conn);
        return;
    }
    conn->peer_gone |= !conn->cut && ap_is_of_peer(error);
    ap_conn_cut(conn);
    int rc = ap_sys_shutdown(conn->slot.fd, SHUT_RDWR);
    (void)rc; /* no longer connected: just as good */
}

void ap_output_drop(ap_conn *conn)
{
    forget_own(conn);
    free(conn->out);
    conn->out = NULL;
    conn->out_first = conn->out_count = conn->out_capacity = 0;
    conn->out_bytes = conn->given_up = 0;
    conn->owed = conn->drain_armed = conn->held = false;
    ap_output_count(conn);
}

/* ---- the mask of UNIX sockets ----------------------------------------- */

uint32_t ap_output_events(const ap_conn *conn)
{
    bool out = conn->type == AP_TCP || conn->watching_out;
    return EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET | (out ? EPOLLOUT : 0);
}

void ap_output_watch(ap_conn *conn, bool on)
{
    ap_slot *slot = &conn->slot;
    if (conn->type == AP_TCP || conn->watching_out == on)
        return;
    conn->watching_out = on;
    if (!slot->watched)
        return; /* it will be registered with this mask */
    int rc = ap_sys_epoll_ctl(slot->poller->epfd, EPOLL_CTL_MOD, slot->fd, ap_output_events(conn),
                              ap_slot_tag(slot));
    if (rc < 0)
        ap_output_break(conn, rc);
}

/* Nothing is stalled any more, unless someone waits for room. */
void ap_output_unwatch(ap_conn *conn)
{
    if (conn->out_bytes == 0)
        ap_output_watch(conn, conn->drain_armed && !(conn->slot.ready & AP_WRITABLE));
}

static void stalled(ap_conn *conn)
{
    conn->slot.ready &= (uint8_t)~AP_WRITABLE;
    ap_count(&conn->slot.poller->stalls, 1);
    ap_output_watch(conn, true);
}

/* ---- the queue -------------------------------------------------------- */

static bool reserve(ap_conn *conn, uint32_t more)
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
bool ap_output_queue(ap_conn *conn, const struct iovec *iov, size_t count, size_t skip)
{
    if (!reserve(conn, (uint32_t)count))
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
    ap_output_count(conn);
    return true;
}

static void advance(ap_conn *conn, size_t n)
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

/* ---- sending ---------------------------------------------------------- */

static void note_sent(ap_conn *conn, size_t n)
{
    ap_poller *poller = conn->slot.poller;
    ap_count(&conn->writes, 1);
    ap_count(&poller->writes, 1);
    ap_count(&conn->bytes_sent, n);
    ap_count(&poller->bytes_sent, n);
    ap_conn_note_activity(conn);
}

void ap_output_took(ap_conn *conn, size_t n, size_t offered)
{
    note_sent(conn, n);
    if (n < offered)
        stalled(conn);
}

void ap_output_again(ap_conn *conn)
{
    ap_count(&conn->slot.poller->again, 1);
    stalled(conn);
}

/* Makes one system call with at most PIECES_AT_ONCE pieces and AP_BOUND bytes. False:
 * the kernel takes no more now, or the connection has failed. */
static bool offer(ap_conn *conn, const struct iovec *iov, size_t count, size_t *sent)
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
        ap_output_took(conn, *sent, offered);
        return *sent == offered;
    }
    if (took == -EAGAIN) {
        ap_output_again(conn);
    } else {
        ap_output_break(conn, (int)took);
    }
    return false;
}

/* The driver's part: continues with the queue. True: work is left. */
bool ap_output_write(ap_conn *conn)
{
    size_t total = 0, sent;
    while (conn->out_bytes && !conn->held && (conn->slot.ready & AP_WRITABLE)) {
        if (total >= AP_BOUND)
            return true;
        bool all = offer(conn, conn->out + conn->out_first, conn->out_count, &sent);
        if (conn->out_bytes)
            advance(conn, sent);
        total += sent;
        if (!all)
            break;
    }
    if (conn->out_bytes == 0 && conn->out)
        forget_queue(conn);
    ap_output_count(conn);
    ap_output_unwatch(conn);
    tell(conn);
    return false;
}

/* The caller's part: queues what is not taken, and returns the bytes queued. */
int64_t ap_output_send(ap_conn *conn, const ap_piece *pieces, int count)
{
    /* The same layout, checked below: pieces need no copy. */
    const struct iovec *iov = (const struct iovec *)pieces;
    size_t left = (size_t)count, skip = 0, total = 0, sent;
    if (conn->write_error)
        return conn->write_error;
    while (left > 0 && conn->out_bytes == 0 && (conn->slot.ready & AP_WRITABLE)) {
        if (skip >= iov->iov_len) {
            skip -= iov->iov_len;
            iov++;
            left--;
            continue;
        }
        if (skip > 0 || total >= AP_BOUND)
            break; /* in the middle of a piece, or at the bound: the queue takes over */
        offer(conn, iov, left, &sent);
        total += sent;
        skip = sent;
        if (conn->write_error)
            return conn->write_error;
    }
    if (left > 0 && !ap_output_queue(conn, iov, left, skip)) {
        ap_output_fail(conn, -ENOMEM);
        return -ENOMEM;
    }
    if (conn->out_bytes == 0)
        return 0;
    conn->owed = true;
    if (conn->slot.ready & AP_WRITABLE)
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    return (int64_t)conn->out_bytes;
}

/* Who makes the system call for the output of a task that now waits for input?
 * With one connection, the task's own thread, because waking the driver costs more
 * than the call. When many connections are served at once, the driver, which is
 * awake then, and shares the work (measured: docs/internals/threads.md). It gets a
 * copy, so Python need not keep anything, nor be told. It counts as queued only if the
 * driver has not sent it at once, for two threads would contend for the counter with each
 * reply. At most one copy is under
 * way: with anything queued, the queue and its bound are the caller's. The caller
 * pushes the slot as the last step before it releases the mutex, which the driver
 * will want. */
bool ap_output_hand_over(ap_conn *conn, const char *data, size_t size)
{
    ap_hub *hub = conn->slot.hub;
    if (ap_borrower(conn->slot.poller)) /* there is no other thread to share the work with */
        return false;
    if (hub->batch < HAND_OVER_FROM || size > HAND_OVER_MOST || conn->out_bytes ||
        conn->write_error || !(conn->slot.ready & AP_WRITABLE) || !reserve(conn, 1))
        return false;
    conn->own = ap_pool_take(hub->context.pool, size);
    if (!conn->own)
        return false;
    uint8_t *copy = ap_block_at(conn->own, AP_BLOCK_HEADER);
    memcpy(copy, data, size);
    conn->out[0] = (struct iovec){.iov_base = copy, .iov_len = size};
    conn->out_count = conn->own_count = 1;
    conn->out_bytes = conn->own_bytes = size;
    return true;
}

_Static_assert(sizeof(ap_piece) == sizeof(struct iovec) &&
                   offsetof(ap_piece, data) == offsetof(struct iovec, iov_base) &&
                   offsetof(ap_piece, size) == offsetof(struct iovec, iov_len),
               "ap_piece is handed to sendmsg as it is");
