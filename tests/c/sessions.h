/* sessions.h - TLS sessions of the core's, and the peers that they talk to.
 *
 * The core finds the libssl that this loads as it finds the one of Python's `_ssl`. A peer is an
 * SSL object over two buffers; what it says goes through its socket in pieces of any size.
 */
#ifndef SESSIONS_H
#define SESSIONS_H

#include "fixture.h"
#include "openssl.h"
#include "tls.h"

#include <dlfcn.h>

enum { TLS12 = 0x303, TLS13 = 0x304 };
enum { SET_MIN = 123, SET_MAX = 124, SET_FRAGMENT = 52, SET_HOSTNAME = 55 }; /* of SSL_ctrl */

/* ---- what only the makers of SSL objects need --------------------------- */

#define LIBRARY(F)                                                                           \
    F(void *, TLS_method, (void))                                                            \
    F(ap_ossl_ctx *, SSL_CTX_new, (void *))                                                  \
    F(void, SSL_CTX_free, (ap_ossl_ctx *))                                                   \
    F(long, SSL_CTX_ctrl, (ap_ossl_ctx *, int, long, void *))                                \
    F(int, SSL_CTX_use_certificate, (ap_ossl_ctx *, void *))                                 \
    F(int, SSL_CTX_use_PrivateKey, (ap_ossl_ctx *, void *))                                  \
    F(void, SSL_CTX_set_verify, (ap_ossl_ctx *, int, void *))                                \
    F(void *, SSL_CTX_get_cert_store, (ap_ossl_ctx *))                                       \
    F(int, X509_STORE_add_cert, (void *, void *))                                            \
    F(int, SSL_CTX_set_session_id_context, (ap_ossl_ctx *, const unsigned char *, int))      \
    F(ap_ossl_ssl *, SSL_new, (ap_ossl_ctx *))                                               \
    F(void, SSL_set_accept_state, (ap_ossl_ssl *))                                           \
    F(void, SSL_set_connect_state, (ap_ossl_ssl *))                                          \
    F(int, SSL_is_server, (const ap_ossl_ssl *))                                             \
    F(void, SSL_set_verify, (ap_ossl_ssl *, int, void *))                                    \
    F(void, SSL_set_info_callback, (ap_ossl_ssl *, void (*)(const ap_ossl_ssl *, int, int))) \
    F(int, SSL_set_fd, (ap_ossl_ssl *, int))                                                 \
    F(int, SSL_key_update, (ap_ossl_ssl *, int))                                             \
    F(int, SSL_renegotiate, (ap_ossl_ssl *))                                                 \
    F(const char *, SSL_get_version, (const ap_ossl_ssl *))                                  \
    F(void *, BIO_s_mem, (void))                                                             \
    F(ap_ossl_bio *, BIO_new, (void *))                                                      \
    F(ap_ossl_bio *, BIO_new_mem_buf, (const void *, int))                                   \
    F(int, BIO_free, (ap_ossl_bio *))                                                        \
    F(int, BIO_read, (ap_ossl_bio *, void *, int))                                           \
    F(int, BIO_write, (ap_ossl_bio *, const void *, int))                                    \
    F(size_t, BIO_ctrl_pending, (ap_ossl_bio *))                                             \
    F(void *, PEM_read_bio_X509, (ap_ossl_bio *, void *, void *, void *))                    \
    F(void *, PEM_read_bio_PrivateKey, (ap_ossl_bio *, void *, void *, void *))              \
    F(void, X509_free, (void *))                                                             \
    F(void, EVP_PKEY_free, (void *))

static struct {
#define FIELD(result, name, parameters) result(*name) parameters;
    LIBRARY(FIELD)
#undef FIELD
    void *handle;
} ossl;

