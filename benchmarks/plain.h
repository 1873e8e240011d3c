/* The load generator's connections without TLS: a channel is a socket.
 *
 * `tls.h` has the same functions. Those that return ssize_t do what send and recv do, errno
 * included.
 */
#ifndef BENCH_PLAIN_H
#define BENCH_PLAIN_H

#include "options.h"
#include "sockets.h"

#include <stdbool.h>
#include <string.h>

struct channel {
    int fd;
};

static void channel_prepare(const struct options *opt)
{
    if (opt->resume)
        die("--resume is an option of load_tls");
}

/* `fd` is a connected, non-blocking socket, which belongs to the channel from now on. */
static void channel_open(struct channel *channel, int fd)
{
    channel->fd = fd;
}

static void channel_close(struct channel *channel)
{
    close(channel->fd);
}

static ssize_t channel_send(struct channel *channel, struct iovec *pieces, int count)
{
    if (count == 1) /* the usual case, and the cheaper call */
        return send(channel->fd, pieces[0].iov_base, pieces[0].iov_len, MSG_NOSIGNAL);
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)count};
    return sendmsg(channel->fd, &message, MSG_NOSIGNAL);
}

static ssize_t channel_receive(struct channel *channel, void *buffer, size_t size)
{
    return recv(channel->fd, buffer, size, 0);
}

/* Whether more can be received of which the socket knows nothing. */
static bool channel_has_more(const struct channel *channel)
{
    (void)channel;
    return false;
}

/* After a send that was not complete: whether it waits for room in the socket. */
static bool channel_wants_room(const struct channel *channel)
{
    (void)channel;
    return true;
}

/* What was wrong with the last call that returned -1. */
static const char *channel_error(void)
{
    return strerror(errno);
}

#endif
