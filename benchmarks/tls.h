/* The load generator's connections with TLS 1.3: a channel is an SSL object and its socket.
 *
 * The handshake is part of the first send and of the receives that follow: until it is complete,
 * they say EAGAIN. A channel that is closed in good order says so to the server with a
 * close_notify, and does not wait for the answer. The certificate is not compared with anything;
 * its signature of the handshake is verified all the same.
 *
 * With --resume each connection takes up the session of the one in whose place it comes. It fails
 * if the server has given no ticket, or does not take the one it gave: a full handshake is never
 * taken for a resumed one.
 */
#ifndef BENCH_TLS_H
#define BENCH_TLS_H

#include "options.h"
#include "sockets.h"

#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdbool.h>
#include <string.h>

struct channel {
    SSL *ssl;
    SSL_SESSION *session; /* the newest, with --resume; outlives the connection */
    bool is_opened_again;
    bool is_checked; /* whether it was resumed as it should be */
};

static SSL_CTX *tls_context;
static bool tls_resumes;

static int tls_keep_session(SSL *ssl, SSL_SESSION *session)
{
    struct channel *channel = SSL_get_app_data(ssl);
    SSL_SESSION_free(channel->session);
    channel->session = session;
    return 1; /* the reference is ours now */
}

static void channel_prepare(const struct options *opt)
{
    tls_resumes = opt->resume;
    tls_context = SSL_CTX_new(TLS_client_method());
    /* One group, which all OpenSSLs have: the default of 3.5 is a dearer one. */
    if (tls_context == NULL || !SSL_CTX_set_min_proto_version(tls_context, TLS1_3_VERSION) ||
        !SSL_CTX_set1_groups_list(tls_context, "X25519"))
        die("OpenSSL: %s", ERR_reason_error_string(ERR_get_error()));
    SSL_CTX_set_verify(tls_context, SSL_VERIFY_NONE, NULL);
    SSL_CTX_set_mode(tls_context, SSL_MODE_ENABLE_PARTIAL_WRITE |
                                      SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                                      SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_read_ahead(tls_context, 1); /* a record costs one recv, not two */
    SSL_CTX_set_session_cache_mode(tls_context,
                                   (tls_resumes ? SSL_SESS_CACHE_CLIENT : SSL_SESS_CACHE_OFF) |
                                       SSL_SESS_CACHE_NO_INTERNAL_STORE);
    if (tls_resumes)
        SSL_CTX_sess_set_new_cb(tls_context, tls_keep_session);
}

static void channel_open(struct channel *channel, int fd)
{
    channel->ssl = SSL_new(tls_context);
    if (channel->ssl == NULL || !SSL_set_fd(channel->ssl, fd))
        die("out of memory");
    SSL_set_app_data(channel->ssl, channel);
    SSL_set_connect_state(channel->ssl);
    if (channel->session != NULL)
        SSL_set_session(channel->ssl, channel->session);
    channel->is_checked = !tls_resumes || !channel->is_opened_again;
    channel->is_opened_again = true;
}

static void channel_close(struct channel *channel)
{
    int fd = SSL_get_fd(channel->ssl);
    ERR_clear_error();
    if (SSL_is_init_finished(channel->ssl))
        SSL_shutdown(channel->ssl); /* fails, and harmlessly, after an error */
    SSL_free(channel->ssl);
    close(fd);
}

/* What the socket's call would have returned, for a result of OpenSSL's. */
static ssize_t tls_result(struct channel *channel, int result)
{
    if (!channel->is_checked && SSL_is_init_finished(channel->ssl)) {
        channel->is_checked = true;
        if (!SSL_session_reused(channel->ssl)) {
            fputs("load: a session was not resumed\n", stderr);
            errno = EPROTO;
            return -1;
        }
    }
    if (result > 0)
        return result;
    switch (SSL_get_error(channel->ssl, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE: errno = EAGAIN; return -1;
    case SSL_ERROR_ZERO_RETURN: return 0;
    case SSL_ERROR_SYSCALL:
        if (errno != 0 && errno != EAGAIN && errno != EINTR)
            return -1; /* it is the socket's */
        break;
    default: break;
    }
    errno = EPROTO;
    return -1;
}

/* What an earlier call has left must not be taken for this one's. */
static void tls_clear_errors(void)
{
    ERR_clear_error();
    errno = 0;
}

/* The first piece only: the next call has the other. */
static ssize_t channel_send(struct channel *channel, struct iovec *pieces, int count)
{
    (void)count;
    tls_clear_errors();
    int size = pieces[0].iov_len < INT32_MAX ? (int)pieces[0].iov_len : INT32_MAX;
    return tls_result(channel, SSL_write(channel->ssl, pieces[0].iov_base, size));
}

static ssize_t channel_receive(struct channel *channel, void *buffer, size_t size)
{
    tls_clear_errors();
    return tls_result(channel, SSL_read(channel->ssl, buffer, (int)size));
}

static bool channel_has_more(const struct channel *channel)
{
    return SSL_has_pending(channel->ssl) == 1;
}

static bool channel_wants_room(const struct channel *channel)
{
    return SSL_want_write(channel->ssl);
}

static const char *channel_error(void)
{
    const char *reason = errno == EPROTO ? ERR_reason_error_string(ERR_peek_error()) : NULL;
    return reason != NULL ? reason : strerror(errno);
}

#endif