static inline void tls_load(void)
{
    if (ossl.handle)
        return;
    void *handle = dlopen("libssl.so.3", RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        handle = dlopen("libssl.so.1.1", RTLD_NOW | RTLD_LOCAL);
    if (!handle)
        SKIP("no libssl is installed here");
#define FIND(result, name, parameters)                  \
    if (!(*(void **)&ossl.name = dlsym(handle, #name))) \
        CHECK_FAIL("%s is missing", #name);
    LIBRARY(FIND)
#undef FIND
    unsigned long (*version_num)(void);
    *(void **)&version_num = dlsym(handle, "OpenSSL_version_num");
    Dl_info info;
    CHECK(dladdr(dlsym(handle, "SSL_new"), &info) != 0);
    CHECK_EQ(ap_tls_load(info.dli_fname, version_num()), 0);
    ossl.handle = handle;
}

/* Of anypoll.test, by itself, from 2000 to 2149. */
static const char certificate_pem[] =
    "-----BEGIN CERTIFICATE-----\n"
    "MIIBajCCARCgAwIBAgIBATAKBggqhkjOPQQDAjAXMRUwEwYDVQQDDAxhbnlwb2xs\n"
    "LnRlc3QwIBcNMDAwMTAxMDAwMDAwWhgPMjE1MDAxMDEwMDAwMDBaMBcxFTATBgNV\n"
    "BAMMDGFueXBvbGwudGVzdDBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKjWn8+s\n"
    "8uOdcOqRR6NB71tAVdeRFtz2w0Kbcoto1qb0EeF+7C82qyemaCv6HhRrCXd0bhvV\n"
    "OdNSI+Fe8v3372+jSzBJMA8GA1UdEwEB/wQFMAMBAf8wFwYDVR0RBBAwDoIMYW55\n"
    "cG9sbC50ZXN0MB0GA1UdDgQWBBQLN9UK1h71KWB2vg+N3ZFQPY7thjAKBggqhkjO\n"
    "PQQDAgNIADBFAiEAuFQHPmai9Ux6uvgvTzJCkFUYafzA0HIzRQfKahVpNHkCICj5\n"
    "M/FsM/NKNpLfbV6s1Xsa0F0w2Vi8np30GZMIRTmm\n"
    "-----END CERTIFICATE-----\n";
static const char key_pem[] = "-----BEGIN PRIVATE KEY-----\n"
                              "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgk791eBL3k8fJXG0p\n"
                              "ulkjLJne9qPrFQHwogg6IJ0Dyv6hRANCAASo1p/PrPLjnXDqkUejQe9bQFXXkRbc\n"
                              "9sNCm3KLaNam9BHhfuwvNqsnpmgr+h4Uawl3dG4b1TnTUiPhXvL99+9v\n"
                              "-----END PRIVATE KEY-----\n";

/* For servers and clients. Nobody is verified yet. */
static inline ap_ossl_ctx *context_new(int version)
{
    tls_load();
    ap_ossl_ctx *ctx = ossl.SSL_CTX_new(ossl.TLS_method());
    ap_ossl_bio *bio = ossl.BIO_new_mem_buf(certificate_pem, -1);
    void *certificate = ossl.PEM_read_bio_X509(bio, NULL, NULL, NULL);
    ossl.BIO_free(bio);
    bio = ossl.BIO_new_mem_buf(key_pem, -1);
    void *key = ossl.PEM_read_bio_PrivateKey(bio, NULL, NULL, NULL);
    ossl.BIO_free(bio);
    CHECK(ctx && certificate && key);
    CHECK_EQ(ossl.SSL_CTX_use_certificate(ctx, certificate), 1);
    CHECK_EQ(ossl.SSL_CTX_use_PrivateKey(ctx, key), 1);
    CHECK_EQ(ossl.SSL_CTX_ctrl(ctx, SET_MIN, version, NULL), 1);
    CHECK_EQ(ossl.SSL_CTX_ctrl(ctx, SET_MAX, version, NULL), 1);
    ossl.X509_free(certificate);
    ossl.EVP_PKEY_free(key);
    return ctx;
}

/* ---- sessions ---------------------------------------------------------- */

struct session {
    struct link l;
    ap_ossl_ctx *ctx;        /* of both sides */
    ap_ossl_ssl *ssl, *peer; /* the core's, and the other */
    ap_ossl_bio *in, *out;   /* of the peer */
    size_t cut;              /* bytes that the peer sends at once; 0: any number */
    bool deaf;               /* the peer does not read */
    bool mute;               /* the peer keeps what it has to say behind the handshake */
    int result, error;       /* of the peer's handshake */
};

static inline void session_open(struct session *s, struct world *w, int kind, int version,
                                bool server)
{
    *s = (struct session){.ctx = context_new(version)};
    s->l = link_open(w, kind, HIGH);
    s->ssl = ossl.SSL_new(s->ctx);
    s->peer = ossl.SSL_new(s->ctx);
    s->in = ossl.BIO_new(ossl.BIO_s_mem());
    s->out = ossl.BIO_new(ossl.BIO_s_mem());
    CHECK(s->ssl && s->peer && s->in && s->out);
    ap_ssl.set_bio(s->peer, s->in, s->out);
    (server ? ossl.SSL_set_accept_state : ossl.SSL_set_connect_state)(s->ssl);
    (server ? ossl.SSL_set_connect_state : ossl.SSL_set_accept_state)(s->peer);
}

static inline void session_close(struct session *s)
{
    link_close(&s->l);
    ap_ssl.free(s->ssl);
    ap_ssl.free(s->peer);
    ossl.SSL_CTX_free(s->ctx);
}

static inline void session_start(struct session *s, int flags)
{
    flags |= ossl.SSL_is_server(s->ssl) ? AP_TLS_SERVER : 0;
    CHECK_EQ(ap_conn_start_tls(s->l.conn, s->l.pos, s->ssl, flags), 0);
}

static inline ap_tls_status status_of(struct session *s)
{
    ap_tls_status status;
    CHECK_EQ(ap_conn_tls_status(s->l.conn, &status), 0);
    return status;
}

/* Lets the driver work, without waiting. */
static inline void go_on(struct world *w)
{
    if (w->threaded)
        sched_yield();
    else
        step(w, 0);
}

/* What the peer has to say goes out; one piece by itself, if it is to be cut. */
static inline void peer_flush(struct session *s)
{
    char memory[16 * 1024];
    while (s->l.peer >= 0 && !(s->mute && s->result == 1) && ossl.BIO_ctrl_pending(s->out) > 0) {
        int n = ossl.BIO_read(s->out, memory, (int)(s->cut ? s->cut : sizeof memory));
        peer_send(&s->l, memory, (size_t)n);
        for (int64_t end = ap_now() + PATIENCE; s->cut && unread_in_kernel(s->l.fd) > 0;) {
            CHECK(ap_now() < end);
            go_on(s->l.w);
        }
    }
}

/* One turn of the peer's: sends, receives, and goes on with its handshake. */
static inline void peer_turn(struct session *s)
{
    char memory[16 * 1024];
    ssize_t got;
    peer_flush(s);
    while (!s->deaf && s->l.peer >= 0 &&
           (got = recv(s->l.peer, memory, sizeof memory, MSG_DONTWAIT)) > 0)
        CHECK_EQ(ossl.BIO_write(s->in, memory, (int)got), got);
    ap_ssl.err_clear();
    if (s->result != 1 && s->error != AP_OSSL_ERROR_SSL) {
        s->result = ap_ssl.do_handshake(s->peer);
        s->error = ap_ssl.get_error(s->peer, s->result);
    }
    peer_flush(s);
    go_on(s->l.w);
}

#define MEANWHILE(s, condition)                                       \
    for (int64_t end_ = ap_now() + PATIENCE; !(condition);) {         \
        peer_turn(s);                                                 \
        if (ap_now() > end_)                                          \
            CHECK_FAIL("MEANWHILE(%s): it did not come", #condition); \
    }

/* What came of these bits until now. */
static inline uint32_t told(struct session *s, uint32_t bits)
{
    struct mail *m = mail_at(s->l.w, s->l.id);
    collect(s->l.w);
    uint32_t got = m->bits & bits;
    m->bits &= ~bits;
    return got;
}

/* Waits for the end of the core's handshake, as a loop does: a token, then another look. */
static inline int shake(struct session *s)
{
    int rc;
    while ((rc = ap_conn_shake(s->l.conn, 0, 0)) == -EAGAIN)
        MEANWHILE(s, told(s, AP_MAIL_READ));
    return rc;
}

/* Both are done. */
static inline void shake_hands(struct session *s)
{
    CHECK_EQ(shake(s), 0);
    MEANWHILE(s, s->result == 1);
    CHECK_EQ(status_of(s).phase, AP_TLS_OPEN);
    CHECK(status_of(s).lasted > 0);
}

/* An open session, in the role of a server or of a client. */
static inline void session_begin(struct session *s, struct world *w, int version, bool server)
{
    session_open(s, w, AP_TCP, version, server);
    session_start(s, 0);
    shake_hands(s);
}

/* ---- the peer of an open session ----------------------------------------- */

/* Encrypts n bytes of the stream, which wait for the next turn. */
static inline void peer_encrypt(struct session *s, uint64_t stream, uint64_t from, size_t n)
{
    uint8_t *bytes = pattern_make(stream, from, n);
    CHECK_EQ(ap_ssl.write(s->peer, bytes, (int)n), n);
    free(bytes);
}

static inline void peer_tells(struct session *s, uint64_t stream, uint64_t from, size_t n)
{
    peer_encrypt(s, stream, from, n);
    peer_flush(s);
}

/* Decrypts what is there, at most n bytes, which must be those of the stream. */
static inline size_t peer_decrypt(struct session *s, uint64_t stream, uint64_t from, size_t n)
{
    uint8_t memory[16 * 1024];
    size_t most = n < sizeof memory ? n : sizeof memory;
    ap_ssl.err_clear();
    int got = ap_ssl.read(s->peer, memory, (int)most);
    if (got <= 0) {
        CHECK_EQ(ap_ssl.get_error(s->peer, got), AP_OSSL_ERROR_WANT_READ);
        return 0;
    }
    pattern_check(memory, stream, from, (size_t)got);
    return (size_t)got;
}

static inline void peer_hears(struct session *s, uint64_t stream, uint64_t from, size_t n)
{
    size_t done = 0;
    MEANWHILE(s, (done += peer_decrypt(s, stream, from + done, n - done)) == n);
}

/* The peer has got a close_notify, and no more data. */
static inline bool peer_was_left(struct session *s)
{
    char byte;
    int got = ap_ssl.read(s->peer, &byte, 1);
    return got <= 0 && ap_ssl.get_error(s->peer, got) == AP_OSSL_ERROR_ZERO_RETURN;
}

/* Reads n bytes of the stream, while the peer goes on. */
static inline void hear(struct session *s, uint64_t stream, uint64_t from, size_t n)
{
    struct link *l = &s->l;
    int64_t rc;
    while ((rc = want(l, n)) == -EAGAIN)
        MEANWHILE(s, told(s, AP_MAIL_READ));
    CHECK_EQ(rc, 0);
    pattern_check(link_at(l), stream, from, n);
    l->pos += (uint32_t)n;
}

/* Sends n bytes of the stream; they stay in memory that the caller frees. */
static inline uint8_t *tell(struct session *s, uint64_t stream, uint64_t from, size_t n)
{
    uint8_t *bytes = pattern_make(stream, from, n);
    CHECK_OK(ap_conn_write(s->l.conn, (char *)bytes, n));
    return bytes;
}

/* A read that ends so. */
static inline void ends_with(struct session *s, int64_t result)
{
    int64_t rc;
    while ((rc = want(&s->l, 1)) == -EAGAIN)
        MEANWHILE(s, told(s, AP_MAIL_READ));
    CHECK_EQ(rc, result);
}

/* ---- tests --------------------------------------------------------------- */

/* A test of one open session, `s`, in a world of its own, `w`. */
#define SESSION_TEST(name_, version_, server_)                    \
    static void name_##_over(struct world *w, struct session *s); \
    TEST(name_)                                                   \
    {                                                             \
        tls_load();                                               \
        struct world *w = world_open();                           \
        struct session s;                                         \
        session_begin(&s, w, version_, server_);                  \
        name_##_over(w, &s);                                      \
        session_close(&s);                                        \
        world_close(w);                                           \
    }                                                             \
    static void name_##_over(__attribute__((unused)) struct world *w, struct session *s)

/* A connection that is to have a session with the other. */
#define NEW_SESSION_TEST(name_, version_, server_)                \
    static void name_##_over(struct world *w, struct session *s); \
    TEST(name_)                                                   \
    {                                                             \
        tls_load();                                               \
        struct world *w = world_open();                           \
        struct session s;                                         \
        session_open(&s, w, AP_TCP, version_, server_);           \
        name_##_over(w, &s);                                      \
        session_close(&s);                                        \
        world_close(w);                                           \
    }                                                             \
    static void name_##_over(__attribute__((unused)) struct world *w, struct session *s)

#endif
