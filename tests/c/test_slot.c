/* slot.c: every (state, verb) of its table, generations, and events that come late. */
#include "verbs.h"

/* ---- every (state, verb) ---------------------------------------------- */

/* Each verb on an open slot does what it does, and is no crash in any order (L04, L05). */
TEST(slot_open_takes_every_verb)
{
    struct world *w = world_open();
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        int fds[2];
        sockets_of(kind, fds);
        struct link l = link_fd(w, kind, HIGH, fds[0], fds[1]);
        for (enum verb verb = 0; verb < VERB_detach; verb++) {
            if (verb_call(verb, l.conn) == -EBADF)
                CHECK_FAIL("%s on an open slot", verb_names[verb]);
            settle(w);
        }
        link_close(&l);
    }
    world_close(w);
}

/* L04, L12: after any end every verb says so and touches nothing. */
TEST(slot_closed_refuses_every_verb)
{
    static const enum verb ends[] = {VERB_detach, VERB_close};
    struct world *w = world_open();
    for (size_t i = 0; i < AP_ARRAY_SIZE(ends); i++) {
        struct link l = link_open(w, AP_TCP, HIGH);
        bool detach = ends[i] == VERB_detach;
        CHECK_EQ(verb_call(ends[i], l.conn), detach ? l.fd : 0);
        verbs_all_fail(l.conn, -EBADF);
        CHECK_EQ(ap_conn_status(l.conn) & AP_IS_CLOSED, AP_IS_CLOSED);
        CHECK_EQ(ap_conn_id(l.conn), l.id);
        link_stats(&l);
        if (detach)
            close(l.fd);
        settle(w);
        CHECK_EQ(stats(w).slots, 1); /* the handle is still there */
        link_close(&l);
        CHECK_EQ(stats(w).slots, 0);
    }
    world_close(w);
}

/* A slot is free when the handle *and* the driver have let go, in either order. */
LINK_TEST(slot_is_free_when_handle_and_driver_let_go, UNIX, HIGH)
{
    uint32_t index = (uint32_t)l->id;
    link_close(l);
    CHECK_EQ(stats(w).slots, 1); /* the driver has not seen it */
    settle(w);
    CHECK_EQ(stats(w).slots, 0);

    *l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ((uint32_t)l->id, index); /* reused, and told apart */
    CHECK_OK(ap_conn_close(l->conn, 0, 0));
    settle(w);
    CHECK_EQ(stats(w).slots, 1); /* the handle has not let go */
    link_close(l);
    CHECK_EQ(stats(w).slots, 0);
}

TEST(slot_generation_grows_with_each_life)
{
    struct world *w = world_open();
    uint64_t last = 0;
    for (int i = 0; i < 20; i++) {
        struct link l = link_open(w, AP_UNIX, HIGH);
        CHECK(l.id != last);
        if (last)
            CHECK_EQ((uint32_t)l.id, (uint32_t)last);
        CHECK(l.id > last);
        last = l.id;
        link_close(&l);
        settle(w);
    }
    world_close(w);
}

/* A mailbox holds a reference: the slot is not used again while it is queued (L06). */
TEST(slot_is_not_reused_while_it_is_in_a_mailbox)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(want(&a, 1), -EAGAIN);
    peer_say(&a, 1, 0, 1);
    settle(w); /* the token is posted and not taken */
    uint64_t id = a.id;
    link_close(&a);
    settle(w);
    struct link b = link_open(w, AP_UNIX, HIGH);
    CHECK((uint32_t)b.id != (uint32_t)id);
    CHECK_EQ(mail_of(w, id), 0); /* stale: dropped and counted */
    CHECK_EQ(stats(w).stale_tokens, 1);
    struct link c = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ((uint32_t)c.id, (uint32_t)id); /* free from now on */
    link_close(&b);
    link_close(&c);
    world_close(w);
}

/* ---- events that come late -------------------------------------------- */

