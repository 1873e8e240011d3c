/* unix.c: descriptors go out as copies, and messages stay whole. */
#include "probes.h"

#include <pthread.h>

/* ---- sending ------------------------------------------------------------------ */

/* Receives at the other end; returns the bytes, and how many descriptors came. */
static ssize_t peer_take(struct link *l, void *data, size_t n, int *count)
{
    struct iovec into = {.iov_base = data, .iov_len = n};
    ap_rights rights;
    size_t offered = n;
    ssize_t got = ap_sys_recv_rights(l->peer, &into, 1, &offered, &rights);
    *count = rights.count;
    for (int i = 0; i < rights.count; i++)
        ap_sys_close(rights.fds[i]);
    return got;
}

LINK_TEST(unix_descriptors_are_sent_as_copies, UNIX, HIGH)
{
    int fds[] = {0, 1, 2}, count;
    char text[8];
    CHECK_EQ(ap_conn_send_fds(l->conn, "hello", 5, fds, 3), 5);
    CHECK_EQ(peer_take(l, text, 8, &count), 5);
    CHECK_EQ(count, 3);
    CHECK_EQ(link_stats(l).bytes_sent, 5);
    CHECK_EQ(ap_conn_send_fds(l->conn, "", 0, fds, 1), -EINVAL);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, -1), -EINVAL);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, AP_FDS_MOST + 1), -EINVAL);
    fds[1] = 1000;
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, 3), -EBADF);
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), 0); /* that was not the connection's fault */
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, EINTR, 0, 9, 0));
    fds[1] = 1;
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, 3), 1);
    peer_close(l);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, 3), -EPIPE);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, 3), -EPIPE);
    CHECK(ap_conn_status(l->conn) & AP_IS_BROKEN);
    ap_fault_clear();
    CHECK_EQ(ap_conn_close(l->conn, 0, 0), 0);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, fds, 3), -EBADF);
}

LINK_TEST(unix_descriptors_wait_for_room_and_for_what_is_queued, UNIX, HIGH)
{
    size_t big = 4 * MB;
    uint8_t *data = pattern_make(1, 0, big);
    int fd = 0, count;
    CHECK(ap_conn_write(l->conn, (char *)data, big) > 0);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, &fd, 1), -EAGAIN);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
    peer_expect(l, 1, 0, big);
    await(w, l->id, AP_MAIL_WRITE);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, &fd, 1), 1);
    char byte;
    CHECK_EQ(peer_take(l, &byte, 1, &count), 1);
    CHECK_EQ(count, 1);

    int64_t sent = ap_conn_send_fds(l->conn, (char *)data, big, &fd, 1);
    CHECK(sent > 0 && sent <= (int64_t)(256 * KB)); /* one bounded call */
    while (sent > 0)
        sent = ap_conn_send_fds(l->conn, (char *)data, big, &fd, 1);
    CHECK_EQ(sent, -EAGAIN);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
    while (peer_take(l, data, big, &count) > 0)
        ;
    await(w, l->id, AP_MAIL_WRITE);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), 0);
    CHECK_OK(ap_conn_shutdown(l->conn));
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, &fd, 1), -EPIPE);
    free(data);
}

/* ---- messages ------------------------------------------------------------------ */

struct message {
    int64_t size;
    char text[16];
    int fds[AP_FDS_MOST];
    int count;
};

static struct message receive_at_most(struct link *l, size_t max, int room)
{
    struct message m = {.count = room};
    ap_view view;
    m.size = ap_conn_receive(l->conn, max, 0, &view, m.fds, &m.count);
    if (m.size >= 0) {
        CHECK_EQ(view.end - view.start, m.size);
        memcpy(m.text, ap_block_at(view.block, view.start),
               m.size < 16 ? (size_t)m.size : sizeof m.text);
        ap_block_unref(view.block);
    }
    return m;
}

static int64_t receive(struct link *l, size_t max)
{
    return receive_at_most(l, max, 0).size;
}

LINK_TEST(unix_messages_keep_their_boundaries_and_stay_in_the_kernel, MESSAGES, HIGH)
{
    CHECK_EQ(receive(l, 100), -EAGAIN);
    peer_send(l, "abc", 3);
    peer_send(l, "defgh", 5);
    peer_send(l, "i", 1);
    await(w, l->id, AP_MAIL_READ);
    settle(w);
    CHECK_EQ(unread_in_kernel(l->fd), 9);
    CHECK_EQ(buffered(l), 0);
    CHECK_EQ(receive(l, 100), 3);
    struct message cut = receive_at_most(l, 2, 0);
    CHECK_EQ(cut.size, 2);
    CHECK_BYTES(cut.text, "de", 2);
    CHECK_BYTES(receive_at_most(l, 100, 0).text, "i", 1);
    CHECK_EQ(receive(l, 100), -EAGAIN);
    CHECK_EQ(link_stats(l).bytes_received, 6);
    CHECK_EQ(w->tokens, 1);
    peer_close(l);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(receive(l, 100), AP_EEOF);
    CHECK_EQ(receive(l, 100), AP_EEOF);
    CHECK(ap_conn_status(l->conn) & AP_IS_EOF);
}

