/* A connection's send path: who sends, and what.
 *
 * The caller's own thread tries first. Only what the kernel did not take is queued (queue.c), and
 * finished by the driver, except for a little output of a busy loop, of which the driver gets a
 * copy (ap_output_hand_over).
 */
#include "output.h"

#include "bytes.h"
#include "connection.h"
#include "hub.h"
#include "inbox.h"
#include "poller.h"
#include "pool.h"
#include "queue.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"
#include "tls_output.h"

#define HAND_OVER_FROM 4 /* connections that were ready together */
#define HAND_OVER_MOST (16u * 1024)

/* True: work is left. */
static bool write_plain(ap_conn *conn)
{
    size_t total = 0, sent;
    while (conn->out_bytes && !conn->held && (conn->slot.ready & AP_WRITABLE)) {
        if (total >= AP_BOUND)
            return true;
        bool all = ap_queue_offer(conn, conn->out + conn->out_first, conn->out_count, &sent);
        if (conn->out_bytes)
            ap_queue_advance(conn, sent);
        total += sent;
        if (!all)
            break;
    }
    return false;
}

/* Earlier records first. */
static bool write_sealed(ap_conn *conn)
{
    size_t total = 0, n;
    bool given_up;
    while (conn->out_bytes && !conn->tls->held && (conn->slot.ready & AP_WRITABLE)) {
        if (total >= AP_BOUND)
            return true;
        if (conn->own_bytes > 0 && !ap_tls_push(conn))
            break;
        n = conn->out_count && !conn->held
                ? ap_tls_seal(conn, conn->out + conn->out_first, conn->out_count, 0)
                : 0;
        if (n == 0)
            break;
        given_up = conn->own_bytes == 0 && n <= conn->given_up;
        ap_queue_advance(conn, n);
        ap_tls_push(conn);
        if (given_up)
            conn->tls->given_up = conn->tls->counted;
        total += n;
    }
    return false;
}

/* The driver's part: continues with the queue. True: work is left. */
bool ap_output_write(ap_conn *conn)
{
    if (conn->tls ? write_sealed(conn) : write_plain(conn))
        return true;
    if (conn->out_bytes == 0 && conn->out)
        ap_queue_forget(conn);
    ap_queue_count(conn);
    ap_queue_unwatch(conn);
    ap_queue_tell(conn);
    return false;
}

/* What is left of the pieces to be sent. */
typedef struct {
    const struct iovec *iov;
    size_t count, skip;
} rest;

static void leave_out(rest *r, size_t n)
{
    r->skip += n;
    while (r->count > 0 && r->skip >= r->iov->iov_len) {
        r->skip -= r->iov->iov_len;
        r->iov++;
        r->count--;
    }
}

static bool may_send_more(const ap_conn *conn, const rest *r, size_t total)
{
    return r->count > 0 && conn->out_bytes == 0 && !conn->write_error &&
           (conn->slot.ready & AP_WRITABLE) && total < AP_BOUND;
}

static void send_plain(ap_conn *conn, rest *r)
{
    size_t total = 0, sent;
    while (may_send_more(conn, r, total) && r->skip == 0) { /* in a piece the queue takes over */
        ap_queue_offer(conn, r->iov, r->count, &sent);
        total += sent;
        leave_out(r, sent);
    }
}

static void send_sealed(ap_conn *conn, rest *r)
{
    size_t total = 0, n;
    while (may_send_more(conn, r, total) &&
           (n = ap_tls_seal(conn, r->iov, r->count, r->skip)) > 0) {
        leave_out(r, n);
        total += n;
        ap_tls_push(conn);
    }
}

/* The caller's part: queues what is not taken, and returns the bytes queued. */
int64_t ap_output_send(ap_conn *conn, const ap_piece *pieces, int count)
{
    /* The same layout, checked below: pieces need no copy. */
    rest r = {.iov = (const struct iovec *)pieces, .count = (size_t)count};
    leave_out(&r, 0);
    if (!conn->write_error)
        (conn->tls ? send_sealed : send_plain)(conn, &r);
    if (conn->write_error)
        return conn->write_error;
    if (r.count > 0 && !ap_queue_append(conn, r.iov, r.count, r.skip)) {
        ap_queue_fail(conn, -ENOMEM);
        return -ENOMEM;
    }
    if (conn->out_bytes == 0)
        return 0;
    conn->owed = true;
    if (conn->slot.ready & AP_WRITABLE)
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    else
        ap_queue_watch(conn, true); /* nobody does, if a wait for room was given up */
    return conn->write_error ? conn->write_error : (int64_t)conn->out_bytes;
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
        conn->write_error || !(conn->slot.ready & AP_WRITABLE) || !ap_queue_reserve(conn, 1))
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