/* Gives remember() what epoll_wait returned before the close: the loop closes in the middle of a
 * batch by handing the driver the same event once more. */
static void late_event(struct world *w, const struct link *old)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLHUP, .data.u64 = old->id};
    int pipes[2];
    CHECK(pipe2(pipes, O_CLOEXEC) == 0);
    close(pipes[1]);
    CHECK(epoll_ctl(w->poller->epfd, EPOLL_CTL_ADD, pipes[0], &event) == 0);
    step(w, 0);
    CHECK(epoll_ctl(w->poller->epfd, EPOLL_CTL_DEL, pipes[0], NULL) == 0);
    close(pipes[0]);
}

/* The number and the slot of a closed connection belong to another one when its event comes:
 * nothing is remembered there (L06, L13, L17, L23, O8). */
TEST(slot_drops_events_of_an_earlier_generation)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_UNIX, HIGH), old = a;
    int fd = a.fd;
    link_close(&a);
    settle(w);
    struct link b = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(b.fd, fd);
    CHECK_EQ((uint32_t)b.id, (uint32_t)old.id);
    CHECK_EQ(want(&b, 1), -EAGAIN);
    settle(w);
    uint8_t before = ready_flags(&b);
    uint64_t stale = stats(w).stale_tokens, reads = stats(w).reads + stats(w).again;
    late_event(w, &old);
    CHECK_EQ(ready_flags(&b), before);
    CHECK_EQ(stats(w).stale_tokens, stale + 1);
    CHECK_EQ(stats(w).reads + stats(w).again, reads);
    CHECK_EQ(mail_of(w, b.id), 0);
    peer_say(&b, 2, 0, 100);
    expect(&b, 2, 0, 100);
    link_close(&b);
    world_close(w);
}

/* Closed between remembering the batch and serving it: the driver still has its reference. */
LINKS_TEST(slot_closed_while_on_the_run_list, TCP, HIGH, 2)
{
    struct link *a = &l[0], *b = &l[1];
    peer_say(a, 1, 0, 10);
    peer_say(b, 1, 0, 10);
    arrived(a, 10);
    arrived(b, 10);
    CHECK_EQ(ap_poller_step(w->poller, 0, 0), 0); /* remembered, none served */
    CHECK(a->conn->slot.on_run && b->conn->slot.on_run);
    link_close(a);
    CHECK_EQ(ap_poller_step(w->poller, 0, 0), 0); /* takes the message: still on the list */
    CHECK_EQ(stats(w).slots, 2);
    settle(w);
    CHECK_EQ(stats(w).slots, 1);
    expect(b, 1, 0, 10);
}

/* L17: a closed descriptor leaves the epoll set, also when somebody else still has the socket. */
TEST(slot_close_leaves_epoll)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_UNIX, HIGH);
    int copy = dup(a.fd), peer = dup(a.peer);
    link_close(&a);
    settle(w);
    uint64_t events = stats(w).events;
    CHECK_EQ(write(peer, "x", 1), 1);
    settle(w);
    CHECK_EQ(stats(w).events, events);
    close(copy);
    close(peer);
    world_close(w);
}

/* L24: zero is a descriptor like others. */
TEST(slot_descriptor_zero)
{
    struct world *w = world_open();
    int fds[2], stdin_copy = fcntl(0, F_DUPFD_CLOEXEC, 100);
    sockets_of(AP_UNIX, fds);
    close(0);
    CHECK_EQ(fcntl(fds[0], F_DUPFD_CLOEXEC, 0), 0);
    close(fds[0]);
    struct link l = link_fd(w, AP_UNIX, HIGH, 0, fds[1]);
    link_register(&l);
    peer_say(&l, 1, 0, 1000);
    expect(&l, 1, 0, 1000);
    link_close(&l);
    CHECK(fcntl(0, F_GETFD) < 0);
    if (stdin_copy >= 0) {
        dup2(stdin_copy, 0);
        close(stdin_copy);
    } else {
        close(0);
    }
    world_close(w);
}

