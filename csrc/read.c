/* The loop's read calls: bytes, a request, a delimiter.
 *
 * Each call looks at what is buffered, reads a socket known to be readable, looks
 * again, and only then arms a wait. It is repeated after the wake-up, from the
 * start: a wake-up is a hint.
 */
#include "read.h"

#include "chain.h"
#include "clock.h"
#include "connection.h"
#include "context.h"
#include "fds.h"
#include "hub.h"
#include "inbox.h"
#include "input.h"
#include "output.h"
#include "poller.h"
#include "pool.h"
#include "receive.h"
#include "slot.h"
#include "sysio.h"
#include "window.h"

#include <stdlib.h>

/* ---- reading ---------------------------------------------------------- */

static int64_t leave(ap_conn *conn, int64_t result)
{
    if (result == AP_CLOSED_MEANWHILE)
        return -EBADF;
    ap_conn_unlock(conn);
    return result;
}

/* Only waiting is left: sends the output that came along, and arms. */
int64_t ap_read_wait(ap_conn *conn, enum ap_want want, size_t n, int flags, int64_t deadline,
                     const char *output, size_t output_size)
{
    if (flags & AP_NOWAIT)
        return -EAGAIN;
    if (deadline && ap_now() >= deadline) {
        ap_count(&conn->slot.poller->timeouts, 1);
        return AP_ELATE;
    }
    int64_t queued = 0;
    if (ap_conn_is_shut(conn))
        output_size = 0;
    bool handed_over = output_size && ap_output_hand_over(conn, output, output_size);
    if (output_size && !handed_over) {
        ap_piece piece = {.data = output, .size = output_size};
        queued = ap_output_send(conn, &piece, 1);
        if (queued == -ENOMEM)
            return queued; /* the request is lost, so the answer would never come */
    }
    ap_input_arm(conn, want, n, deadline);
    if (handed_over)
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    return queued > 0 ? AP_EQUEUED : -EAGAIN;
}

/* Reads at once what is known to be there: the driver may have paused at the water
 * mark, or be busy elsewhere. Whoever does not wait does not give a loop that drives the
 * chance to ask for events, so the socket itself is asked. */
static void read_now(ap_conn *conn, int flags)
{
    if ((flags & AP_NOWAIT) && ap_borrower(conn->slot.poller))
        conn->slot.ready |= AP_READABLE;
    if (!(conn->slot.ready & AP_READABLE) || conn->read_end)
        return;
    conn->paused = false;
    if (ap_input_read(&conn->slot.hub->context, conn))
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    ap_conn_learn(conn);
}

/* An awaited message should lie in one block. If little of it is here and the rest
 * of the block is too small, it is moved to a block with enough room while that is
 * still cheap. Views of the old place stay as they are. */
static void make_room(ap_conn *conn, size_t n)
{
    ap_chain *chain = &conn->input;
    ap_receive_rewind(conn);
    ap_block *block = chain->head;
    if (!block || block != chain->tail || chain->size > AP_BLOCK_MIN / 4)
        return;
    size_t expected = n > conn->recent ? n : conn->recent;
    if (ap_block_room(block) + chain->size >= expected || expected > AP_SCRATCH)
        return;
    size_t room = conn->grow - AP_BLOCK_HEADER;
    ap_block *bigger =
        ap_pool_take(conn->slot.hub->context.pool, expected > room ? expected : room);
    if (!bigger)
        return; /* it will have to be merged */
    ap_chain_copy(chain, 0, ap_block_at(bigger, bigger->start), chain->size);
    bigger->end += (uint32_t)chain->size;
    size_t size = chain->size;
    ap_chain_drop(chain, &conn->pins);
    ap_chain_append(chain, bigger);
    chain->size = size;
    conn->shown = NULL;
}

/* The caller will receive by itself what has come, and what it was shown goes. Nothing is unread.
 */
static int64_t read_straight(ap_conn *conn, int flags, int64_t deadline, const char *output,
                             size_t output_size)
{
    if (conn->read_end)
        return conn->read_end;
    if (!(conn->slot.ready & AP_READABLE))
        return ap_read_wait(conn, AP_WANT_READABLE, 1, flags, deadline, output, output_size);
    ap_chain_drop(&conn->input, &conn->pins); /* an empty block */
    conn->shown = NULL;
    return 0;
}

