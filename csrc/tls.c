/* A connection's TLS session: OpenSSL between the socket and the plaintext.
 *
 * The rest of the core works on plaintext and knows nothing of records: what the driver receives
 * is decrypted onto the chain of input (tls_input.c), and what is to be sent is encrypted on its
 * way from the queue to the kernel (tls_output.c). So windows, targets, views, request mode, queued
 * output that is given up: all is as without TLS. Handshakes are computed in a thread for such
 * (tls_shake.c).
 *
 * OpenSSL has no lock for an SSL object: one thread at a time may use it. That is whoever has the
 * slot's mutex, with two exceptions, which count in `held`:
 *
 *   a handshake    takes a millisecond, and the loop may want the mutex meanwhile
 *   the user       asks the SSL object for its cipher and the like, by methods of Python's; a
 *                  thread that waits for Python must not have a mutex that the loop, which has
 *                  Python, waits for
 *
 * While it is held, nobody else touches it, nor what its BIO works on: input stays in the socket,
 * output stays in the queue as it is, and who lets go of it has the slot served. If the connection
 * was closed meanwhile, it is freed then.
 *
 * OpenSSL's own locks, those of an SSL_CTX above all, must not be held by another thread when the
 * process forks: the child would find them locked for ever. So all that may take them is done
 * inside of the gate (gate.c).
 *
 * The error queue of OpenSSL is per thread. It is cleared before each call that may fail, and read
 * after it, in between nothing else of OpenSSL's is called by the thread.
 */
#include "tls.h"

#include "bytes.h"
#include "clock.h"
#include "connection.h"
#include "gate.h"
#include "openssl.h"
#include "slot.h"
#include "sysio.h"

#include <stdio.h>
#include <stdlib.h>

#define HEADER 5 /* bytes of a record's header; the last two are the length (RFC 8446, 5.1) */

/* ---- OpenSSL's side --------------------------------------------------- */

/* Follows where records begin and end. */
static void follow(ap_tls *tls, const uint8_t *data, size_t size)
{
    while (size > 0) {
        size_t step = size;
        if (tls->record_left > 0) {
            step = tls->record_left < size ? tls->record_left : size;
            tls->record_left -= step;
        } else {
            step = 1;
            tls->header[tls->header_size++] = *data;
            if (tls->header_size == HEADER) {
                tls->record_left = (size_t)tls->header[3] << 8 | tls->header[4];
                tls->header_size = 0;
            }
        }
        data += step;
        size -= step;
    }
}

static int bio_read(ap_ossl_bio *bio, char *out, int size)
{
    ap_tls *tls = ap_ssl.bio_get_data(bio);
    ap_ssl.bio_clear_flags(bio, AP_OSSL_BIO_RETRY_FLAGS);
    if (size <= 0 || tls->in_size == 0) {
        ap_ssl.bio_set_flags(bio, AP_OSSL_BIO_READ | AP_OSSL_BIO_RETRY);
        return -1;
    }
    size_t n = (size_t)size < tls->in_size ? (size_t)size : tls->in_size;
    memcpy(out, tls->in, n);
    follow(tls, tls->in, n);
    tls->in += n;
    tls->in_size -= n;
    return (int)n;
}

static int bio_write(ap_ossl_bio *bio, const char *data, int size)
{
    ap_tls *tls = ap_ssl.bio_get_data(bio);
    ap_ssl.bio_clear_flags(bio, AP_OSSL_BIO_RETRY_FLAGS);
    if (size <= 0 || !ap_bytes_append(&tls->out, data, (size_t)size)) {
        tls->no_memory |= size > 0;
        return -1;
    }
    return size;
}

static long bio_ctrl(ap_ossl_bio *bio, int command, long argument, void *pointer)
{
    (void)bio, (void)argument, (void)pointer;
    return command == AP_OSSL_BIO_CTRL_FLUSH || command == AP_OSSL_BIO_CTRL_DUP;
}

static ap_ossl_method *method(void)
{
    static _Atomic(ap_ossl_method *) made; /* (a) acq_rel: published when it is complete */
    ap_ossl_method *all = atomic_load_explicit(&made, memory_order_acquire), *none = NULL;
    if (all)
        return all;
    all = ap_ssl.bio_method_new(ap_ssl.bio_new_index() | AP_OSSL_BIO_SOURCE_SINK, "anypoll");
    if (!all)
        return NULL;
    ap_ssl.bio_method_read(all, bio_read);
    ap_ssl.bio_method_write(all, bio_write);
    ap_ssl.bio_method_ctrl(all, bio_ctrl);
    if (atomic_compare_exchange_strong_explicit(&made, &none, all, memory_order_acq_rel,
                                                memory_order_acquire))
        return all;
    ap_ssl.bio_method_free(all);
    return none;
}

