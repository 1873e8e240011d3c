/* What a system call that receives has brought: bytes, an end, an error, or nothing.
 *
 * And where in the chain bytes go: the block that is filled next, and its size, which follows what
 * arrives.
 */
#include "receive.h"

#include "chain.h"
#include "connection.h"
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"

static size_t most(size_t a, size_t b)
{
    return a > b ? a : b;
}

/* ---- into what -------------------------------------------------------- */

/* Restarts a last block that was read to its end and that no view needs. */
void ap_receive_rewind(ap_conn *conn)
{
    ap_block *tail = conn->input.tail;
    if (!tail || tail->start != tail->end || conn->input.size > 0)
        return;
    /* acquire; pairs with the release of the last view */
    if (atomic_load_explicit(&tail->refs, memory_order_acquire) > 1)
        return;
    tail->start = tail->end = AP_BLOCK_HEADER;
    if (conn->shown == tail)
        conn->shown = NULL;
}

void ap_receive_append(ap_conn *conn, ap_block *block)
{
    ap_chain_append(&conn->input, block);
    ap_chain_consume(&conn->input, 0, &conn->pins); /* removes an empty head in front of it */
    if (conn->shown != conn->input.head)
        conn->shown = NULL;
}

/* The next block is as large as what arrives at once, so that a message fits in one
 * block if possible; it shrinks more slowly than it grows. */
static void adapt(ap_conn *conn, size_t got)
{
    conn->recent = (uint32_t)got;
    size_t bound = most(conn->high, AP_BLOCK_MIN);
    while (conn->grow < got + AP_BLOCK_HEADER && conn->grow * 2 <= bound)
        conn->grow *= 2;
    if (got < conn->grow / 8 && conn->grow > conn->base)
        conn->grow /= 2;
}

/* ---- what it was ------------------------------------------------------ */

/* An error that is not known to be the peer's may be all the same: a timeout reports the last
 * ICMP error, of which there are many. The caller tells the hub. */
void ap_receive_fail(ap_conn *conn, int error)
{
    conn->read_end = error;
    if (!conn->cut && !ap_is_of_peer(error))
        conn->peer_gone |= ap_sys_hung_up(conn->slot.fd);
}

/* Read first, and ask for SO_ERROR only if that yields nothing: asking clears the
 * error, and an RST would then look like a FIN. What was received before the RST
 * is still readable. */
void ap_receive_nothing(ap_conn *conn)
{
    ap_slot *slot = &conn->slot;
    ap_count(&slot->poller->again, 1);
    slot->ready &= (uint8_t)~AP_READABLE;
    if (!(slot->ready & AP_ERR))
        return;
    slot->ready &= (uint8_t)~AP_ERR;
    int error = ap_sys_socket_error(slot->fd);
    if (error)
        ap_receive_fail(conn, -error);
    else
        ap_sys_drain_error_queue(slot->fd);
}

void ap_receive_note(ap_conn *conn, size_t got)
{
    ap_poller *poller = conn->slot.poller;
    ap_count(&conn->reads, 1);
    ap_count(&poller->reads, 1);
    ap_count(&conn->bytes_received, got);
    ap_count(&poller->bytes_received, got);
    ap_conn_note_activity(conn);
    adapt(conn, got);
}

/* A failed write takes the socket's error with it, or ends the socket itself: recv then
 * returns 0. */
int ap_receive_end(const ap_conn *conn)
{
    int error = conn->send_error;
    return error && error != -EPIPE ? error : AP_EEOF;
}

/* Draws the conclusions of one system call. Returns the bytes received, 0 when that was all for
 * now. */
size_t ap_receive_conclude(ap_conn *conn, ssize_t got, size_t offered)
{
    ap_slot *slot = &conn->slot;
    if (got > 0) {
        ap_receive_note(conn, (size_t)got);
        if ((size_t)got < offered && conn->type == AP_TCP && !(slot->ready & AP_NO_SHORT_READ))
            slot->ready &= (uint8_t)~AP_READABLE;
        return (size_t)got;
    }
    if (got == -EAGAIN)
        ap_receive_nothing(conn);
    else if (got < 0)
        ap_receive_fail(conn, (int)got);
    else
        conn->read_end = ap_receive_end(conn);
    return 0;
}

size_t ap_receive(ap_conn *conn, void *memory, size_t size)
{
    struct iovec iov = {.iov_base = memory, .iov_len = size};
    ssize_t got = ap_sys_recv(conn->slot.fd, &iov, 1, &size);
    return ap_receive_conclude(conn, got, size);
}