static int64_t read_locked(ap_conn *conn, size_t n, int flags, int64_t deadline, const char *output,
                           size_t output_size)
{
    conn->straight = (flags & AP_STRAIGHT) && n > 0 && ap_input_may_go_straight(conn);
    if (conn->straight && conn->input.size == 0)
        return read_straight(conn, flags, deadline, output, output_size);
    conn->want = AP_WANT_BYTES; /* what is read now is read for this */
    conn->want_bytes = n;
    if (conn->input.size < n) {
        make_room(conn, n);
        read_now(conn, flags);
    }
    conn->want = AP_WANT_NOTHING;
    if (conn->input.size >= n) {
        if (n == 0 || (flags & AP_SCATTER))
            return 0;
        int rc = ap_window_join(conn, n);
        if (rc < 0)
            return rc;
        uint32_t end = ap_window_end(conn, n);
        ap_fds_shown(conn, end);
        return ap_window_new_block(conn) | end;
    }
    if (conn->read_end)
        return conn->read_end;
    return ap_read_wait(conn, AP_WANT_BYTES, n, flags, deadline, output, output_size);
}

int64_t ap_conn_read(ap_conn *conn, uint32_t pos, size_t n, int flags, int64_t deadline,
                     const char *output, size_t output_size)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    int64_t result = read_locked(conn, n, flags, deadline, output, output_size);
    return leave(conn, result);
}

static int64_t receive_locked(ap_conn *conn, char *memory, size_t size)
{
    size_t have = conn->input.size, n = have < size ? have : size;
    if (have) {
        ap_chain_copy(&conn->input, 0, (uint8_t *)memory, n);
        ap_input_consume(conn, n);
        return (int64_t)n;
    }
    if (conn->read_end)
        return conn->read_end;
    n = ap_input_receive(conn, memory, size);
    ap_conn_learn(conn);
    if (n)
        return (int64_t)n;
    return conn->read_end ? conn->read_end : -EAGAIN;
}

int64_t ap_conn_read_straight(ap_conn *conn, uint32_t pos, char *memory, size_t size)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    int64_t result = receive_locked(conn, memory, size);
    return leave(conn, result);
}

int ap_conn_put_back(ap_conn *conn, const char *memory, size_t n)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_block *block = ap_pool_take(conn->slot.hub->context.pool, n);
    if (block) {
        memcpy(ap_block_at(block, block->start), memory, n);
        block->end += (uint32_t)n;
        ap_window_put_front(conn, block);
        conn->consumed -= n;
    } else {
        rc = conn->read_end = -ENOMEM;
    }
    ap_slot_unlock(&conn->slot);
    return rc;
}

int64_t ap_conn_want(ap_conn *conn, uint32_t pos, size_t n)
{
    return ap_conn_read(conn, pos, n, 0, 0, NULL, 0);
}

/* ---- requests --------------------------------------------------------- */

/* An idle connection keeps no block. One that is readable will need its block again at once.
 */
static void give_block_back(ap_conn *conn)
{
    if (!ap_input_idle(conn) || (conn->slot.ready & AP_READABLE))
        return;
    ap_chain_drop(&conn->input, &conn->pins);
    conn->shown = NULL;
    conn->lent = false;
    ap_inbox_push(&conn->slot, AP_BOX_SWEEP, ap_now_coarse() + 2 * AP_TRIM_AFTER);
}

static int64_t request_locked(ap_conn *conn, bool fresh, const char *output, size_t output_size)
{
    bool untouched = !fresh && conn->consumed == conn->request_at;
    size_t seen = untouched ? (size_t)(conn->request_seen - conn->consumed) : 0;
    conn->any_more = untouched; /* otherwise each byte above high water would be a call */
    give_block_back(conn);
    /* What the loop has read itself is its own, and it may never take a block again. */
    ap_pool_reclaim(conn->slot.hub->context.pool);
    int64_t result =
        read_locked(conn, seen + 1, untouched ? AP_SCATTER : 0, 0, output, output_size);
    if (result >= 0) {
        conn->any_more = false;
        conn->request_at = conn->consumed;
        conn->request_seen = conn->consumed + conn->input.size;
    }
    return result;
}

/* No waiting message will be received: the end, or the error that another call was told. */
static int64_t message_end(ap_conn *conn, int waiting)
{
    if (!conn->read_end && waiting == 0) {
        ap_receive_nothing(conn); /* an RST's error may still be the socket's */
        if (!conn->read_end)
            conn->read_end = ap_receive_end(conn);
        ap_conn_learn(conn);
    }
    return conn->read_end ? conn->read_end : AP_EEOF;
}

