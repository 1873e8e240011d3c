/* What the loop asks of a connection's input: bytes, a delimiter, a window.
 *
 * The loop is shown a window of the first block (ap_conn_block) and walks in it
 * without calling C; how far it has come it reports with its next call (pos).
 * So what C holds for unread may be consumed already, which is safe: a block
 * leaves the chain only when the loop has said that it is done with it.
 *
 * Each request looks at what is buffered, reads a socket that is known to be
 * readable, looks again, and only then arms a wait. It is made again after the
 * wake-up, from the start: a wake-up is a hint.
 */
#include "internal.h"

#include <stdlib.h>

#define CLOSED_MEANWHILE (-6000) /* and the mutex is not held; never leaves this file */

/* ---- the window ------------------------------------------------------- */

/* The loop reports how far it has come in the block that was shown. */
void ap_read_to(ap_conn *conn, uint32_t pos)
{
    ap_block *block = conn->shown;
    if (block && pos > block->start && pos <= block->end)
        ap_input_consume(conn, pos - block->start);
    else
        ap_input_consume(conn, 0); /* a head that is empty leaves, if another follows */
}

static uint32_t window_end(const ap_conn *conn, size_t n)
{
    const ap_block *block = conn->input.head;
    size_t have = block->end - block->start, shown = n > conn->window ? n : conn->window;
    return block->start + (uint32_t)(have < shown ? have : shown);
}

uint32_t ap_read_shown(const ap_conn *conn, size_t n)
{
    const ap_block *block = conn->shown;
    if (conn->carried)
        return 0; /* the loop has to ask: it may have to report how far it comes */
    uint32_t end = block && block->end - block->start >= n ? window_end(conn, n) : 0;
    return end <= INT32_MAX ? end : 0; /* it travels in a token */
}

static int64_t new_block_bit(const ap_conn *conn)
{
    return conn->input.head != conn->shown ? (int64_t)1 << AP_NEW_BLOCK_SHIFT : 0;
}

/* Puts block, which holds a copy of the first n unread bytes, in their place. */
static void replace_front(ap_conn *conn, ap_block *block, size_t n)
{
    ap_chain *chain = &conn->input;
    ap_chain_consume(chain, n, conn);
    block->end += (uint32_t)n;
    block->next = chain->head;
    chain->head = block;
    if (!chain->tail)
        chain->tail = block;
    chain->size += n;
    conn->shown = NULL;
}

/* Makes the first n unread bytes lie in one block. Copies in portions, and
 * without the mutex between them: the driver only appends meanwhile, and only
 * the loop, which is here, consumes. */
static int make_contiguous(ap_conn *conn, size_t n)
{
    ap_block *head = conn->input.head;
    if ((size_t)(head->end - head->start) >= n)
        return 0;
    ap_context *context = &conn->slot.hub->context;
    ap_slot_unlock(&conn->slot);
    ap_block *block = ap_pool_take(context->pool, n);
    int rc = ap_slot_enter(&conn->slot);
    size_t done = 0;
    while (rc == 0 && block && done < n) {
        size_t portion = n - done < AP_BOUND ? n - done : AP_BOUND;
        ap_chain_copy(&conn->input, done, ap_block_at(block, block->start) + done, portion);
        done += portion;
        if (done < n) {
            ap_slot_unlock(&conn->slot);
            rc = ap_slot_enter(&conn->slot);
        }
    }
    if (rc == 0 && block)
        replace_front(conn, block, n);
    else if (block)
        ap_block_unref(block);
    if (rc < 0)
        return CLOSED_MEANWHILE;
    return block ? 0 : -ENOMEM;
}

int ap_conn_block(ap_conn *conn, uint32_t pos, ap_view *view)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_read_to(conn, pos);
    ap_block *block = conn->input.head;
    if (conn->input.size == 0) {
        rc = -ENODATA;
    } else {
        *view = (ap_view){.block = block,
                          .size = block->size,
                          .start = block->start,
                          .end = window_end(conn, 0)};
        if (block != conn->shown) {
            ap_block_ref(block);
            conn->shown = block;
            conn->lent = true;
            rc = 1;
        }
        ap_fds_shown(conn, view->end);
    }
    ap_conn_unlock(conn);
    return rc;
}

int ap_conn_set_window(ap_conn *conn, uint32_t size)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    conn->window = size;
    ap_slot_unlock(&conn->slot);
    return 0;
}