LINK_TEST(unix_a_large_message_is_one, MESSAGES, HIGH)
{
    size_t big = 150 * KB;
    int count;
    uint8_t *data = pattern_make(1, 0, big);
    CHECK_EQ(ap_conn_send_fds(l->conn, (char *)data, big, NULL, 0), big);
    CHECK_EQ(peer_take(l, data, big, &count), big);
    peer_send(l, data, big);
    CHECK_EQ(receive(l, MB), big);
    int64_t sent;
    int messages = 0;
    while ((sent = ap_conn_send_fds(l->conn, (char *)data, big, NULL, 0)) > 0) {
        CHECK_EQ(sent, big); /* never a part of one */
        messages++;
    }
    CHECK_EQ(sent, -EAGAIN);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
    for (; messages > 0; messages--)
        CHECK_EQ(peer_take(l, data, big, &count), big);
    await(w, l->id, AP_MAIL_WRITE);
    free(data);
    data = calloc(1, 8 * MB);
    CHECK_EQ(ap_conn_send_fds(l->conn, (char *)data, 8 * MB, NULL, 0), -EMSGSIZE);
    CHECK_EQ(ap_conn_send_fds(l->conn, "x", 1, NULL, 0), 1);
    free(data);
}

LINK_TEST(unix_messages_bring_descriptors, MESSAGES, HIGH)
{
    struct probe p = peer_send_probes(l, "abc", 3), none = peer_send_probe(l, "d");
    struct message m = receive_at_most(l, 100, 2);
    CHECK_EQ(m.size, 3);
    CHECK_EQ(m.count, 2);
    close(m.fds[0]);
    close(m.fds[1]);
    probe_end(p);
    CHECK_EQ(receive(l, 100), 1); /* does not ask for them */
    probe_end(none);
    p = peer_send_probe(l, "never taken");
    settle(w);
    link_close(l);
    probe_end(p);
}

LINK_TEST(unix_an_empty_message_is_not_the_end_for_ever, MESSAGES, HIGH)
{
    CHECK_EQ(send(l->peer, "", 0, 0), 0);
    peer_send(l, "x", 1);
    peer_close(l);
    CHECK_EQ(receive(l, 100), AP_EEOF);
    CHECK_EQ(ap_conn_status(l->conn) & AP_IS_EOF, 0);
    CHECK_EQ(receive(l, 0), 0); /* cut off to nothing */
    CHECK_EQ(receive(l, 100), AP_EEOF);
    CHECK(ap_conn_status(l->conn) & AP_IS_EOF);
}

#define MANY ROUNDS(60000)

struct sender {
    int peer;
    _Atomic int received;
};

/* Sends the next message a moment after the last one was received. */
static void *send_messages(void *arg)
{
    struct sender *s = arg;
    for (int i = 0; i < MANY; i++) {
        while (atomic_load(&s->received) < i)
            ;
        for (volatile int moment = 0; moment < i % 1000; moment++)
            ;
        CHECK_EQ(send(s->peer, "12345678", 8, MSG_NOSIGNAL), 8);
    }
    return NULL;
}

/* Room is made for the message that is there; one that comes a moment later, when there was none,
 * must not be cut off to nothing. */
LINK_TEST(unix_a_message_that_comes_at_any_moment_is_whole, MESSAGES, HIGH)
{
    struct sender s = {.peer = l->peer};
    world_start(w);
    pthread_t sender;
    CHECK(pthread_create(&sender, NULL, send_messages, &s) == 0);
    while (s.received < MANY) {
        int64_t size = receive(l, MB);
        if (size == -EAGAIN)
            await(w, l->id, AP_MAIL_READ);
        else
            CHECK_EQ(size, 8);
        atomic_fetch_add(&s.received, size == 8);
    }
    pthread_join(sender, NULL);
    world_stop(w);
}

/* Where the kernel tells a reset first when it is asked for a length. */
LINK_TEST(unix_large_messages_before_a_reset_are_readable_first, MESSAGES, HIGH)
{
    CHECK_EQ(ap_conn_send_fds(l->conn, "unread", 6, NULL, 0), 6);
    peer_send(l, "ab", 2);
    peer_close(l);
    settle(w);
    CHECK_EQ(receive(l, MB), 2);
    CHECK_EQ(receive(l, MB), -ECONNRESET);
    CHECK(ap_conn_status(l->conn) & AP_IS_BROKEN);
    link_close(l);
    *l = link_open(w, AP_SEQPACKET, HIGH);
    CHECK_EQ(receive(l, MB), -EAGAIN);
    CHECK_EQ(send(l->peer, "", 0, 0), 0);
    peer_close(l);
    settle(w);
    CHECK_EQ(receive(l, MB), AP_EEOF);
    CHECK_EQ(receive(l, MB), AP_EEOF);
    CHECK(ap_conn_status(l->conn) & AP_IS_EOF);
}