LINK_TEST(slot_close_with_reset, TCP, HIGH)
{
    char byte;
    CHECK_OK(ap_conn_close(l->conn, 1, 0));
    ssize_t got;
    UNTIL(w, (got = recv(l->peer, &byte, 1, MSG_DONTWAIT)) >= 0 || errno != EAGAIN);
    CHECK(got < 0 && errno == ECONNRESET);
}

/* More slots than one chunk, many at once, reused in any order. */
TEST(slot_many_at_once)
{
    enum { N = 300 };
    static struct link links[N];
    struct world *w = world_open();
    for (int round = 0; round < 3; round++) {
        for (int i = 0; i < N; i++)
            links[i] = link_open(w, AP_UNIX, HIGH);
        CHECK_EQ(stats(w).connections, N);
        for (int i = 0; i < N; i++)
            peer_say(&links[i], (uint64_t)i, 0, 64);
        for (int i = 0; i < N; i++)
            expect(&links[i], (uint64_t)i, 0, 64);
        for (int i = 0; i < N; i++)
            link_close(&links[(i * 7 + round) % N]);
        CHECK_EQ(stats(w).connections, 0);
        settle(w);
        CHECK_EQ(stats(w).slots, 0);
    }
    world_close(w);
}

TEST(slot_new_refuses_nonsense)
{
    struct world *w = world_open();
    ap_conn *conn;
    CHECK_EQ(ap_conn_new(w->poller, w->hub, -1, AP_TCP, HIGH, &conn), -EINVAL);
    CHECK_EQ(ap_conn_new(w->poller, w->hub, 0, 99, HIGH, &conn), -EINVAL);
    CHECK_EQ(ap_conn_new(w->poller, w->hub, 0, AP_TCP, 0, &conn), -EINVAL);
    CHECK_EQ(stats(w).slots, 0);
    world_close(w);
}

/* A slot that views keep alive is not used again, and ends with the last view (O14). */
LINK_TEST(slot_lives_as_long_as_its_pinned_blocks, UNIX, HIGH)
{
    peer_say(l, 3, 0, 1000);
    CHECK_EQ(want_wait(l, 1000), 0);
    ap_block *view = l->block;
    uint32_t at = l->pos;
    l->block = NULL;
    CHECK_OK(ap_conn_close(l->conn, 0, 0));
    CHECK_EQ(bytes_pinned(w), view->size);
    link_close(l);
    settle(w);
    CHECK_EQ(stats(w).slots, 1);
    pattern_check(ap_block_at(view, at), 3, 0, 1000);
    ap_block_unref(view);
    CHECK_EQ(stats(w).slots, 0);
    CHECK_EQ(bytes_pinned(w), 0);
}

/* The same when the chain is dropped only with the slot: a detached connection. */
TEST(slot_detached_with_a_view_that_outlives_it)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    peer_say(&l, 3, 0, 1000);
    CHECK_EQ(want_wait(&l, 1000), 0);
    ap_block *view = l.block;
    uint32_t at = l.pos;
    l.block = NULL;
    int fd = ap_conn_detach(l.conn, l.pos);
    CHECK_OK(fd);
    close(fd);
    settle(w);
    link_close(&l); /* the last reference but that of the view */
    CHECK_EQ(stats(w).slots, 1);
    struct link other = link_open(w, AP_UNIX, HIGH);
    CHECK((uint32_t)other.id != (uint32_t)l.id); /* not to be used again yet */
    pattern_check(ap_block_at(view, at), 3, 0, 1000);
    ap_block_unref(view);
    CHECK_EQ(stats(w).slots, 1);
    peer_say(&other, 4, 0, 1000);
    expect(&other, 4, 0, 1000);
    link_close(&other);
    settle(w);
    CHECK_EQ(stats(w).slots, 0);
    world_close(w);
}
