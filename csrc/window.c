/* The read window: the part of the input that the loop may walk without a call.
 *
 * The loop is shown a window of the first block (ap_conn_block) and moves through it
 * without calling C; it reports its position with its next call (pos). So what C
 * considers unread may already be consumed, which is safe: a block leaves the chain
 * only when the loop has said that it is done with it.
 */
#include "window.h"

#include "chain.h"
#include "connection.h"
#include "driver.h"
#include "fds.h"
#include "hub.h"
#include "inbox.h"
#include "input.h"
#include "poller.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"

/* The loop reports its position in the block that was shown. */
void ap_window_to(ap_conn *conn, uint32_t pos)
{
    ap_block *block = conn->shown;
    if (block && pos > block->start && pos <= block->end)
        ap_input_consume(conn, pos - block->start);
    else
        ap_input_consume(conn, 0); /* removes an empty head, if another block follows */
}

uint32_t ap_window_end(const ap_conn *conn, size_t n)
{
    const ap_block *block = conn->input.head;
    size_t have = block->end - block->start, shown = n > conn->window ? n : conn->window;
    return block->start + (uint32_t)(have < shown ? have : shown);
}

uint32_t ap_window_shown(const ap_conn *conn, size_t n)
{
    const ap_block *block = conn->shown;
    if (conn->carried)
        return 0; /* the loop has to ask: it may have to report its position */
    uint32_t end = block && block->end - block->start >= n ? ap_window_end(conn, n) : 0;
    return end <= INT32_MAX ? end : 0; /* it travels in a token */
}

int64_t ap_window_new_block(const ap_conn *conn)
{
    return conn->input.head != conn->shown ? (int64_t)1 << AP_NEW_BLOCK_SHIFT : 0;
}

void ap_window_put_front(ap_conn *conn, ap_block *block)
{
    ap_chain *chain = &conn->input;
    block->next = chain->head;
    chain->head = block;
    if (!chain->tail)
        chain->tail = block;
    chain->size += block->end - block->start;
    conn->shown = NULL;
}

/* Replaces the first n unread bytes with block, which holds a copy of them. */
static void replace_front(ap_conn *conn, ap_block *block, size_t n)
{
    ap_chain_consume(&conn->input, n, &conn->pins);
    block->end += (uint32_t)n;
    ap_window_put_front(conn, block);
}

/* Moves the first n unread bytes into one block. Copies in portions, releasing the mutex
 * in between: the driver only appends meanwhile, and only the loop, which is here,
 * consumes. */
int ap_window_join(ap_conn *conn, size_t n)
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
        return AP_CLOSED_MEANWHILE;
    return block ? 0 : -ENOMEM;
}

int ap_conn_block(ap_conn *conn, uint32_t pos, ap_view *view)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    ap_window_to(conn, pos);
    ap_block *block = conn->input.head;
    if (conn->input.size == 0) {
        rc = -ENODATA;
    } else {
        *view = (ap_view){.block = block,
                          .size = block->size,
                          .start = block->start,
                          .end = ap_window_end(conn, 0)};
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

/* A large one that is given back is the next one that is taken, while it is in the processor's
 * cache: a few blocks serve all connections of a loop that drives. A thread has read for all
 * connections before the loop comes, so many would come and go. */
int ap_conn_rewind(ap_conn *conn, const ap_block *block, uint32_t *pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (block == conn->shown && ap_input_restart(conn, *pos)) {
        *pos = block->start;
        rc = 1;
        if (block->size >= AP_BLOCK_LARGE && ap_borrower(conn->slot.poller)) {
            conn->shown = NULL;
            ap_chain_drop(&conn->input, NULL); /* no view pins it */
            rc = 2;
        }
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
    ap_window_to(conn, pos);
    if (n > conn->input.size)
        rc = -EINVAL;
    else
        ap_input_consume(conn, n);
    conn->shown = NULL;
    conn->lent = false;
    ap_conn_unlock(conn);
    return rc;
}

/* Of what is in the socket only decrypting tells how much it is. */
static void look(ap_conn *conn)
{
    conn->slot.ready |= AP_READABLE;
    if (ap_input_read(&conn->slot.hub->context, conn))
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    if (ap_input_over(conn))
        ap_hub_post(&conn->slot, AP_MAIL_READ);
    ap_conn_learn(conn);
}

int64_t ap_conn_arrived(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int in_kernel = 0;
    if (conn->tls)
        look(conn);
    else
        in_kernel = ap_sys_unread(conn->slot.fd);
    int64_t n = (int64_t)ap_conn_left(conn, pos) + (in_kernel > 0 ? in_kernel : 0);
    ap_slot_unlock(&conn->slot);
    return n;
}

int64_t ap_conn_buffered(ap_conn *conn, uint32_t pos)
{
    int rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    if (conn->straight && (conn->slot.ready & AP_READABLE))
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    conn->straight = false;
    ap_slot_unlock(&conn->slot);
    ap_driver_catch_up(conn->slot.poller);
    rc = ap_slot_enter(&conn->slot);
    if (rc < 0)
        return rc;
    int64_t n = (int64_t)ap_conn_left(conn, pos);
    ap_slot_unlock(&conn->slot);
    return n;
}
