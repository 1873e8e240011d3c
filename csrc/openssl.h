/* The libssl that `_ssl` has loaded: its functions, as a table of pointers. */
#ifndef ANYPOLL_OPENSSL_H
#define ANYPOLL_OPENSSL_H

#include "common.h"

/* The tags are OpenSSL's own, and nothing is known of what is behind them. */
typedef struct ssl_st ap_ossl_ssl;
typedef struct ssl_ctx_st ap_ossl_ctx;
typedef struct bio_st ap_ossl_bio;
typedef struct bio_method_st ap_ossl_method;

/* SSL_get_error */
enum { AP_OSSL_ERROR_SSL = 1, AP_OSSL_ERROR_WANT_READ = 2, AP_OSSL_ERROR_ZERO_RETURN = 6 };

/* Commands of SSL_ctrl, and modes: SSL_set_mode(ssl, mode) is SSL_ctrl(ssl, MODE, mode, NULL). */
enum { AP_OSSL_CTRL_MODE = 33, AP_OSSL_CTRL_CLEAR_MODE = 78 };
enum {
    AP_OSSL_MODE_PARTIAL_WRITE = 0x1,
    AP_OSSL_MODE_MOVING_BUFFER = 0x2,
    AP_OSSL_MODE_AUTO_RETRY = 0x4,
    AP_OSSL_MODE_RELEASE_BUFFERS = 0x10
};

/* An option: a peer that asks for another handshake is refused (RFC 5246, 7.2.2). */
#define AP_OSSL_OP_NO_RENEGOTIATION ((uint64_t)1 << 30)

/* Bits of a verify mode. */
enum { AP_OSSL_VERIFY_PEER = 1, AP_OSSL_VERIFY_REQUIRE = 2 };

/* BIO_get_new_index() or'ed with this is the type of a BIO that is a source and a sink. */
enum { AP_OSSL_BIO_SOURCE_SINK = 0x400 };

/* BIO_set_flags: BIO_set_retry_read() is READ | RETRY, and
 * BIO_clear_retry_flags() clears all of them. */
enum { AP_OSSL_BIO_READ = 1, AP_OSSL_BIO_RETRY = 8, AP_OSSL_BIO_RETRY_FLAGS = 15 };

/* Commands that a BIO is asked. */
enum {
    AP_OSSL_BIO_CTRL_FLUSH = 11,
    AP_OSSL_BIO_CTRL_DUP = 12,
};

/* F(name in the table, result, OpenSSL's name, parameters). All are functions, not macros, from
 * 1.1.1 to 3.x, with these parameters; an option set is 64 bits wide since 3.0, and a long before,
 * which is the same here (ap_tls_load). */
