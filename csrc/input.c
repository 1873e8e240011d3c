/* A connection's receive side: when it is read, how much, and into what.
 *
 * When. With edge-triggered events AP_READABLE is remembered and cleared only by
 * EAGAIN, and on TCP also by a short read, as long as nothing but plain input was
 * ever reported (measured: recv stops at an urgent byte, and on UNIX sockets after
 * a message with descriptors, and no further edge comes). On UNIX sockets
 * descriptors are received too (fds.c).
 *
 * How much. Input that nobody waits for is read up to high water, and again once
 * it has fallen to low water. While a wait is armed and not over, reading goes on
 * up to what is awaited, whatever the level. Otherwise input paused at 256 KiB and
 * consumed down to 100 KiB would never satisfy a wait for 200,000 bytes.
 *
 * Into what. First into the rest of the last block, then into a scratch buffer,
 * from which it is copied to a block of a suitable size. So an idle connection
 * needs no block, and memory follows what has arrived, never what a length prefix
 * promised. A connection that has been receiving much, or waits for much, reads
 * into a block of its own instead, without the copy.
 *
 * Or into no block at all: what comes in large pieces and is wanted as it comes goes
 * straight into the memory of who asks for it (AP_STRAIGHT), if the loop drives. Then
 * nothing is read ahead: the driver only says that the socket is readable.
 */
#include "input.h"

#include "chain.h"
#include "clock.h"
#include "connection.h"
#include "context.h"
#include "fds.h"
#include "inbox.h"
#include "poller.h"
#include "pool.h"
#include "receive.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"
#include "tls_input.h"

#define STRAIGHT_FROM (64u * 1024) /* the size of blocks that have grown so far */

/* ---- the wait --------------------------------------------------------- */

static size_t searched_in_chain(const ap_conn *conn)
{
    return conn->searched > conn->consumed ? (size_t)(conn->searched - conn->consumed) : 0;
}

static bool delimiter_found(ap_conn *conn)
{
    size_t searched = searched_in_chain(conn);
    size_t length = ap_chain_find(&conn->input, conn->delimiter, conn->delimiter_size,
                                  conn->want_bytes, &searched);
    conn->searched = conn->consumed + searched;
    return length > 0;
}

/* Whoever waits for a socket to be readable also takes what is read ahead meanwhile: a query turns
 * that on again, and so does an event after which no short read can be trusted. */
static bool target_met(ap_conn *conn)
{
    switch (conn->want) {
    case AP_WANT_BYTES: return conn->input.size >= conn->want_bytes;
    case AP_WANT_DELIMITER: return delimiter_found(conn) || conn->input.size >= conn->want_bytes;
    case AP_WANT_READABLE: return (conn->slot.ready & AP_READABLE) || conn->input.size > 0;
    case AP_WANT_SESSION: return conn->tls && !ap_tls_is_awaited(conn->tls, conn->want_bytes);
    default: return false;
    }
}

bool ap_input_over(ap_conn *conn)
{
    if (conn->want == AP_WANT_NOTHING)
        return false;
    return conn->want_expired || conn->read_end != 0 || target_met(conn);
}

/* Whether there is memory that nobody needs: an empty block, either ours or, if it was read
 * to its end and has left the chain, only the loop's. */
bool ap_input_idle(const ap_conn *conn)
{
    return conn->input.size == 0 && (conn->input.tail || conn->lent);
}

/* Publishes what is awaited. If the socket was known to be readable it has been
 * read, so the target is not met now. */
void ap_input_arm(ap_conn *conn, enum ap_want want, size_t n, int64_t deadline)
{
    conn->want = (uint8_t)want;
    conn->want_bytes = n;
    conn->want_deadline = deadline;
    conn->want_expired = false;
    if (deadline)
        ap_conn_note_deadline(conn, deadline);
    if (ap_input_idle(conn)) {
        conn->trim_at = ap_now_coarse() + AP_TRIM_AFTER;
        ap_conn_note_deadline(conn, conn->trim_at);
    }
    if ((conn->slot.ready & AP_READABLE) && ap_input_wanted(conn))
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
}

/* ---- how much --------------------------------------------------------- */

/* How many unread bytes are allowed now. */
static size_t level_allowed(ap_conn *conn, bool waiting)
{
    if (conn->discarding)
        return SIZE_MAX;
    if (waiting && conn->want != AP_WANT_END && conn->want_bytes > conn->high)
        return conn->want_bytes + (conn->any_more ? conn->high : 0);
    return conn->high;
}

