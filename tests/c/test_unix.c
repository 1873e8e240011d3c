/* unix.c: descriptors belong to the bytes they came with, none is lost or left, and messages stay
 * whole. */
#include "fixture.h"

#include <pthread.h>
#include <sys/resource.h>
#include <sys/wait.h>

/* ---- descriptors that tell when they are gone --------------------------- */

/* The read end of a pipe; the write end is sent away, and no copy stays. */
struct probe {
    int reading;
};

static void peer_send_fds(struct link *l, const void *data, size_t n, const int *fds, int count)
{
    size_t offered = n;
    CHECK_EQ(ap_sys_send_rights(l->peer, data, &offered, fds, count), n);
}

/* Sends data with count write ends of one pipe. */
static struct probe peer_send_probes(struct link *l, const char *data, int count)
{
    int ends[2], fds[AP_FDS_MOST];
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    for (int i = 0; i < count; i++)
        fds[i] = ends[1];
    peer_send_fds(l, data, strlen(data), fds, count);
    close(ends[1]);
    return (struct probe){.reading = ends[0]};
}

static struct probe peer_send_probe(struct link *l, const char *data)
{
    return peer_send_probes(l, data, 1);
}

/* Whether all copies of the write end are closed. */
static bool gone(struct probe p)
{
    struct pollfd at = {.fd = p.reading, .events = POLLIN};
    return poll(&at, 1, 0) == 1 && (at.revents & POLLHUP);
}

static void probe_end(struct probe p)
{
    CHECK(gone(p));
    close(p.reading);
}

static int open_fds(void)
{
    int n = 0;
    for (int fd = 0; fd < 1024; fd++)
        n += fcntl(fd, F_GETFD) >= 0;
    return n;
}

struct taken {
    char text[64];
    int fds[AP_FDS_MOST];
    int count;
};

static int64_t take_at_most(struct link *l, size_t size, int room, struct taken *out)
{
    out->count = room;
    int64_t n = ap_conn_take_fds(l->conn, l->pos, out->text, size, out->fds, &out->count);
    link_drop_block(l);
    return n;
}

static void expect_taken(struct link *l, size_t size, const char *text, int count)
{
    struct taken t;
    CHECK_EQ(take_at_most(l, size, AP_FDS_MOST, &t), strlen(text));
    CHECK_BYTES(t.text, text, strlen(text));
    CHECK_EQ(t.count, count);
    for (int i = 0; i < t.count; i++) {
        CHECK(fcntl(t.fds[i], F_GETFD) & FD_CLOEXEC);
        close(t.fds[i]);
    }
}

static void arrive(struct link *l, int64_t n)
{
    UNTIL(l->w, buffered(l) == n);
}

/* ---- which call gets them ----------------------------------------------- */

LINK_TEST(unix_descriptors_go_to_the_call_that_takes_a_byte_of_theirs, UNIX, HIGH)
{
    struct probe p = peer_send_probes(l, "hello", 3);
    arrive(l, 5);
    expect_taken(l, 2, "he", 3);
    CHECK(gone(p));
    expect_taken(l, 9, "llo", 0);
    probe_end(p);
}

LINK_TEST(unix_earlier_bytes_of_the_same_call_are_theirs_too, UNIX, HIGH)
{
    peer_send(l, "ab", 2);
    struct probe p = peer_send_probe(l, "cd");
    peer_send(l, "ef", 2);
    settle(w);
    CHECK_EQ(buffered(l), 4); /* the kernel glues in front, and stops behind */
    expect_taken(l, 1, "a", 1);
    probe_end(p);
    arrive(l, 5);
    expect_taken(l, 9, "bcdef", 0);
}

LINK_TEST(unix_bytes_of_an_earlier_call_are_not_theirs, UNIX, HIGH)
{
    peer_send(l, "ab", 2);
    arrive(l, 2);
    struct probe p = peer_send_probe(l, "cd");
    arrive(l, 4);
    expect_taken(l, 2, "ab", 0);
    expect_taken(l, 0, "", 1); /* the next byte is theirs */
    probe_end(p);
    expect_taken(l, 9, "cd", 0);
}

