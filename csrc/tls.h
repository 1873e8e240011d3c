/* A connection's TLS session: OpenSSL between the socket and the plaintext. */
#ifndef ANYPOLL_TLS_H
#define ANYPOLL_TLS_H

#include "bytes.h"
#include "connection.h"
#include "openssl.h"

struct ap_tls {
    ap_ossl_ssl *ssl; /* see held */
    uint8_t phase;    /* (m) AP_TLS_SHAKING ... */
    bool server;      /* (c) */
    bool ragged;      /* (c) a FIN is as good as a close_notify */
    bool stepped;     /* (m) OpenSSL has begun with the handshake */
    bool endless;     /* (m) more has come at once than a handshake has */
    bool resumed;     /* (m) once the handshake is done */
    bool computing;   /* (m) one of those who hold it: a step of the handshake is made */
    bool blocked;     /* (m) nothing can be encrypted before more has come */
    uint32_t held;    /* (m) who uses ssl, with out and in, without the mutex; see tls.c */
    int64_t began;    /* (c) */
    int64_t lasted;   /* (m) the handshake, in nanoseconds */

    /* between OpenSSL and the socket: (m), or of who holds it */
    ap_bytes ahead;    /* ciphertext that has come and that OpenSSL has not seen */
    const uint8_t *in; /* what it sees */
    size_t in_size;
    ap_bytes out;      /* records that it has made and the kernel has not */
    size_t counted;    /* (m) of those, in the connection's out_bytes and own_bytes */
    size_t given_up;   /* (m) of those, the first: nobody waits for them */
    bool no_memory;    /* for them */
    uint8_t header[5]; /* of the record that OpenSSL is seeing */
    uint8_t header_size;
    size_t record_left; /* bytes of it that it has not seen */

    /* why it has failed, all (m) */
    int kind; /* SSL_ERROR_* */
    unsigned long code;
    long verify;
};

/* All of it is under the slot's mutex. */

/* A session for that SSL object, of which it takes a reference. NULL: no memory. */
AP_MUST_CHECK ap_tls *ap_tls_new(ap_ossl_ssl *ssl, int flags);
/* Frees the session of a connection that is closed, or has ended it; or whoever holds it will. */
void ap_tls_drop(ap_conn *conn);
/* Nobody else uses it until it is released. */
void ap_tls_hold(ap_tls *tls);
/* The connection may have been closed meanwhile. */
void ap_tls_release(ap_conn *conn);
/* What OpenSSL has made will never be sent. */
void ap_tls_forget_output(ap_conn *conn);
/* Whether part of a record has come. */
bool ap_tls_has_begun(const ap_tls *tls);
/* Whether the handshake is not done; if only a pause is awaited, whether part of it is under way.
 */
bool ap_tls_is_awaited(const ap_tls *tls, bool until_pause);
void ap_tls_describe(const ap_tls *tls, ap_tls_status *out);

#endif