#define AP_OPENSSL_FUNCTIONS(F)                                                                \
    F(up_ref, int, SSL_up_ref, (ap_ossl_ssl *))                                                \
    F(free, void, SSL_free, (ap_ossl_ssl *))                                                   \
    F(set_bio, void, SSL_set_bio, (ap_ossl_ssl *, ap_ossl_bio *, ap_ossl_bio *))               \
    F(do_handshake, int, SSL_do_handshake, (ap_ossl_ssl *))                                    \
    F(read, int, SSL_read, (ap_ossl_ssl *, void *, int))                                       \
    F(write, int, SSL_write, (ap_ossl_ssl *, const void *, int))                               \
    F(shutdown, int, SSL_shutdown, (ap_ossl_ssl *))                                            \
    F(pending, int, SSL_pending, (const ap_ossl_ssl *))                                        \
    F(has_pending, int, SSL_has_pending, (const ap_ossl_ssl *))                                \
    F(set_read_ahead, void, SSL_set_read_ahead, (ap_ossl_ssl *, int))                          \
    F(ctrl, long, SSL_ctrl, (ap_ossl_ssl *, int, long, void *))                                \
    F(get_error, int, SSL_get_error, (const ap_ossl_ssl *, int))                               \
    F(get_shutdown, int, SSL_get_shutdown, (const ap_ossl_ssl *))                              \
    F(is_init_finished, int, SSL_is_init_finished, (const ap_ossl_ssl *))                      \
    F(session_reused, int, SSL_session_reused, (const ap_ossl_ssl *))                          \
    F(get_verify_result, long, SSL_get_verify_result, (const ap_ossl_ssl *))                   \
    F(get_verify_mode, int, SSL_get_verify_mode, (const ap_ossl_ssl *))                        \
    F(get_options, uint64_t, SSL_get_options, (const ap_ossl_ssl *))                           \
    F(set_options, uint64_t, SSL_set_options, (ap_ossl_ssl *, uint64_t))                       \
    F(get_ctx, ap_ossl_ctx *, SSL_get_SSL_CTX, (const ap_ossl_ssl *))                          \
    F(ctx_get_options, uint64_t, SSL_CTX_get_options, (const ap_ossl_ctx *))                   \
    F(ctx_get_verify_mode, int, SSL_CTX_get_verify_mode, (const ap_ossl_ctx *))                \
    F(err_clear, void, ERR_clear_error, (void))                                                \
    F(err_peek, unsigned long, ERR_peek_error, (void))                                         \
    F(err_peek_last, unsigned long, ERR_peek_last_error, (void))                               \
    F(err_reason, const char *, ERR_reason_error_string, (unsigned long))                      \
    F(verify_text, const char *, X509_verify_cert_error_string, (long))                        \
    F(bio_new_index, int, BIO_get_new_index, (void))                                           \
    F(bio_method_new, ap_ossl_method *, BIO_meth_new, (int, const char *))                     \
    F(bio_method_free, void, BIO_meth_free, (ap_ossl_method *))                                \
    F(bio_method_read, int, BIO_meth_set_read,                                                 \
      (ap_ossl_method *, int (*)(ap_ossl_bio *, char *, int)))                                 \
    F(bio_method_write, int, BIO_meth_set_write,                                               \
      (ap_ossl_method *, int (*)(ap_ossl_bio *, const char *, int)))                           \
    F(bio_method_ctrl, int, BIO_meth_set_ctrl,                                                 \
      (ap_ossl_method *, long (*)(ap_ossl_bio *, int, long, void *)))                          \
    F(bio_method_create, int, BIO_meth_set_create, (ap_ossl_method *, int (*)(ap_ossl_bio *))) \
    F(bio_new, ap_ossl_bio *, BIO_new, (const ap_ossl_method *))                               \
    F(bio_free, int, BIO_free, (ap_ossl_bio *))                                                \
    F(bio_up_ref, int, BIO_up_ref, (ap_ossl_bio *))                                            \
    F(bio_set_data, void, BIO_set_data, (ap_ossl_bio *, void *))                               \
    F(bio_get_data, void *, BIO_get_data, (ap_ossl_bio *))                                     \
    F(bio_set_init, void, BIO_set_init, (ap_ossl_bio *, int))                                  \
    F(bio_set_flags, void, BIO_set_flags, (ap_ossl_bio *, int))                                \
    F(bio_clear_flags, void, BIO_clear_flags, (ap_ossl_bio *, int))                            \
    F(version_num, unsigned long, OpenSSL_version_num, (void))                                 \
    F(version, const char *, OpenSSL_version, (int))

#define AP_OPENSSL_FIELD(name, result, symbol, parameters) result(*name) parameters;
typedef struct {
    AP_OPENSSL_FUNCTIONS(AP_OPENSSL_FIELD)
} ap_openssl;
#undef AP_OPENSSL_FIELD

/* Written once, by the first ap_tls_load that succeeds. Who has been given an SSL object, by
 * whatever way, reads it without further ado: that load came before. */
extern ap_openssl ap_ssl;

/* For the child of a fork: a lock that another thread held is open again. */
void ap_tls_reset(void);

#endif