static bool attach_inside(ap_tls *tls, ap_ossl_ssl *ssl)
{
    ap_ossl_bio *bio = method() ? ap_ssl.bio_new(method()) : NULL;
    if (!bio)
        return false;
    ap_ssl.bio_set_data(bio, tls);
    ap_ssl.bio_set_init(bio, 1);
    if (!ap_ssl.up_ref(ssl)) {
        ap_ssl.bio_free(bio);
        return false;
    }
    ap_ssl.set_bio(ssl, bio, bio); /* one reference for both directions */
    ap_ssl.set_options(ssl, AP_OSSL_OP_NO_RENEGOTIATION);
    /* a read goes on behind a message of the handshake's kind, as it does by default */
    ap_ssl.ctrl(ssl, AP_OSSL_CTRL_MODE, AP_OSSL_MODE_AUTO_RETRY, NULL);
    tls->ssl = ssl;
    return true;
}

static bool attach(ap_tls *tls, ap_ossl_ssl *ssl)
{
    ap_gate_enter();
    bool attached = attach_inside(tls, ssl);
    ap_gate_leave();
    return attached;
}

ap_tls *ap_tls_new(ap_ossl_ssl *ssl, int flags)
{
    ap_tls *tls = ap_sys_alloc(sizeof *tls);
    if (!tls)
        return NULL;
    tls->phase = AP_TLS_SHAKING;
    tls->server = (flags & AP_TLS_SERVER) != 0;
    tls->ragged = (flags & AP_TLS_RAGGED) != 0;
    tls->began = ap_now();
    if (attach(tls, ssl))
        return tls;
    free(tls);
    return NULL;
}

/* ---- holding and dropping --------------------------------------------- */

static void free_tls(ap_tls *tls)
{
    ap_gate_enter();
    ap_ssl.set_bio(tls->ssl, NULL, NULL); /* others may have references, and ask */
    ap_ssl.free(tls->ssl);
    ap_gate_leave();
    ap_bytes_clear(&tls->ahead);
    ap_bytes_clear(&tls->out);
    free(tls);
}

void ap_tls_drop(ap_conn *conn)
{
    if (!conn->tls || conn->tls->held)
        return;
    free_tls(conn->tls);
    conn->tls = NULL;
}

void ap_tls_hold(ap_tls *tls)
{
    tls->held++;
}

void ap_tls_release(ap_conn *conn)
{
    AP_ASSERT(conn->tls->held > 0);
    if (--conn->tls->held > 0)
        return;
    if (conn->slot.closed)
        ap_tls_drop(conn);
}

void ap_tls_forget_output(ap_conn *conn)
{
    ap_tls *tls = conn->tls;
    tls->counted = tls->given_up = 0;
    if (!tls->held) /* otherwise whoever holds it may be writing there */
        ap_bytes_clear(&tls->out);
}

/* ---- asking ------------------------------------------------------------ */

static void copy_text(char *out, size_t size, const char *text)
{
    snprintf(out, size, "%s", text ? text : "");
}

void ap_tls_describe(const ap_tls *tls, ap_tls_status *out)
{
    *out = (ap_tls_status){.phase = tls->phase,
                           .begun = ap_tls_has_begun(tls),
                           .resumed = tls->resumed,
                           .kind = tls->kind,
                           .code = tls->code,
                           .verify = tls->verify,
                           .lasted = tls->lasted};
    ap_gate_enter();
    copy_text(out->reason, sizeof out->reason, ap_ssl.err_reason(tls->code));
    ap_gate_leave();
    copy_text(out->certificate, sizeof out->certificate, ap_ssl.verify_text(tls->verify));
}

/* While a step is computed of what has come, that is still there, and the rest is changing. */
bool ap_tls_has_begun(const ap_tls *tls)
{
    return ap_bytes_size(&tls->ahead) || tls->header_size || tls->record_left;
}

bool ap_tls_is_awaited(const ap_tls *tls, bool until_pause)
{
    return tls->phase == AP_TLS_SHAKING &&
           (!until_pause || tls->computing || ap_tls_has_begun(tls));
}
