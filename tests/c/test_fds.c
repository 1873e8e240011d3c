/* fds.c: descriptors belong to the bytes they came with, and none is lost or left. */
#include "probes.h"

#include <pthread.h>
#include <sys/resource.h>

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

LINK_TEST(fds_descriptors_go_to_the_call_that_takes_a_byte_of_theirs, UNIX, HIGH)
{
    struct probe p = peer_send_probes(l, "hello", 3);
    arrive(l, 5);
    expect_taken(l, 2, "he", 3);
    CHECK(gone(p));
    expect_taken(l, 9, "llo", 0);
    probe_end(p);
}

LINK_TEST(fds_earlier_bytes_of_the_same_call_are_theirs_too, UNIX, HIGH)
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

LINK_TEST(fds_bytes_of_an_earlier_call_are_not_theirs, UNIX, HIGH)
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

LINK_TEST(fds_descriptors_beyond_the_room_are_closed, UNIX, HIGH)
{
    int before = check_open_files();
    struct probe p = peer_send_probes(l, "x", AP_FDS_MOST);
    arrive(l, 1);
    CHECK_EQ(check_open_files(), before + 1 + AP_FDS_MOST);
    struct taken t;
    CHECK_EQ(take_at_most(l, 9, 2, &t), 1);
    CHECK_EQ(t.count, 2);
    CHECK_EQ(check_open_files(), before + 1 + 2);
    close(t.fds[0]);
    close(t.fds[1]);
    probe_end(p);
}

/* Beside the credentials that an option adds all of them have room. */
LINK_TEST(fds_descriptors_have_room_beside_credentials, UNIX, HIGH)
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

LINK_TEST(fds_a_call_that_consumes_the_last_byte_closes_them, UNIX, HIGH)
{
    struct probe p = peer_send_probe(l, "abc");
    arrive(l, 3);
    CHECK_OK(ap_conn_consume(l->conn, 0, 2));
    CHECK(!gone(p));
    CHECK_OK(ap_conn_consume(l->conn, 0, 1));
    probe_end(p);
}

/* The loop walks in its window without telling; it is reminded to. */
LINK_TEST(fds_the_loop_is_told_to_report, UNIX, HIGH)
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

LINK_TEST(fds_the_loop_is_told_by_a_search_and_by_a_wake_up, UNIX, HIGH)
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

LINK_TEST(fds_input_pauses_until_the_batch_is_gone, UNIX, HIGH)
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
LINK_TEST(fds_a_flood_of_descriptors_stays_in_the_kernel, UNIX, HIGH)
{
    int before = check_open_files(), fd = STDERR_FILENO;
    for (int i = 0; i < 40; i++)
        peer_send_fds(l, "x", 1, &fd, 1);
    settle(w);
    CHECK_EQ(check_open_files(), before + 1);
    link_close(l);
    CHECK_EQ(check_open_files(), before - 2);
}

/* Else a wait for more than the span would never end. */
LINK_TEST(fds_a_wait_beyond_the_span_reads_on, UNIX, HIGH)
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

LINK_TEST(fds_a_wait_across_two_batches_keeps_the_last, UNIX, HIGH)
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
LINK_TEST(fds_the_loop_reads_a_batch_as_the_driver_does, UNIX, HIGH)
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

TEST(fds_every_end_closes_them)
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

LINK_TEST(fds_the_child_of_a_fork_closes_them, UNIX, HIGH)
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
LINK_TEST(fds_the_child_of_a_fork_keeps_those_that_were_taken, UNIX, HIGH)
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

LINK_TEST(fds_without_memory_for_them_they_are_closed, UNIX, HIGH)
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
LINK_TEST(fds_a_full_table_of_descriptors, UNIX, HIGH)
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

LINK_TEST(fds_interrupted_and_short_reads_lose_none, UNIX, HIGH)
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
LINK_TEST(fds_driver_and_loop_with_descriptors, UNIX, HIGH)
{
    int before = check_open_files();
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
    CHECK_EQ(check_open_files(), before);
}

TEST(fds_closed_while_descriptors_come)
{
    int before = check_open_files();
    RACE(round, 200)
    {
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
    CHECK_EQ(check_open_files(), before);
}