/* Messages stay in the kernel, which says how much is unread. Events would not do: one may be for
 * the output, and one that a call did not answer by receiving was the last. Empty messages do not
 * count in that number: one by itself shows as readable. */
static int64_t request_message(ap_conn *conn, bool fresh, const char *output, size_t output_size)
{
    uint64_t received = ap_counted(&conn->reads);
    bool untouched = !fresh && received == conn->request_at;
    uint64_t seen = untouched ? conn->request_seen : 0;
    int waiting = ap_sys_unread(conn->slot.fd);
    if (waiting < 0)
        return waiting;
    bool empty = waiting == 0 && !untouched && ap_sys_message_waits(conn->slot.fd);
    if (empty && (waiting = ap_sys_unread(conn->slot.fd)) < 0) /* it may have bytes after all */
        return waiting;
    if ((uint64_t)waiting > seen || empty) {
        conn->slot.ready |= AP_READABLE;
        conn->request_at = received;
        conn->request_seen = (uint64_t)waiting;
        return 0;
    }
    conn->slot.ready &= (uint8_t)~AP_READABLE; /* the next one sets it */
    if (conn->read_end || (conn->slot.ready & AP_RDHUP))
        return message_end(conn, waiting);
    return ap_read_wait(conn, AP_WANT_READABLE, 0, 0, 0, output, output_size);
}

int64_t ap_conn_request(ap_conn *conn, uint32_t pos, int fresh, const char *output,
                        size_t output_size)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    int64_t result = conn->type == AP_SEQPACKET
                         ? request_message(conn, fresh != 0, output, output_size)
                         : request_locked(conn, fresh != 0, output, output_size);
    if (result != AP_CLOSED_MEANWHILE && conn->want != AP_WANT_NOTHING) {
        conn->shown = NULL; /* an idle connection has no window either */
        conn->lent = false;
    }
    return leave(conn, result);
}

/* ---- searching -------------------------------------------------------- */

static int keep_delimiter(ap_conn *conn, const char *delimiter, size_t size)
{
    if (conn->delimiter_size == size && memcmp(conn->delimiter, delimiter, size) == 0)
        return 0; /* the search resumes where it stopped */
    uint8_t *memory = conn->delimiter_inline;
    if (size > AP_DELIMITER_INLINE && !(memory = ap_sys_alloc(size)))
        return -ENOMEM;
    if (conn->delimiter != conn->delimiter_inline)
        free(conn->delimiter);
    conn->delimiter = memory;
    conn->delimiter_size = size;
    memcpy(memory, delimiter, size);
    conn->searched = conn->consumed;
    return 0;
}

static size_t find_length(ap_conn *conn, size_t max_bytes)
{
    size_t searched =
        conn->searched > conn->consumed ? (size_t)(conn->searched - conn->consumed) : 0;
    size_t length =
        ap_chain_find(&conn->input, conn->delimiter, conn->delimiter_size, max_bytes, &searched);
    conn->searched = conn->consumed + searched;
    return length;
}

static int64_t find_locked(ap_conn *conn, size_t max_bytes, int flags, int64_t deadline,
                           const char *output, size_t output_size)
{
    conn->straight = false;
    size_t length = find_length(conn, max_bytes);
    if (!length && conn->input.size < max_bytes) {
        conn->want = AP_WANT_DELIMITER;
        conn->want_bytes = max_bytes;
        read_now(conn, flags);
        conn->want = AP_WANT_NOTHING;
        length = find_length(conn, max_bytes);
    }
    if (length) {
        int rc = ap_window_join(conn, length);
        if (rc < 0)
            return rc;
        ap_fds_shown(conn, ap_window_end(conn, length));
        return ap_window_new_block(conn) | (int64_t)length;
    }
    if (conn->input.size >= max_bytes)
        return AP_EDELIM;
    if (conn->read_end)
        return conn->read_end;
    return ap_read_wait(conn, AP_WANT_DELIMITER, max_bytes, flags, deadline, output, output_size);
}

int64_t ap_conn_find(ap_conn *conn, uint32_t pos, const char *delimiter, size_t size,
                     size_t max_bytes, int flags, int64_t deadline, const char *output,
                     size_t output_size)
{
    if (size == 0)
        return -EINVAL;
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    int64_t result = keep_delimiter(conn, delimiter, size);
    if (result == 0)
        result = find_locked(conn, max_bytes, flags, deadline, output, output_size);
    return leave(conn, result);
}

int ap_conn_disarm_read(ap_conn *conn)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->want = AP_WANT_NOTHING;
    ap_slot_unlock(&conn->slot);
    return 0;
}