LINK_TEST(unix_descriptors_beyond_the_room_are_closed, UNIX, HIGH)
{
    int before = open_fds();
    struct probe p = peer_send_probes(l, "x", AP_FDS_MOST);
    arrive(l, 1);
    CHECK_EQ(open_fds(), before + 1 + AP_FDS_MOST);
    struct taken t;
    CHECK_EQ(take_at_most(l, 9, 2, &t), 1);
    CHECK_EQ(t.count, 2);
    CHECK_EQ(open_fds(), before + 1 + 2);
    close(t.fds[0]);
    close(t.fds[1]);
    probe_end(p);
}

/* Beside the credentials that an option adds all of them have room. */
LINK_TEST(unix_descriptors_have_room_beside_credentials, UNIX, HIGH)
{
    int on = 1;
    CHECK_OK(setsockopt(l->fd, SOL_SOCKET, SO_PASSCRED, &on, sizeof on));
    CHECK_OK(setsockopt(l->fd, SOL_SOCKET, SO_TIMESTAMP, &on, sizeof on));
    struct probe p = peer_send_probes(l, "x", AP_FDS_MOST);
    arrive(l, 1);
    expect_taken(l, 9, "x", AP_FDS_MOST);
    probe_end(p);
}

/* ---- calls that do not ask ------------------------------------------------ */

LINK_TEST(unix_a_call_that_consumes_the_last_byte_closes_them, UNIX, HIGH)
{
    struct probe p = peer_send_probe(l, "abc");
    arrive(l, 3);
    CHECK_OK(ap_conn_consume(l->conn, 0, 2));
    CHECK(!gone(p));
    CHECK_OK(ap_conn_consume(l->conn, 0, 1));
    probe_end(p);
}

/* The loop walks in its window without telling; it is reminded to. */
LINK_TEST(unix_the_loop_is_told_to_report, UNIX, HIGH)
{
    struct probe p = peer_send_probe(l, "abc");
    arrive(l, 3);
    CHECK_EQ(mail_of(w, l->id), 0);
    CHECK_EQ(want(l, 1), 0);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_FDS);
    l->pos += 2;
    CHECK_EQ(ap_conn_report(l->conn, l->pos), 1);
    CHECK(!gone(p));
    CHECK_EQ(want(l, 1), 0);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_FDS);
    l->pos += 1;
    CHECK_EQ(ap_conn_report(l->conn, l->pos), 0);
    probe_end(p);
    CHECK_EQ(want(l, 1), -EAGAIN);
    CHECK_EQ(mail_of(w, l->id), 0);
}

LINK_TEST(unix_the_loop_is_told_by_a_search_and_by_a_wake_up, UNIX, HIGH)
{
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, 100, 0, 0, NULL, 0), -EAGAIN);
    struct probe p = peer_send_probe(l, "ab\n");
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(mail_at(w, l->id)->error, 0); /* no window without a call that tells */
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, 100, 0, 0, NULL, 0) & UINT32_MAX, 3);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_FDS);
    CHECK(!gone(p));
    link_close(l);
    probe_end(p);
}

/* ---- one batch ------------------------------------------------------------ */

LINK_TEST(unix_input_pauses_until_the_batch_is_gone, UNIX, HIGH)
{
    struct probe first = peer_send_probe(l, "a"), second = peer_send_probe(l, "b");
    peer_send(l, "c", 1);
    settle(w);
    CHECK_EQ(buffered(l), 1);
    expect_taken(l, 9, "a", 1);
    probe_end(first);
    arrive(l, 1);
    settle(w);
    CHECK_EQ(buffered(l), 1);
    CHECK_OK(ap_conn_consume(l->conn, 0, 1));
    probe_end(second);
    arrive(l, 1);
    expect_taken(l, 9, "c", 0);
}

/* A peer that sends descriptors to one that never reads has at most one batch open here. */
LINK_TEST(unix_a_flood_of_descriptors_stays_in_the_kernel, UNIX, HIGH)
{
    int before = open_fds(), fd = STDERR_FILENO;
    for (int i = 0; i < 40; i++)
        peer_send_fds(l, "x", 1, &fd, 1);
    settle(w);
    CHECK_EQ(open_fds(), before + 1);
    link_close(l);
    CHECK_EQ(open_fds(), before - 2);
}

