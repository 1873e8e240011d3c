/* The loop's UNIX socket calls: descriptor passing (SCM_RIGHTS), and message sockets.
 *
 * fds.c handles descriptors that nobody asks for.
 *
 * Messages (SOCK_SEQPACKET) are never read ahead, because a message must not be torn:
 * the driver only reports that the socket is readable, and the call makes one recvmsg
 * into a block of its own. Sending is one sendmsg, and nothing is ever queued.
 */
#include "anypoll.h"

#include "chain.h"
#include "connection.h"
#include "context.h"
#include "fds.h"
#include "hub.h"
#include "input.h"
#include "output.h"
#include "owned.h"
#include "pool.h"
#include "queue.h"
#include "read.h"
#include "receive.h"
#include "slot.h"
#include "sysio.h"
#include "window.h"

/* ---- received descriptors --------------------------------------------- */

int ap_conn_report(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    rc = conn->carried != NULL;
    ap_conn_unlock(conn);
    return rc;
}

/* Gives away at most room of n descriptors; returns how many. */
static int give(const int *from, int n, int *fds, int room)
{
    int given = n < room ? n : room;
    for (int i = 0; i < given; i++) {
        fds[i] = from[i];
        ap_fd_disown(from[i]);
    }
    return given;
}

static int give_carried(ap_conn *conn, int *fds, int room)
{
    ap_fds *carried = conn->carried;
    int given = give(carried->numbers, carried->count, fds, room);
    carried->count -= given;
    memmove(carried->numbers, carried->numbers + given, (size_t)carried->count * sizeof(int));
    ap_fds_doom(conn); /* those there was no room for */
    return given;
}

int64_t ap_conn_take_fds(ap_conn *conn, uint32_t pos, char *buffer, size_t size, int *fds,
                         int *count)
{
    int rc = ap_slot_enter(&conn->slot), given = 0;
    if (rc < 0)
        return rc;
    if (conn->tls) {
        ap_slot_unlock(&conn->slot);
        return -EBUSY;
    }
    ap_window_to(conn, pos);
    size_t n = size < AP_BOUND ? size : AP_BOUND;
    if (n > conn->input.size)
        n = conn->input.size;
    if (conn->carried) {
        uint64_t last = conn->carried_to - conn->consumed;
        if (n > last)
            n = (size_t)last;
        if (conn->consumed + n > conn->carried_from ||
            (size == 0 && conn->consumed >= conn->carried_from))
            given = give_carried(conn, fds, *count);
    }
    ap_chain_copy(&conn->input, 0, (uint8_t *)buffer, n);
    ap_input_consume(conn, n);
    conn->shown = NULL;
    ap_conn_unlock(conn);
    *count = given;
    return (int64_t)n;
}

/* ---- sending ---------------------------------------------------------- */

/* Whether the error concerns only this message; another may succeed. */
static bool is_of_message(int error)
{
    return error == EMSGSIZE || error == EBADF || error == EINVAL || error == ETOOMANYREFS ||
           error == EPERM || error == EACCES || error == ENOBUFS || error == ENOMEM;
}

static int64_t send_now(ap_conn *conn, const char *data, size_t size, const int *fds, int count)
{
    if (conn->tls)
        return -EBUSY; /* it would not be encrypted */
    if (conn->shut)
        return -EPIPE;
    if (conn->write_error)
        return conn->write_error;
    if (conn->out_bytes || !(conn->slot.ready & AP_WRITABLE))
        return -EAGAIN;
    size_t offered = conn->type == AP_UNIX && size > AP_BOUND ? AP_BOUND : size;
    ssize_t took = ap_sys_send_rights(conn->slot.fd, data, &offered, fds, count);
    if (took >= 0) {
        ap_queue_took(conn, (size_t)took, offered);
    } else if (took == -EAGAIN) {
        ap_queue_again(conn);
    } else if (!is_of_message((int)-took)) {
        ap_queue_break(conn, (int)took);
    }
    return took;
}

int64_t ap_conn_send_fds(ap_conn *conn, const char *data, size_t size, const int *fds, int count)
{
    if (size == 0 || count < 0 || count > AP_FDS_MOST || conn->type == AP_TCP)
        return -EINVAL;
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t took = send_now(conn, data, size, fds, count);
    ap_slot_unlock(&conn->slot);
    return took;
}

