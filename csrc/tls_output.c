/* TLS output: plaintext from the queue becomes records, which the kernel gets at once.
 *
 * Whoever sends encrypts: the loop's thread when it is called, and the driver when the kernel has
 * room again. A chunk is encrypted only when all earlier records have gone, so at most one is
 * waiting here, and the rest stands in the queue as it was given: it can still be taken back. A
 * record that was made has to go out, because it is numbered.
 *
 * OpenSSL encrypts nothing while it has a part of a message that belongs to the handshake's kind (a
 * ticket, say, in several records). The queue waits until more input has been decrypted.
 *
 * Records that wait count as the connection's own output (own_bytes), which precedes what Python
 * has given.
 */
#include "tls_output.h"

#include "bytes.h"
#include "connection.h"
#include "gate.h"
#include "hub.h"
#include "openssl.h"
#include "queue.h"
#include "slot.h"
#include "sysio.h"
#include "tls.h"

#define CHUNK (64u * 1024)
#define RECORD (16u * 1024) /* the most plaintext that one has */

static bool may_seal(const ap_conn *conn)
{
    const ap_tls *tls = conn->tls;
    return !tls->held && !tls->blocked && !conn->goodbye && tls->phase != AP_TLS_SHAKING &&
           tls->phase != AP_TLS_FAILED && ap_bytes_size(&tls->out) == 0;
}

/* ---- making records ---------------------------------------------------- */

typedef struct {
    const struct iovec *iov;
    size_t count, skip; /* pieces, and bytes of the first that are done */
} pieces;

static size_t first_size(const pieces *from)
{
    return from->iov->iov_len - from->skip;
}

static const uint8_t *advance(pieces *from, size_t n)
{
    const uint8_t *data = (const uint8_t *)from->iov->iov_base + from->skip;
    from->skip += n;
    if (from->skip == from->iov->iov_len) {
        from->iov++;
        from->count--;
        from->skip = 0;
    }
    return data;
}

/* The plaintext of the next record: of one large piece, or of several, joined in memory. */
static const uint8_t *next_record(pieces *from, size_t most, uint8_t *memory, size_t *size)
{
    size_t first = first_size(from);
    if (first >= most || from->count == 1) {
        *size = first < most ? first : most;
        return advance(from, *size);
    }
    *size = 0;
    while (from->count && *size < most) {
        size_t room = most - *size, n = first_size(from) < room ? first_size(from) : room;
        memcpy(memory + *size, advance(from, n), n);
        *size += n;
    }
    return memory;
}

size_t ap_tls_seal(ap_conn *conn, const struct iovec *iov, size_t count, size_t skip)
{
    ap_tls *tls = conn->tls;
    pieces from = {.iov = iov, .count = count, .skip = skip};
    uint8_t memory[RECORD];
    size_t total = 0, size;
    if (!may_seal(conn))
        return 0;
    while (from.count && total < CHUNK) {
        const uint8_t *data = next_record(&from, RECORD, memory, &size);
        if (size == 0)
            continue; /* an empty piece */
        ap_gate_enter();
        ap_ssl.err_clear();
        int rc = ap_ssl.write(tls->ssl, data, (int)size);
        ap_gate_leave();
        if (rc <= 0) {
            tls->blocked = ap_ssl.get_error(tls->ssl, rc) == AP_OSSL_ERROR_WANT_READ;
            if (tls->blocked)
                break;
            ap_tls_fail(conn, rc);
            return 0;
        }
        total += size;
    }
    return total;
}

/* ---- sending them ------------------------------------------------------ */

static void count(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    size_t now = ap_bytes_size(&tls->out);
    conn->out_bytes += now - tls->counted;
    conn->own_bytes += now - tls->counted;
    tls->counted = now;
    ap_queue_count(conn);
}

bool ap_tls_push(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    bool all = true;
    if (conn->write_error) { /* an answer to the peer, who need not have it */
        ap_tls_forget_output(conn);
        return false;
    }
    while (all && ap_bytes_size(&tls->out) && (conn->slot.ready & AP_WRITABLE)) {
        struct iovec iov = {.iov_base = tls->out.data + tls->out.start,
                            .iov_len = ap_bytes_size(&tls->out)};
        size_t sent;
        all = ap_queue_offer(conn, &iov, 1, &sent);
        if (conn->write_error) /* that has dropped it */
            return false;
        ap_bytes_consume(&tls->out, sent);
        tls->given_up -= sent < tls->given_up ? sent : tls->given_up;
    }
    if (ap_bytes_size(&tls->out) && !(conn->slot.ready & AP_WRITABLE))
        ap_queue_watch(conn, true);
    if (conn->write_error)
        return false;
    count(conn);
    ap_queue_tell(conn);
    return ap_bytes_size(&tls->out) == 0;
}

/* ---- failing ---------------------------------------------------------- */

static void fail(ap_conn *conn)
{
    conn->tls->phase = AP_TLS_FAILED;
    if (!conn->read_end)
        conn->read_end = AP_ETLS;
    ap_queue_fail(conn, AP_ETLS);
    ap_conn_learn(conn);
    ap_hub_post(&conn->slot, AP_MAIL_READ);
}

/* The alert goes out if the kernel has room for it. */
void ap_tls_fail(ap_conn *conn, int rc)
{
    ap_tls *tls = conn->tls;
    tls->kind = ap_ssl.get_error(tls->ssl, rc);
    tls->code = ap_ssl.err_peek_last();
    tls->verify = ap_ssl.get_verify_result(tls->ssl);
    if (tls->no_memory)
        tls->kind = 0;
    ap_ssl.err_clear();
    ap_tls_push(conn);
    fail(conn);
}

void ap_tls_break(ap_conn *conn, int error)
{
    if (!conn->read_end)
        conn->read_end = error;
    fail(conn);
}

void ap_tls_cut_off(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    if (conn->read_end == AP_EEOF && !tls->ragged)
        conn->read_end = AP_ECUT;
    if (tls->phase != AP_TLS_SHAKING || !conn->read_end)
        return;
    ap_queue_fail(conn, conn->read_end); /* there is no answer that could be sent */
}