int ap_conn_set_block(ap_conn *conn, uint32_t size)
{
    if (size < AP_BLOCK_MIN || size > AP_BLOCK_MAX)
        return -EINVAL;
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    uint32_t most = conn->high > AP_BLOCK_MIN ? conn->high : AP_BLOCK_MIN;
    conn->base = conn->grow = size < most ? size : most;
    ap_slot_unlock(&conn->slot);
    return 0;
}

int ap_conn_consume(ap_conn *conn, uint32_t pos, size_t n)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_read_to(conn, pos);
    if (n > conn->input.size)
        rc = -EINVAL;
    else
        ap_input_consume(conn, n);
    conn->shown = NULL;
    conn->lent = false;
    ap_conn_unlock(conn);
    return rc;
}

size_t ap_read_left(const ap_conn *conn, uint32_t pos)
{
    const ap_block *block = conn->shown;
    bool behind = block && pos > block->start && pos <= block->end;
    return conn->input.size - (behind ? pos - block->start : 0);
}

int64_t ap_conn_buffered(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t n = (int64_t)ap_read_left(conn, pos);
    ap_slot_unlock(&conn->slot);
    return n;
}

int64_t ap_conn_arrived(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int in_kernel = ap_sys_unread(conn->slot.fd);
    int64_t n = (int64_t)ap_read_left(conn, pos) + (in_kernel > 0 ? in_kernel : 0);
    ap_slot_unlock(&conn->slot);
    return n;
}

/* ---- reading ---------------------------------------------------------- */

static int64_t leave(ap_conn *conn, int64_t result)
{
    if (result == CLOSED_MEANWHILE)
        return -EBADF;
    ap_conn_unlock(conn);
    return result;
}

/* Nothing will do but waiting: sends the output that came along, and arms. */
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
    bool handed_over = output_size && !conn->shut && ap_output_hand_over(conn, output, output_size);
    if (output_size && !conn->shut && !handed_over) {
        ap_piece piece = {.data = output, .size = output_size};
        queued = ap_output_send(conn, &piece, 1);
        if (queued == -ENOMEM)
            return queued; /* the request is lost, and so the answer would never come */
    }
    ap_input_arm(conn, want, n, deadline);
    if (handed_over)
        ap_poller_push(&conn->slot, AP_BOX_WORK, 0);
    return queued > 0 ? AP_EQUEUED : -EAGAIN;
}

/* Reads at once what is known to be there: the driver may be paused for the
 * water mark, or busy elsewhere. */
static void read_now(ap_conn *conn)
{
    if (!(conn->slot.ready & AP_READABLE) || conn->read_end)
        return;
    conn->paused = false;
    if (ap_input_read(&conn->slot.hub->context, conn))
        ap_poller_push(&conn->slot, AP_BOX_WORK, 0);
    ap_conn_learn(conn);
}

/* An awaited message should lie in one block. When little of it is here and the
 * block's rest is too small, it is moved to a block that has the room, while it
 * is still cheap. Views of the old place stay as they are. */
static void make_room(ap_conn *conn, size_t n)
{
    ap_chain *chain = &conn->input;
    ap_input_rewind(conn);
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
    ap_chain_drop(chain, conn);
    ap_chain_append(chain, bigger);
    chain->size = size;
    conn->shown = NULL;
}