/* Else a wait for more than the span would never end. */
LINK_TEST(unix_a_wait_beyond_the_span_reads_on, UNIX, HIGH)
{
    struct probe p = peer_send_probe(l, "ab");
    arrive(l, 2);
    CHECK_EQ(want(l, 4), -EAGAIN);
    peer_send(l, "cde", 3);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(want(l, 4), 0);
    CHECK(!gone(p)); /* it may have been a peek */
    expect_taken(l, 9, "ab", 1);
    probe_end(p);
    expect_taken(l, 9, "cde", 0);
}

LINK_TEST(unix_a_wait_across_two_batches_keeps_the_last, UNIX, HIGH)
{
    struct probe first = peer_send_probe(l, "ab");
    arrive(l, 2);
    CHECK_EQ(want(l, 3), -EAGAIN);
    struct probe second = peer_send_probe(l, "cd"), third = peer_send_probe(l, "ef");
    await(w, l->id, AP_MAIL_READ);
    settle(w);
    probe_end(first);
    CHECK_EQ(buffered(l), 4);
    expect_taken(l, 3, "abc", 1);
    probe_end(second);
    arrive(l, 3);
    CHECK(!gone(third));
    link_close(l);
    probe_end(third);
}

/* The loop, which reads by itself what is known to be there, keeps to it too. */
LINK_TEST(unix_the_loop_reads_a_batch_as_the_driver_does, UNIX, HIGH)
{
    struct probe first = peer_send_probe(l, "ab"), second = peer_send_probe(l, "cd");
    CHECK_EQ(want(l, 1), 0); /* no step was made */
    CHECK_EQ(buffered(l), 2);
    expect_taken(l, 9, "ab", 1);
    probe_end(first);
    CHECK_EQ(want(l, 1), 0);
    expect_taken(l, 9, "cd", 1);
    probe_end(second);
}

/* ---- the ends ---------------------------------------------------------------- */

TEST(unix_every_end_closes_them)
{
    for (int way = 0; way < 4; way++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_UNIX, HIGH);
        struct probe p = peer_send_probe(&l, "abc");
        arrive(&l, 3);
        if (way == 0)
            CHECK_EQ(ap_conn_close(l.conn, 0, 0), 0);
        else if (way == 1)
            CHECK_OK(ap_hub_kill(w->hub));
        else if (way == 2)
            CHECK_EQ(ap_conn_detach(l.conn, 0), l.fd);
        else
            link_close(&l);
        probe_end(p);
        if (way == 2) {
            char rest[8];
            CHECK_EQ(ap_conn_rest(l.conn, rest, 8), 3); /* the bytes stay */
            close(l.fd);
        }
        if (way < 3)
            link_close(&l);
        world_close(w);
    }
}

LINK_TEST(unix_the_child_of_a_fork_closes_them, UNIX, HIGH)
{
    struct probe p = peer_send_probe(l, "abc");
    arrive(l, 3);
    int number = l->conn->carried->numbers[0], status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        ap_fork_child();
        _exit(fcntl(number, F_GETFD) < 0 ? 0 : 1);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    expect_taken(l, 9, "abc", 1);
    probe_end(p);
}

/* What was given away is the caller's, also in a child. */
LINK_TEST(unix_the_child_of_a_fork_keeps_those_that_were_taken, UNIX, HIGH)
{
    struct probe p = peer_send_probe(l, "abc");
    arrive(l, 3);
    struct taken t;
    CHECK_EQ(take_at_most(l, 9, 1, &t), 3);
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        ap_fork_child();
        _exit(fcntl(t.fds[0], F_GETFD) >= 0 ? 0 : 1);
    }
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    close(t.fds[0]);
    probe_end(p);
}

/* ---- faults ------------------------------------------------------------------- */

LINK_TEST(unix_without_memory_for_them_they_are_closed, UNIX, HIGH)
{
    peer_send(l, "ab", 2);
    arrive(l, 2); /* a block is there: what follows needs none */
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, 1, 0));
    struct probe p = peer_send_probe(l, "cd");
    UNTIL(w, gone(p));
    ap_fault_clear();
    probe_end(p);
    CHECK_EQ(want(l, 9), -ENOMEM);
}