/* A wait that is armed and met does not lift the mark: the loop may be slow to come. */
static bool waiting(ap_conn *conn)
{
    return (conn->want == AP_WANT_BYTES || conn->want == AP_WANT_DELIMITER) && !target_met(conn);
}

/* Beyond bytes that carry descriptors, only what someone waits for is read: one
 * batch of them is enough. Messages are never read ahead. */
bool ap_input_wanted(ap_conn *conn)
{
    bool waits = waiting(conn);
    if (conn->type == AP_SEQPACKET || (conn->carried && !waits))
        return false;
    if (conn->tls && !conn->discarding && !ap_tls_is_open(conn->tls))
        return false;
    if (conn->straight && !(conn->slot.ready & AP_NO_SHORT_READ) && !conn->discarding)
        return false;
    return conn->read_end == 0 && (!conn->paused || waits || conn->discarding) &&
           conn->input.size < level_allowed(conn, waits);
}

/* ---- into what -------------------------------------------------------- */

typedef struct {
    struct iovec iov[2];
    size_t count;
    size_t tail_room; /* iov[0], if not 0 */
    ap_block *fresh;  /* the second part, or NULL: the scratch buffer */
    size_t offered;
} target;

static size_t least(size_t a, size_t b)
{
    return a < b ? a : b;
}

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* The size of a block to read into directly; 0: the scratch buffer will do. */
static size_t fresh_size(const ap_conn *conn, size_t tail_room, size_t max)
{
    size_t missing = conn->want == AP_WANT_BYTES && conn->want_bytes > conn->input.size
                         ? conn->want_bytes - conn->input.size
                         : 0;
    size_t arrived = most(AP_SCRATCH, most(conn->high, 2 * conn->input.size));
    if (missing > tail_room + AP_SCRATCH)
        return least(missing - tail_room, least(arrived, AP_BLOCK_MAX) - AP_BLOCK_HEADER);
    if (conn->grow >= AP_BLOCK_LARGE && tail_room < conn->recent && max > tail_room)
        return least(conn->grow - AP_BLOCK_HEADER, max - tail_room);
    return 0;
}

static void add(target *into, void *base, size_t size)
{
    into->iov[into->count++] = (struct iovec){.iov_base = base, .iov_len = size};
    into->offered += size;
}

static void choose_target(ap_context *context, ap_conn *conn, size_t max, target *into)
{
    *into = (target){0};
    ap_receive_rewind(conn);
    ap_block *tail = conn->discarding ? NULL : conn->input.tail;
    if (tail)
        into->tail_room = least(ap_block_room(tail), max);
    if (into->tail_room)
        add(into, ap_block_at(tail, tail->end), into->tail_room);
    size_t rest = max - into->tail_room;
    size_t fresh = conn->discarding || !rest ? 0 : fresh_size(conn, into->tail_room, max);
    if (fresh)
        into->fresh = ap_pool_take(context->pool, fresh);
    if (into->fresh)
        add(into, ap_block_at(into->fresh, into->fresh->end),
            least(ap_block_room(into->fresh), rest));
    else if (rest && into->tail_room < most(AP_BLOCK_MIN / 4, 4 * (size_t)conn->recent))
        add(into, context->scratch, least(AP_SCRATCH, rest));
}

/* Files got received bytes. False: there was no memory for them. */
static bool file_received(ap_context *context, ap_conn *conn, target *into, size_t got)
{
    if (conn->discarding)
        return true;
    size_t in_tail = least(got, into->tail_room), rest = got - in_tail;
    if (in_tail)
        conn->input.tail->end += (uint32_t)in_tail;
    conn->input.size += in_tail;
    if (!rest)
        return true;
    if (!into->fresh) {
        into->fresh = ap_pool_take(context->pool, most(rest, conn->grow - AP_BLOCK_HEADER));
        if (!into->fresh)
            return false;
        memcpy(ap_block_at(into->fresh, AP_BLOCK_HEADER), context->scratch, rest);
    }
    into->fresh->end += (uint32_t)rest;
    ap_receive_append(conn, into->fresh);
    into->fresh = NULL;
    conn->input.size += rest;
    return true;
}

/* ---- reading ---------------------------------------------------------- */

