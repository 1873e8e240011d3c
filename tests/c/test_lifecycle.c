/* lifecycle.c: opening, lingering, closing. */
#include "fixture.h"

#include <pthread.h>

/* ---- opening ---------------------------------------------------------- */

TEST(connection_register_reports_each)
{
    struct world *w = world_open();
    int fds[2], file = open("/dev/null", O_RDONLY | O_CLOEXEC), results[3] = {1, 1, 1};
    sockets_of(AP_UNIX, fds);
    ap_conn *conns[3];
    CHECK_OK(ap_conn_new(w->poller, w->hub, fds[0], AP_UNIX, HIGH, &conns[0]));
    CHECK_OK(ap_conn_new(w->poller, w->hub, file, AP_UNIX, HIGH, &conns[1])); /* no epoll there */
    CHECK_OK(ap_conn_new(w->poller, w->hub, fds[1], AP_UNIX, HIGH, &conns[2]));
    CHECK_EQ(ap_conn_register(conns, results, 3), 1);
    CHECK_EQ(results[0], 0);
    CHECK_EQ(results[1], -EPERM);
    CHECK_EQ(results[2], 0);
    for (int i = 0; i < 3; i++)
        ap_conn_release(conns[i]);
    world_close(w);
}

/* L26: no slot, no descriptor, no counter is left of one that failed. */
TEST(connection_new_without_memory)
{
    struct world *w = world_open();
    int fds[2];
    sockets_of(AP_UNIX, fds);
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, -1, 0));
    ap_conn *conn;
    int rc = ap_conn_new(w->poller, w->hub, fds[0], AP_UNIX, HIGH, &conn);
    ap_fault_clear();
    CHECK_EQ(rc, -ENOMEM); /* the table's first chunk */
    CHECK_EQ(stats(w).slots, 0);
    struct link l = link_fd(w, AP_UNIX, HIGH, fds[0], fds[1]);
    link_close(&l);
    world_close(w);
}

/* ---- lingering -------------------------------------------------------- */

LINK_TEST(linger_has_nothing_to_do, STREAMS, HIGH)
{
    CHECK_EQ(ap_conn_write(l->conn, "bye", 3), 0);
    char got[3];
    UNTIL(w, unread_in_kernel(l->peer) == 3);
    CHECK_EQ(recv(l->peer, got, 3, 0), 3);
    /* not 40 ms for the acknowledgement: SIOCOUTQNSD, and not SIOCOUTQ (measured) */
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0);
}

/* Measured: with SIOCOUTQ, which counts what only waits for its acknowledgement, every close took
 * 40 ms. */
LINK_TEST(linger_does_not_wait_for_acknowledgements, TCP, HIGH)
{
    int off = 0, unacknowledged = 0;
    for (uint64_t i = 0; i < 200 && !unacknowledged; i++) {
        peer_say(l, 1, i * 10, 10); /* a peer that talks delays its acknowledgements */
        expect(l, 1, i * 10, 10);
        setsockopt(l->peer, IPPROTO_TCP, TCP_QUICKACK, &off, sizeof off);
        CHECK_EQ(ap_conn_write(l->conn, "x", 1), 0);
        ioctl(l->fd, TIOCOUTQ, &unacknowledged);
    }
    if (!unacknowledged)
        SKIP("every byte is acknowledged at once here");
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0);
}

/* A peer that sends and sends before it reads. With a plain close its unread bytes turn into a
 * RST that destroys what it has not yet read: 127,574 of 1,000,000 bytes arrived (measured). */
struct talker {
    int fd;
    size_t heard;
    bool reset;
};

static void *talk_and_then_listen(void *arg)
{
    struct talker *t = arg;
    static char junk[100 * 1024], buffer[64 * 1024];
    size_t said = 0;
    fcntl(t->fd, F_SETFL, 0);
    while (said < 3 * MB) {
        ssize_t n = send(t->fd, junk, sizeof junk, MSG_NOSIGNAL);
        if (n <= 0)
            break;
        said += (size_t)n;
    }
    ssize_t got;
    while ((got = recv(t->fd, buffer, sizeof buffer, 0)) > 0) {
        pattern_check(buffer, 1, t->heard, (size_t)got);
        t->heard += (size_t)got;
    }
    t->reset = got < 0;
    close(t->fd);
    return NULL;
}

LINK_TEST(linger_loses_no_byte, TCP, HIGH)
{
    size_t n = MB;
    uint8_t *data = pattern_make(1, 0, n);
    struct talker t = {.fd = l->peer};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, talk_and_then_listen, &t) == 0);
    if (ap_conn_write(l->conn, (char *)data, n) > 0)
        await(w, l->id, AP_MAIL_SENT);
    arrived(l, 1); /* something is unread */
    int rc = ap_conn_linger(l->conn, l->pos, 0);
    CHECK_EQ(rc, -EAGAIN);
    CHECK_EQ(ap_conn_status(l->conn) & AP_IS_SHUT, AP_IS_SHUT);
    await(w, l->id, AP_MAIL_READ); /* the peer closes after it has seen our end */
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0);
    pthread_join(thread, NULL);
    l->peer = -1;
    CHECK_EQ(t.heard, n);
    CHECK(!t.reset);
    CHECK_EQ(bytes_in_use(w), 0); /* what was thrown away took no memory */
    free(data);
}