/* ---- messages --------------------------------------------------------- */

/* recvmsg returns 0 both at the end and for an empty message, and so do AnyIO's streams:
 * EndOfStream. But only at the end does it stay that way. */
static int64_t nothing_in_it(ap_conn *conn)
{
    if (!conn->read_end && ap_sys_at_end(conn->slot.fd))
        conn->read_end = ap_receive_end(conn);
    conn->request_at = UINT64_MAX; /* it was taken, although nothing is counted */
    return conn->read_end ? conn->read_end : AP_EEOF;
}

/* Into NULL: the length of the message, which stays in the kernel. */
static ssize_t receive_once(ap_conn *conn, struct iovec *into, ap_rights *rights)
{
    if (!into)
        return ap_sys_next_length(conn->slot.fd);
    size_t offered = into->iov_len;
    return ap_sys_recv_rights(conn->slot.fd, into, 1, &offered, rights);
}

/* After a reset the kernel reports the error first, and then what had arrived before
 * it. That must be readable first, as on a stream. */
static ssize_t receive_or_reset(ap_conn *conn, struct iovec *into, ap_rights *rights)
{
    ssize_t got = receive_once(conn, into, rights);
    if (got != -ECONNRESET)
        return got;
    conn->send_error = -ECONNRESET;
    conn->peer_gone |= !conn->cut; /* the caller tells */
    got = receive_once(conn, into, rights);
    return got == -EAGAIN ? -ECONNRESET : got;
}

static int64_t not_received(ap_conn *conn, ssize_t error)
{
    if (error != -EAGAIN)
        ap_receive_fail(conn, (int)error);
    else
        ap_receive_nothing(conn);
    return conn->read_end ? conn->read_end : -EAGAIN;
}

static int64_t receive_block(ap_conn *conn, ap_block *block, size_t room, ap_rights *rights)
{
    struct iovec into = {.iov_base = ap_block_at(block, block->end), .iov_len = room};
    ssize_t got = receive_or_reset(conn, &into, rights);
    if (got < 0)
        return not_received(conn, got);
    if (got == 0 && rights->count == 0 && !rights->truncated)
        return nothing_in_it(conn);
    ap_receive_note(conn, (size_t)got);
    block->end += (uint32_t)got;
    return got;
}

static int64_t receive_message(ap_conn *conn, size_t max, ap_view *view, ap_rights *rights)
{
    if (conn->read_end && conn->read_end != AP_EIDLE)
        return conn->read_end;
    if (!(conn->slot.ready & AP_READABLE))
        return conn->read_end ? conn->read_end : -EAGAIN;
    size_t room = max;
    if (max > AP_SCRATCH) { /* memory follows what has arrived */
        ssize_t next = receive_or_reset(conn, NULL, rights);
        if (next < 0) /* do not try: a message that came now would be truncated */
            return not_received(conn, next);
        room = (size_t)next < max ? (size_t)next : max;
    }
    ap_block *block = ap_pool_take(conn->slot.hub->context.pool, room);
    if (!block)
        return -ENOMEM;
    int64_t got = receive_block(conn, block, room, rights);
    if (got < 0)
        ap_block_unref(block);
    else
        *view = (ap_view){.block = block,
                          .size = block->size,
                          .start = block->start,
                          .end = block->end};
    return got;
}

int64_t ap_conn_receive(ap_conn *conn, size_t max, int64_t deadline, ap_view *view, int *fds,
                        int *count)
{
    if (conn->type != AP_SEQPACKET)
        return -EINVAL;
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_rights rights;
    rights.count = 0;
    conn->want = AP_WANT_NOTHING;
    int64_t got = receive_message(conn, max, view, &rights);
    ap_conn_learn(conn);
    if (got == -EAGAIN)
        got = ap_read_wait(conn, AP_WANT_READABLE, 1, 0, deadline, NULL, 0);
    ap_slot_unlock(&conn->slot);
    if (got < 0)
        return got;
    *count = give(rights.fds, rights.count, fds, *count);
    for (int i = *count; i < rights.count; i++)
        ap_sys_close(rights.fds[i]);
    return got;
}