/* Reads and files. Returns the bytes, or -errno. */
static ssize_t receive_into(ap_context *context, ap_conn *conn, target *into)
{
    ap_rights rights;
    bool carries = conn->type == AP_UNIX;
    ssize_t got =
        carries ? ap_sys_recv_rights(conn->slot.fd, into->iov, into->count, &into->offered, &rights)
                : ap_sys_recv(conn->slot.fd, into->iov, into->count, &into->offered);
    if (got > 0 && !file_received(context, conn, into, (size_t)got))
        got = -ENOMEM;
    if (carries && rights.count > 0 && !ap_fds_carry(conn, &rights, got))
        got = -ENOMEM;
    return got;
}

/* One system call. */
static size_t receive(ap_context *context, ap_conn *conn, size_t max)
{
    if (conn->tls && !conn->discarding)
        return ap_tls_receive(context, conn, max);
    target into;
    choose_target(context, conn, max, &into);
    ssize_t got = receive_into(context, conn, &into);
    if (into.fresh)
        ap_block_unref(into.fresh);
    return ap_receive_conclude(conn, got, into.offered);
}

bool ap_input_may_go_straight(const ap_conn *conn)
{
    const ap_slot *slot = &conn->slot;
    return conn->grow >= STRAIGHT_FROM && conn->type == AP_TCP && !conn->tls &&
           !(slot->ready & AP_NO_SHORT_READ) && ap_borrower(slot->poller) == slot->hub;
}

size_t ap_input_receive(ap_conn *conn, void *memory, size_t size)
{
    size_t n = ap_receive(conn, memory, size);
    conn->consumed += n;
    return n;
}

bool ap_input_read(ap_context *context, ap_conn *conn)
{
    size_t total = 0;
    while ((conn->slot.ready & AP_READABLE) && ap_input_wanted(conn) && total < AP_BOUND) {
        size_t room = level_allowed(conn, waiting(conn)) - conn->input.size;
        size_t got = receive(context, conn, least(room, AP_BOUND - total));
        if (got == 0)
            break;
        total += got;
    }
    if (conn->input.size >= conn->high && !conn->discarding)
        conn->paused = true;
    return (conn->slot.ready & AP_READABLE) && ap_input_wanted(conn);
}

/* Behind paused input only events show the peer's end: an error with a hang-up is an
 * RST, an error alone is something in the error queue. */
void ap_input_probe(ap_conn *conn)
{
    ap_slot *slot = &conn->slot;
    if (conn->straight && (slot->ready & AP_READABLE))
        ap_conn_note_activity(conn); /* something has come, whoever is to read it */
    if (!(slot->ready & AP_ERR) || (conn->read_end != 0 && conn->read_end != AP_EEOF))
        return;
    if (slot->ready & AP_HUP) {
        conn->was_reset = true;
    } else {
        slot->ready &= (uint8_t)~AP_ERR;
        ap_sys_drain_error_queue(slot->fd);
    }
}

/* ---- consuming -------------------------------------------------------- */

static void note_consumed(ap_conn *conn, size_t n)
{
    conn->consumed += n;
    if (conn->shown != conn->input.head)
        conn->shown = NULL;
    if (conn->carried && conn->consumed >= conn->carried_to)
        ap_fds_doom(conn);
    if (conn->paused && conn->input.size <= conn->low) {
        conn->paused = false;
        if (conn->slot.ready & AP_READABLE)
            ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    }
}

void ap_input_consume(ap_conn *conn, size_t n)
{
    ap_chain_consume(&conn->input, n, &conn->pins);
    note_consumed(conn, n);
}

/* The block that is shown is the head; if it is the tail too, nothing else is unread. A full one
 * is kept as well, which consuming would remove. */
bool ap_input_restart(ap_conn *conn, uint32_t pos)
{
    ap_block *block = conn->shown;
    if (!block || block != conn->input.tail || pos != block->end)
        return false;
    /* The chain's reference and the loop's. acquire; pairs with the release of the last view. */
    if (atomic_load_explicit(&block->refs, memory_order_acquire) > 2)
        return false;
    size_t n = ap_chain_restart(&conn->input);
    note_consumed(conn, n);
    return true;
}

void ap_input_drop(ap_conn *conn)
{
    ap_chain_drop(&conn->input, &conn->pins);
    ap_fds_doom(conn);
    conn->shown = NULL;
    conn->want = AP_WANT_NOTHING;
}