LINK_TEST(linger_deadline, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    arrived(l, 100);
    int64_t deadline, rc;
    do { /* until it is in time */
        deadline = ap_now() + 5 * MS;
        rc = ap_conn_linger(l->conn, l->pos, deadline);
    } while (rc == AP_ELATE);
    CHECK_EQ(rc, -EAGAIN);
    await(w, l->id, AP_MAIL_READ);
    CHECK(ap_now() >= deadline);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, deadline), AP_ELATE);
    peer_expect_eof(l);
}

LINK_TEST(linger_after_the_end, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    peer_close(l);
    expect(l, 1, 0, 50);
    CHECK_EQ(want_wait(l, 100), AP_EEOF);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0); /* all was read, and nothing more comes */
}

LINK_TEST(linger_ends_with_a_reset, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    arrived(l, 100);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), -EAGAIN);
    settle(w);
    peer_reset(l);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0);
}

/* ---- closing ---------------------------------------------------------- */

/* AnyIO: the descriptor is closed when aclose() returns, and the peer sees it. */
LINK_TEST(connection_close_is_immediate, STREAMS, HIGH)
{
    CHECK_EQ(want_until(l, 1, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    settle(w);
    int fd = l->fd;
    CHECK_OK(ap_conn_close(l->conn, 0, 0));
    CHECK(fcntl(fd, F_GETFD) < 0);
    peer_expect_eof(l);
    settle(w);
    CHECK_EQ(w->poller->wheel.filed, 0); /* its deadline went with it */
    CHECK_EQ(mail_of(w, l->id), 0);
}

/* L13: a second close finds nothing to do, whoever has the number now (O4, L30). */
TEST(connection_closes_once)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    int fd = l.fd, other[2];
    CHECK_OK(ap_conn_close(l.conn, 0, 0));
    sockets_of(AP_UNIX, other);
    CHECK_EQ(other[0], fd);
    CHECK_EQ(ap_conn_close(l.conn, 0, 0), -EBADF);
    CHECK_EQ(ap_conn_close(l.conn, 1, 1), -EBADF);
    ap_conn_release(l.conn);
    CHECK(fcntl(fd, F_GETFD) >= 0);
    l.conn = NULL;
    peer_close(&l);
    close(other[0]);
    close(other[1]);
    world_close(w);
}

LINK_TEST(connection_disowned_descriptor, UNIX, HIGH)
{
    CHECK_EQ(ap_conn_fd(l->conn, 0), l->fd);
    CHECK_EQ(ap_conn_fd(l->conn, 1), l->fd);
    CHECK_EQ(ap_conn_close(l->conn, 0, 1), l->fd);
    CHECK_EQ(ap_conn_fd(l->conn, 0), -EBADF);
    close(l->fd);
}

/* A handle that is dropped without a close leaves a disowned descriptor open. */
TEST(connection_release_keeps_a_disowned_descriptor)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(ap_conn_fd(l.conn, 1), l.fd);
    ap_conn_release(l.conn);
    l.conn = NULL;
    CHECK(fcntl(l.fd, F_GETFD) >= 0);
    close(l.fd);
    peer_close(&l);
    settle(w);
    CHECK_EQ(stats(w).slots, 0);
    world_close(w);
}

/* What was consumed in the window counts for what is unread. */
LINK_TEST(linger_knows_what_was_consumed, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    CHECK_EQ(want_wait(l, 100), 0);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), -EAGAIN);
    link_close(l);

    *l = link_open(w, AP_TCP, HIGH);
    peer_say(l, 1, 0, 100);
    expect(l, 1, 0, 100);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0);
}

/* The poller lives as long as its slots, whatever order they go in. */
TEST(connection_outlives_the_handles_of_poller_and_hub)
{
    ap_poller *poller;
    ap_hub *hub;
    ap_conn *conn;
    int fds[2];
    CHECK_OK(ap_poller_new(&poller));
    CHECK_OK(ap_hub_new(&hub));
    sockets_of(AP_UNIX, fds);
    CHECK_OK(ap_conn_new(poller, hub, fds[0], AP_UNIX, HIGH, &conn));
    ap_hub_unref(hub);
    CHECK_EQ(ap_conn_write(conn, "x", 1), 0);
    ap_conn_release(conn);
    CHECK_OK(ap_poller_step(poller, 0, BUDGET)); /* the driver lets go */
    ap_poller_unref(poller);
    close(fds[1]);
}
