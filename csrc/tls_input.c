/* TLS input: ciphertext from the socket becomes plaintext on the chain.
 *
 * What the socket has is received into the scratch buffer, and OpenSSL gets all of it: it keeps
 * what is only part of a record. So no ciphertext is kept here, but for what came before the
 * session or after its end, and with the last message of the handshake (`ahead`). Plaintext goes
 * straight into blocks, at most what was received and the rest of one record, so the limits of
 * what is read ahead hold as they do for plain connections.
 *
 * A peer can make OpenSSL answer by itself (key updates). Answers are queued like all output; when
 * too much of it is, nothing is decrypted until the peer has read some.
 */
#include "tls_input.h"

#include "bytes.h"
#include "connection.h"
#include "gate.h"
#include "inbox.h"
#include "openssl.h"
#include "pool.h"
#include "receive.h"
#include "tls.h"
#include "tls_output.h"

#define ANSWERS_MOST (128u * 1024) /* twice what data alone makes of it: see tls_output.c */
#define RECEIVE_LEAST 4096         /* the overhead of a record, and more */
#define TAIL_LEAST 512             /* room that is worth a call */
#define RECORD_MOST (16u * 1024)   /* plaintext (RFC 8446, 5.1) */

bool ap_tls_is_open(const ap_tls *tls)
{
    return tls->phase == AP_TLS_OPEN && !tls->held && ap_bytes_size(&tls->out) < ANSWERS_MOST;
}

/* ---- decrypting ------------------------------------------------------- */

/* Where the next piece of plaintext goes, of which there may be so much. */
typedef struct {
    ap_block *block;
    bool fresh; /* it is not in the chain yet */
} place;

static bool find_place(ap_context *context, ap_conn *conn, size_t expected, place *out)
{
    ap_receive_rewind(conn);
    ap_block *tail = conn->input.tail;
    size_t room = tail ? ap_block_room(tail) : 0;
    *out = (place){.block = tail};
    if (room && (room >= expected || room >= TAIL_LEAST))
        return true;
    size_t usual = conn->grow - AP_BLOCK_HEADER;
    *out = (place){.block = ap_pool_take(context->pool, expected > usual ? expected : usual),
                   .fresh = true};
    return out->block;
}

static void keep(ap_conn *conn, place *at, size_t size)
{
    at->block->end += (uint32_t)size;
    if (at->fresh)
        ap_receive_append(conn, at->block);
    conn->input.size += size;
}

/* The session has ended by itself; what follows is not its. */
static void end(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    tls->phase = AP_TLS_ENDED;
    conn->read_end = AP_EEOF;
    if (tls->in_size && !ap_bytes_append(&tls->ahead, tls->in, tls->in_size))
        ap_tls_break(conn, -ENOMEM);
}

static void conclude(ap_conn *conn, int rc)
{
    switch (ap_ssl.get_error(conn->tls->ssl, rc)) {
    case AP_OSSL_ERROR_WANT_READ: break;
    case AP_OSSL_ERROR_ZERO_RETURN: end(conn); break;
    default: ap_tls_fail(conn, rc);
    }
}

/* One piece. False: there is no more. */
static bool decrypt_some(ap_context *context, ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    size_t expected = tls->in_size + RECORD_MOST;
    if (!tls->header_size && !tls->record_left)
        expected = tls->in_size + (size_t)ap_ssl.pending(tls->ssl);
    place at;
    if (!find_place(context, conn, expected, &at)) {
        ap_tls_break(conn, -ENOMEM);
        return false;
    }
    ap_block *block = at.block;
    ap_gate_enter();
    ap_ssl.err_clear();
    int got = ap_ssl.read(tls->ssl, ap_block_at(block, block->end), (int)ap_block_room(block));
    ap_gate_leave();
    if (got > 0) {
        keep(conn, &at, (size_t)got);
        return tls->in_size || ap_ssl.has_pending(tls->ssl);
    }
    if (at.fresh)
        ap_block_unref(block);
    conclude(conn, got);
    return false;
}

static void decrypt(ap_context *context, ap_conn *conn, const uint8_t *data, size_t size)
{
    ap_tls *tls = conn->tls;
    tls->in = data;
    tls->in_size = size;
    while (decrypt_some(context, conn))
        ;
    tls->in_size = 0;
    if (ap_bytes_size(&tls->out) > tls->counted && !conn->write_error)
        ap_tls_push(conn); /* it has answered */
    if (tls->blocked && conn->out_count)
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
    tls->blocked = false;
}

/* ---- receiving -------------------------------------------------------- */

/* What came with the end of the handshake, or before its beginning. */
static size_t decrypt_ahead(ap_context *context, ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    ap_bytes ahead = tls->ahead;
    size_t size = ap_bytes_size(&ahead);
    tls->ahead = (ap_bytes){0}; /* what comes behind the session is kept there */
    decrypt(context, conn, ap_bytes_front(&ahead), size);
    ap_bytes_clear(&ahead);
    return size;
}

size_t ap_tls_receive(ap_context *context, ap_conn *conn, size_t max)
{
    if (ap_bytes_size(&conn->tls->ahead))
        return decrypt_ahead(context, conn);
    size_t size = max < RECEIVE_LEAST ? RECEIVE_LEAST : max > AP_SCRATCH ? AP_SCRATCH : max;
    size_t got = ap_receive(conn, context->scratch, size);
    if (got)
        decrypt(context, conn, context->scratch, got);
    else
        ap_tls_cut_off(conn);
    return got;
}