static int64_t read_locked(ap_conn *conn, size_t n, int flags, int64_t deadline, const char *output,
                           size_t output_size)
{
    conn->want = AP_WANT_BYTES; /* what is read now is read for this */
    conn->want_bytes = n;
    if (conn->input.size < n) {
        make_room(conn, n);
        read_now(conn);
    }
    conn->want = AP_WANT_NOTHING;
    if (conn->input.size >= n) {
        if (n == 0 || (flags & AP_SCATTER))
            return 0;
        int rc = make_contiguous(conn, n);
        if (rc < 0)
            return rc;
        uint32_t end = window_end(conn, n);
        ap_fds_shown(conn, end);
        return new_block_bit(conn) | end;
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
    ap_read_to(conn, pos);
    int64_t result = read_locked(conn, n, flags, deadline, output, output_size);
    return leave(conn, result);
}

int64_t ap_conn_want(ap_conn *conn, uint32_t pos, size_t n)
{
    return ap_conn_read(conn, pos, n, 0, 0, NULL, 0);
}

/* ---- requests --------------------------------------------------------- */

/* What is idle keeps no block. Those of a connection that is readable will be used again at once.
 */
static void give_block_back(ap_conn *conn)
{
    if (!ap_input_idle(conn) || (conn->slot.ready & AP_READABLE))
        return;
    ap_chain_drop(&conn->input, conn);
    conn->shown = NULL;
    conn->lent = false;
    ap_poller_push(&conn->slot, AP_BOX_SWEEP, ap_now_coarse() + 2 * AP_TRIM_AFTER);
}

static int64_t request_locked(ap_conn *conn, bool fresh, const char *output, size_t output_size)
{
    bool untouched = !fresh && conn->consumed == conn->request_at;
    size_t seen = untouched ? (size_t)(conn->request_seen - conn->consumed) : 0;
    conn->any_more = untouched; /* else each byte above high water would be a call */
    give_block_back(conn);
    int64_t result =
        read_locked(conn, seen + 1, untouched ? AP_SCATTER : 0, 0, output, output_size);
    if (result >= 0) {
        conn->any_more = false;
        conn->request_at = conn->consumed;
        conn->request_seen = conn->consumed + conn->input.size;
    }
    return result;
}

/* None of those that wait will be received: the end, or the error that somebody else was told. */
static int64_t message_end(ap_conn *conn, int waiting)
{
    if (!conn->read_end && waiting == 0) {
        ap_input_nothing(conn); /* the error of a RST may still be the socket's */
        if (!conn->read_end)
            conn->read_end = ap_input_end(conn);
        ap_conn_learn(conn);
    }
    return conn->read_end ? conn->read_end : AP_EEOF;
}

/* Messages stay in the kernel, and what is unread is what that says. The events would not do: one
 * may be for the output, and one that a call has not answered by receiving was the last. Messages
 * of no bytes are not in that number: one by itself shows as readable. */
static int64_t request_message(ap_conn *conn, bool fresh, const char *output, size_t output_size)
{
    uint64_t received = ap_counted(&conn->reads);
    bool untouched = !fresh && received == conn->request_at;
    uint64_t seen = untouched ? conn->request_seen : 0;
    int waiting = ap_sys_unread(conn->slot.fd);
    if (waiting < 0)
        return waiting;
    bool empty = waiting == 0 && !untouched && ap_sys_message_waits(conn->slot.fd);
    if ((uint64_t)waiting > seen || empty) {
        conn->slot.ready |= AP_READABLE;
        conn->request_at = received;
        conn->request_seen = (uint64_t)waiting;
        return 0;
    }
    conn->slot.ready &= (uint8_t)~AP_READABLE; /* the next one sets it */
    if (conn->read_end || (conn->slot.ready & AP_RDHUP))
        return message_end(conn, waiting);
    return ap_read_wait(conn, AP_WANT_MESSAGE, 0, 0, 0, output, output_size);
}

int64_t ap_conn_request(ap_conn *conn, uint32_t pos, int fresh, const char *output,
                        size_t output_size)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_read_to(conn, pos);
    int64_t result = conn->type == AP_SEQPACKET
                         ? request_message(conn, fresh != 0, output, output_size)
                         : request_locked(conn, fresh != 0, output, output_size);
    if (result != CLOSED_MEANWHILE && conn->want != AP_WANT_NOTHING) {
        conn->shown = NULL; /* what is idle has no window either */
        conn->lent = false;
    }
    return leave(conn, result);
}

/* ---- searching -------------------------------------------------------- */

static int keep_delimiter(ap_conn *conn, const char *delimiter, size_t size)
{
    if (conn->delimiter_size == size && memcmp(conn->delimiter, delimiter, size) == 0)
        return 0; /* the search goes on where it stopped */
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
    size_t length = find_length(conn, max_bytes);
    if (!length && conn->input.size < max_bytes) {
        conn->want = AP_WANT_DELIMITER;
        conn->want_bytes = max_bytes;
        read_now(conn);
        conn->want = AP_WANT_NOTHING;
        length = find_length(conn, max_bytes);
    }
    if (length) {
        int rc = make_contiguous(conn, length);
        if (rc < 0)
            return rc;
        ap_fds_shown(conn, window_end(conn, length));
        return new_block_bit(conn) | (int64_t)length;
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
    ap_read_to(conn, pos);
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