/* What the table of descriptors has no room for the kernel drops; the others arrive. */
LINK_TEST(unix_a_full_table_of_descriptors, UNIX, HIGH)
{
    struct rlimit limit, tight;
    CHECK_OK(getrlimit(RLIMIT_NOFILE, &limit));
    struct probe p = peer_send_probes(l, "x", 10);
    int highest = dup(0);
    close(highest);
    tight = (struct rlimit){.rlim_cur = (rlim_t)highest + 3, .rlim_max = limit.rlim_max};
    CHECK_OK(setrlimit(RLIMIT_NOFILE, &tight));
    arrive(l, 1);
    CHECK_OK(setrlimit(RLIMIT_NOFILE, &limit));
    struct taken t;
    CHECK_EQ(take_at_most(l, 9, 10, &t), 1);
    CHECK(t.count > 0 && t.count <= 3);
    for (int i = 0; i < t.count; i++)
        close(t.fds[i]);
    probe_end(p);
}

LINK_TEST(unix_interrupted_and_short_reads_lose_none, UNIX, HIGH)
{
    CHECK_OK(ap_fault_set(AP_CALL_READ, EINTR, 0, 20, 0));
    struct probe p = peer_send_probe(l, "abc");
    arrive(l, 3);
    expect_taken(l, 9, "abc", 1);
    probe_end(p);
    CHECK_OK(ap_fault_set(AP_CALL_READ, 0, 0, -1, 1));
    p = peer_send_probe(l, "abc"); /* they come with the first byte */
    arrive(l, 1);
    settle(w);
    CHECK_EQ(buffered(l), 1);
    expect_taken(l, 9, "a", 1);
    probe_end(p);
    arrive(l, 2);
    expect_taken(l, 9, "bc", 0);
    ap_fault_clear();
}

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
    int64_t soon = ap_now() + 20 * MS;
    CHECK_EQ(ap_conn_receive(l->conn, 9, soon, &view, NULL, &count), -EAGAIN);
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

/* ---- together -------------------------------------------------------------------- */

#define BATCHES ROUNDS(4000)

static void *send_batches(void *arg)
{
    struct link *l = arg;
    int fds[3] = {0, 1, 2};
    for (int i = 0; i < BATCHES;) {
        size_t offered = 2;
        ssize_t sent = ap_sys_send_rights(l->peer, "ab", &offered, fds, i % 4);
        if (sent == 2)
            i++;
        else
            CHECK_EQ(sent, -EAGAIN);
    }
    return NULL;
}

/* The driver receives while the loop takes, consumes and reports: each descriptor is given or
 * closed, and none twice. */
LINK_TEST(unix_driver_and_loop_with_descriptors, UNIX, HIGH)
{
    int before = open_fds();
    world_start(w);
    pthread_t sender;
    CHECK(pthread_create(&sender, NULL, send_batches, l) == 0);
    for (int64_t left = 2 * BATCHES, round = 0; left > 0; round++) {
        CHECK_EQ(want_wait(l, 1), 0);
        if (round % 3) {
            struct taken t;
            left -= take_at_most(l, 1 + (size_t)round % 5, 2, &t);
            for (int i = 0; i < t.count; i++)
                close(t.fds[i]);
        } else {
            l->pos += 1;
            left -= 1;
            CHECK_OK(ap_conn_report(l->conn, l->pos));
        }
    }
    pthread_join(sender, NULL);
    world_stop(w);
    CHECK_EQ(open_fds(), before);
}

TEST(unix_closed_while_descriptors_come)
{
    int before = open_fds();
    for (int round = 0; round < ROUNDS(200); round++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_UNIX, HIGH);
        world_start(w);
        int fds[3] = {0, 1, 2};
        size_t offered = 1;
        for (int i = 0; i < 5; i++)
            CHECK_EQ(ap_sys_send_rights(l.peer, "x", &offered, fds, 3), 1);
        if (round % 2)
            want_wait(&l, 3);
        link_close(&l);
        world_stop(w);
        world_close(w);
    }
    CHECK_EQ(open_fds(), before);
}