/* The kernel tells the reset first; what came before it must not be lost. */
LINK_TEST(unix_messages_before_a_reset_are_readable_first, MESSAGES, HIGH)
{
    CHECK_EQ(ap_conn_send_fds(l->conn, "unread", 6, NULL, 0), 6);
    peer_send(l, "ab", 2);
    peer_send(l, "c", 1);
    peer_close(l); /* with unread input: a reset */
    settle(w);
    CHECK_EQ(receive(l, 100), 2);
    CHECK_EQ(receive(l, 100), 1);
    CHECK_EQ(receive(l, 100), -ECONNRESET);
    CHECK_EQ(receive(l, 100), -ECONNRESET);
    CHECK(ap_conn_status(l->conn) & AP_IS_BROKEN);
}

LINK_TEST(unix_a_wait_for_a_message_ends, MESSAGES, HIGH)
{
    ap_view view;
    int count = 0;
    int64_t soon, rc;
    do { /* until it is in time */
        soon = ap_now() + 20 * MS;
        rc = ap_conn_receive(l->conn, 9, soon, &view, NULL, &count);
    } while (rc == AP_ELATE);
    CHECK_EQ(rc, -EAGAIN);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_receive(l->conn, 9, soon, &view, NULL, &count), AP_ELATE);
    peer_send(l, "x", 1); /* at the tie data wins */
    settle(w);
    CHECK_EQ(receive(l, 9), 1);
    CHECK_EQ(receive(l, 9), -EAGAIN);
    CHECK_OK(ap_conn_disarm_read(l->conn));
    peer_send(l, "y", 1);
    settle(w);
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_READ, 0);
    CHECK_OK(ap_conn_set_idle(l->conn, 5 * MS));
    await(w, l->id, AP_MAIL_IDLE);
    CHECK_EQ(receive(l, 9), 1); /* what had arrived */
    CHECK_EQ(receive(l, 9), AP_EIDLE);
}

TEST(unix_faults_of_messages)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_SEQPACKET, HIGH);
    peer_send(&l, "abc", 3);
    CHECK_OK(ap_fault_set(AP_CALL_READ, EINTR, 0, 5, 0));
    CHECK_EQ(receive(&l, 9), 3);
    peer_send(&l, "abc", 3);
    CHECK_OK(ap_fault_set(AP_CALL_MAP, ENOMEM, 0, 1, 0));
    CHECK_EQ(receive(&l, 64 * KB), -ENOMEM);
    ap_fault_clear();
    CHECK_EQ(receive(&l, 64 * KB), 3); /* it is still there */
    CHECK_OK(ap_fault_set(AP_CALL_READ, ENOTCONN, 0, 1, 0));
    peer_send(&l, "x", 1);
    settle(w);
    CHECK_EQ(receive(&l, 9), -ENOTCONN);
    ap_fault_clear();
    CHECK_EQ(receive(&l, 9), -ENOTCONN);
    CHECK_EQ(ap_conn_close(l.conn, 0, 0), 0);
    CHECK_EQ(receive(&l, 9), -EBADF);
    link_close(&l);
    world_close(w);

    w = world_open();
    l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(receive(&l, 9), -EINVAL);
    link_close(&l);
    l = link_open(w, AP_TCP, HIGH);
    CHECK_EQ(ap_conn_send_fds(l.conn, "x", 1, NULL, 0), -EINVAL);
    link_close(&l);
    world_close(w);
}

/* The wait for room was given up, and nobody watches for it: output that comes then does. */
LINK_TEST(output_after_a_wait_for_room_was_given_up, UNIX, HIGH)
{
    int64_t took, all = 0;
    static char memory[64 * 1024];
    while ((took = ap_conn_send_fds(l->conn, memory, sizeof memory, NULL, 0)) > 0)
        all += took;
    CHECK_EQ(took, -EAGAIN);
    settle(w);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
    CHECK_OK(ap_conn_disarm_write(l->conn));
    CHECK_EQ(ap_conn_write(l->conn, "abc", 3), 3);
    settle(w);
    for (ssize_t got; all > 0; all -= got) {
        got = recv(l->peer, memory, sizeof memory, MSG_DONTWAIT);
        CHECK(got > 0);
    }
    UNTIL(w, ap_conn_queued(l->conn) == 0);
}
