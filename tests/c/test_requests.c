/* ap_conn_request: is a call due, does it wait, or has the input ended? And ap_conn_watch_peer. */
#include "fixture.h"

/* What the loop's side does with the answer: a window that is open, or nothing. */
static int64_t request(struct link *l, int fresh)
{
    int64_t result = ap_conn_request(l->conn, l->pos, fresh, NULL, 0);
    if (result >= 0 && result >> AP_NEW_BLOCK_SHIFT) {
        link_fetch(l);
        return result & UINT32_MAX;
    }
    if (result == -EAGAIN || result == AP_EQUEUED) { /* idle: the window goes */
        if (l->block)
            ap_block_unref(l->block);
        l->block = NULL;
        l->pos = 0;
    }
    return result;
}

static void take(struct link *l, uint64_t from, size_t n)
{
    expect(l, 1, from, n);
}

TEST(request_waits_for_input_and_is_told_once)
{
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        struct world *w = world_open();
        struct link l = link_open(w, kind, HIGH);
        settle(w);
        for (uint64_t i = 0; i < 3; i++) {
            CHECK_EQ(request(&l, 0), -EAGAIN);
            settle(w);
            CHECK_EQ(mail_of(w, l.id), 0);
            peer_say(&l, 1, 10 * i, 10);
            CHECK_EQ(await(w, l.id, AP_MAIL_READ), AP_MAIL_READ);
            settle(w);
            CHECK_EQ(mail_of(w, l.id), 0);
            CHECK(request(&l, 0) > 0); /* the end of the window */
            pattern_check(link_at(&l), 1, 10 * i, 10);
            take(&l, 10 * i, 10);
        }
        CHECK_EQ(request(&l, 0), -EAGAIN);
        link_close(&l);
        world_close(w);
    }
}

/* What is readable is read at once, whether or not the driver has come to it. */
TEST(request_reads_what_is_there)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    peer_say(&l, 1, 0, 100);
    arrived(&l, 100);
    CHECK(request(&l, 1) > 0);
    CHECK_EQ(stats(w).polls, 0);
    take(&l, 0, 100);
    link_close(&l);
    world_close(w);
}

/* Untouched, only more than there was when the last call began makes another one due. */
TEST(request_untouched_waits_for_more)
{
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        struct world *w = world_open();
        struct link l = link_open(w, kind, HIGH);
        uint64_t sent = 10;
        peer_say(&l, 1, 0, sent);
        settle(w);
        CHECK(request(&l, 0) > 0);
        for (int i = 0; i < 5; i++) {
            CHECK_EQ(request(&l, 0), -EAGAIN);
            settle(w);
            CHECK_EQ(mail_of(w, l.id), 0);
            peer_say(&l, 1, sent++, 1);
            await(w, l.id, AP_MAIL_READ);
            CHECK_EQ(request(&l, 0), 0);
        }
        peer_say(&l, 1, sent++, 1); /* while the call runs */
        settle(w);
        CHECK_EQ(request(&l, 0), 0);
        CHECK_EQ(request(&l, 0), -EAGAIN);
        CHECK(request(&l, 1) > 0); /* to another function all of it is news */
        take(&l, 0, 4);
        CHECK(request(&l, 0) > 0); /* and so is what a call leaves that has taken some */
        CHECK_EQ(request(&l, 0), -EAGAIN);
        expect_stream(&l, 1, 4, sent - 4);
        link_close(&l);
        world_close(w);
    }
}

/* What is idle has no window, also if a view keeps its block from beginning anew: the next call is
 * shown the block again. */
TEST(request_idle_has_no_window)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    peer_say(&l, 1, 0, 10);
    settle(w);
    CHECK(request(&l, 0) > 0);
    ap_block *view = l.block;
    ap_block_ref(view);
    CHECK_EQ(request(&l, 0), -EAGAIN);
    CHECK(!l.block);
    CHECK(!l.conn->shown);
    CHECK(!l.conn->lent);
    peer_say(&l, 1, 10, 10);
    await(w, l.id, AP_MAIL_READ);
    CHECK_EQ(request(&l, 0), 0);
    take(&l, 0, 20);
    CHECK(request(&l, 0) < 0);
    peer_say(&l, 1, 20, 10);
    await(w, l.id, AP_MAIL_READ);
    CHECK(request(&l, 0) > 0);
    take(&l, 20, 10);
    pattern_check(ap_block_at(view, AP_BLOCK_HEADER), 1, 0, 10);
    ap_block_unref(view);
    link_close(&l);
    world_close(w);
}

/* An idle connection gives its block back at once, and not after a second. */
TEST(request_gives_the_block_back)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    for (uint64_t i = 0; i < 3; i++) {
        peer_say(&l, 1, 100 * i, 100);
        settle(w);
        CHECK(request(&l, 0) > 0);
        CHECK(bytes_in_use(w) > 0);
        take(&l, 100 * i, 100);
        CHECK_EQ(request(&l, 0), -EAGAIN);
        settle(w);
        CHECK_EQ(bytes_in_use(w), 0);
    }
    link_close(&l);
    world_close(w);
}

/* A wait for more goes on above high water, and not byte by byte. */
TEST(request_untouched_lifts_high_water)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, 4 * KB);
    size_t sent = peer_push(&l, 1, 0, 100 * KB);
    settle(w);
    CHECK_EQ(buffered(&l), 4 * KB);
    int calls = 0;
    UNTIL(w, (calls += request(&l, 0) >= 0, buffered(&l) == (int64_t)sent));
    CHECK(calls <= 30);
    while (request(&l, 0) >= 0)
        CHECK(++calls <= 30);
    expect_stream(&l, 1, 0, sent);
    link_close(&l);
    world_close(w);
}

static void ends_with(int kind, size_t unread, void (*end)(struct link *), int64_t expected)
{
    struct world *w = world_open();
    struct link l = link_open(w, kind, HIGH);
    if (unread) {
        peer_say(&l, 1, 0, unread);
        settle(w);
        CHECK(request(&l, 0) > 0);
    }
    CHECK_EQ(request(&l, 0), -EAGAIN);
    end(&l);
    await(w, l.id, AP_MAIL_READ);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(request(&l, 0), expected); /* it stays so */
    CHECK_EQ(buffered(&l), unread);
    link_close(&l);
    world_close(w);
}

TEST(request_fin)
{
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++)
        for (size_t unread = 0; unread <= 10; unread += 10)
            ends_with(kind, unread, peer_close, AP_EEOF);
}

TEST(request_reset)
{
    ends_with(AP_TCP, 0, peer_reset, -ECONNRESET);
    ends_with(AP_TCP, 10, peer_reset, -ECONNRESET);
}

/* What came with the end is due first. */
TEST(request_data_with_the_end)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    CHECK_EQ(request(&l, 0), -EAGAIN);
    peer_say(&l, 1, 0, 10);
    peer_close(&l);
    await(w, l.id, AP_MAIL_READ);
    settle(w);
    CHECK(request(&l, 0) > 0);
    take(&l, 0, 10);
    CHECK_EQ(request(&l, 0), AP_EEOF);
    link_close(&l);
    world_close(w);
}

TEST(request_on_a_closed_connection)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    CHECK_OK(ap_conn_close(l.conn, 0, 0));
    CHECK_EQ(request(&l, 0), -EBADF);
    CHECK_EQ(ap_conn_watch_peer(l.conn), -EBADF);
    link_close(&l);
    world_close(w);
}

/* Output goes along with a wait, and stays the caller's with a call. */
TEST(request_takes_output_along)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(ap_conn_request(l.conn, 0, 0, "abc", 3), -EAGAIN);
    char got[4];
    ssize_t n;
    UNTIL(w, (n = recv(l.peer, got, sizeof got, MSG_DONTWAIT)) > 0);
    CHECK_EQ(n, 3);
    CHECK_BYTES(got, "abc", 3);
    peer_say(&l, 1, 0, 1);
    settle(w);
    int64_t result = ap_conn_request(l.conn, 0, 0, "def", 3);
    CHECK(result > 0);
    settle(w);
    CHECK_EQ(recv(l.peer, got, sizeof got, MSG_DONTWAIT), -1);
    link_close(&l);
    world_close(w);
}

static int64_t by_reading(struct link *l)
{
    if (l->conn->type != AP_SEQPACKET)
        return want(l, 1);
    ap_view view;
    int none = 0;
    return ap_conn_receive(l->conn, 1, 0, &view, &none, &none);
}

/* ---- messages --------------------------------------------------------- */

TEST(request_messages)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_SEQPACKET, HIGH);
    settle(w);
    CHECK_EQ(request(&l, 0), -EAGAIN);
    settle(w);
    CHECK_EQ(mail_of(w, l.id), 0);
    peer_send(&l, "first", 5);
    await(w, l.id, AP_MAIL_READ);
    CHECK_EQ(request(&l, 0), 0);
    CHECK_EQ(request(&l, 0), -EAGAIN); /* that one was not received */
    for (int i = 0; i < 5; i++) {      /* and whatever else happens does not make it new */
        kick(&l);
        settle(w);
        mail_of(w, l.id);
        CHECK_EQ(request(&l, 0), -EAGAIN);
    }
    peer_send(&l, "second", 6);
    await(w, l.id, AP_MAIL_READ);
    CHECK_EQ(request(&l, 0), 0);
    CHECK_EQ(request(&l, 0), -EAGAIN);
    CHECK_EQ(request(&l, 1), 0); /* but to another function it is */
    close(l.peer);
    l.peer = -1;
    settle(w);
    CHECK_EQ(request(&l, 0), AP_EEOF); /* what no call has received, none ever will */
    CHECK_EQ(request(&l, 1), 0);
    link_close(&l);
    world_close(w);
}

/* FIONREAD does not count it, and neither do reads. */
TEST(request_an_empty_message)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_SEQPACKET, HIGH);
    settle(w);
    CHECK_EQ(request(&l, 0), -EAGAIN);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(send(l.peer, "", 0, 0), 0);
        await(w, l.id, AP_MAIL_READ);
        CHECK_EQ(request(&l, 0), 0);
        CHECK_EQ(request(&l, 0), -EAGAIN); /* that call has taken nothing */
        CHECK_EQ(request(&l, 1), 0);
        CHECK_EQ(by_reading(&l), AP_EEOF);
        CHECK_EQ(request(&l, 0), -EAGAIN); /* and now nothing is there */
        settle(w);
        CHECK_EQ(mail_of(w, l.id), 0);
    }
    CHECK_EQ(send(l.peer, "", 0, 0), 0);
    peer_close(&l);
    settle(w);
    CHECK_EQ(request(&l, 0), AP_EEOF); /* a call would be told no more than that */
    link_close(&l);
    world_close(w);
}

/* A peer that closes with something unread has reset the connection, also to one who never receives
 * again, and whether the error is still the socket's or was a write's. */
TEST(request_messages_reset)
{
    for (int writes = 0; writes < 2; writes++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_SEQPACKET, HIGH);
        CHECK_EQ(ap_conn_send_fds(l.conn, "unread", 6, NULL, 0), 6);
        CHECK_EQ(request(&l, 0), -EAGAIN);
        peer_close(&l);
        if (writes)
            CHECK_EQ(ap_conn_send_fds(l.conn, "x", 1, NULL, 0), -ECONNRESET);
        await(w, l.id, AP_MAIL_READ);
        CHECK_EQ(request(&l, 0), -ECONNRESET);
        CHECK_EQ(request(&l, 0), -ECONNRESET);
        link_close(&l);
        world_close(w);
    }
}

TEST(request_messages_before_the_driver)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_SEQPACKET, HIGH);
    peer_send(&l, "first", 5);
    CHECK_EQ(request(&l, 0), 0);
    CHECK_EQ(stats(w).polls, 0);
    link_close(&l);
    world_close(w);
}

TEST(request_messages_that_cannot_be_counted)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_SEQPACKET, HIGH);
    peer_send(&l, "first", 5);
    CHECK_OK(ap_fault_set(AP_CALL_IOCTL, EINTR, 0, 3, 0));
    CHECK_EQ(request(&l, 0), 0);
    CHECK_EQ(ap_fault_hits(AP_CALL_IOCTL), 3);
    CHECK_OK(ap_fault_set(AP_CALL_IOCTL, EINVAL, 0, 1, 0));
    CHECK_EQ(request(&l, 1), -EINVAL); /* else it would wait for what is there */
    ap_fault_clear();
    CHECK_EQ(request(&l, 1), 0);
    link_close(&l);
    world_close(w);
}

/* ---- the peer has gone ------------------------------------------------ */

static void gone_once(struct link *l)
{
    await(l->w, l->id, AP_MAIL_GONE);
    settle(l->w);
    CHECK_EQ(mail_of(l->w, l->id) & AP_MAIL_GONE, 0);
    CHECK(ap_conn_status(l->conn) & AP_IS_GONE);
}

static void gone_after(int kind, uint32_t high, size_t unread, void (*end)(struct link *))
{
    struct world *w = world_open();
    struct link l = link_open(w, kind, high);
    CHECK_OK(ap_conn_watch_peer(l.conn));
    peer_push(&l, 1, 0, unread);
    settle(w);
    CHECK_EQ(is_paused(&l), unread >= high);
    CHECK_EQ(mail_of(w, l.id) & AP_MAIL_GONE, 0);
    CHECK(!(ap_conn_status(l.conn) & AP_IS_GONE));
    end(&l);
    gone_once(&l);
    link_close(&l);
    world_close(w);
}

static void shut_down(struct link *l)
{
    CHECK_OK(shutdown(l->peer, SHUT_WR));
}

TEST(watch_fin)
{
    for (int kind = AP_TCP; kind <= AP_SEQPACKET; kind++) {
        gone_after(kind, HIGH, 0, peer_close);
        gone_after(kind, HIGH, 0, shut_down);
    }
}

TEST(watch_fin_behind_paused_input)
{
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        gone_after(kind, 4 * KB, 100 * KB, shut_down);
        gone_after(kind, 4 * KB, 100 * KB, peer_close);
    }
}

TEST(watch_reset)
{
    gone_after(AP_TCP, HIGH, 0, peer_reset);
    gone_after(AP_TCP, HIGH, 10, peer_reset);
    gone_after(AP_TCP, 4 * KB, 100 * KB, peer_reset);
}

/* One that begins to watch afterwards is told too. */
TEST(watch_too_late)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    settle(w);
    peer_close(&l);
    UNTIL(w, ap_conn_status(l.conn) & AP_IS_GONE);
    CHECK_EQ(mail_of(w, l.id) & AP_MAIL_GONE, 0); /* nobody has asked */
    CHECK_OK(ap_conn_watch_peer(l.conn));
    gone_once(&l);
    link_close(&l);
    world_close(w);
}

/* What this side has done is no departure: the end of its output, an idle end. */
TEST(watch_own_ends)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    CHECK_OK(ap_conn_watch_peer(l.conn));
    CHECK_OK(shutdown(l.fd, SHUT_WR));
    settle(w);
    CHECK_EQ(mail_of(w, l.id) & AP_MAIL_GONE, 0);
    CHECK_OK(ap_conn_set_idle(l.conn, MS));
    await(w, l.id, AP_MAIL_IDLE);
    settle(w);
    CHECK_EQ(mail_of(w, l.id) & AP_MAIL_GONE, 0);
    CHECK(!(ap_conn_status(l.conn) & AP_IS_GONE));
    link_close(&l);
    world_close(w);
}

/* What was known before an own end is known behind it. */
TEST(watch_own_ends_hide_nothing)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    CHECK_OK(ap_conn_set_idle(l.conn, MS));
    CHECK_OK(ap_conn_watch_peer(l.conn));
    peer_close(&l);
    gone_once(&l);
    await(w, l.id, AP_MAIL_IDLE);
    CHECK(ap_conn_status(l.conn) & AP_IS_GONE);
    link_close(&l);
    world_close(w);
}

/* By the loop alone: no event has come to the driver, and perhaps none does before the handler has
 * ended. And exactly once, when the events do come. */
static void learned_by(int kind, void (*end)(struct link *), int64_t (*learn)(struct link *),
                       bool gone)
{
    struct world *w = world_open();
    struct link l = link_open(w, kind, HIGH);
    CHECK_OK(ap_conn_watch_peer(l.conn));
    if (end)
        end(&l);
    CHECK(learn(&l) < 0);
    ap_fault_clear();
    CHECK_EQ(stats(w).polls, 0);
    CHECK_EQ(!(ap_conn_status(l.conn) & AP_IS_GONE), !gone);
    CHECK_EQ(mail_of(w, l.id) & AP_MAIL_GONE, gone ? AP_MAIL_GONE : 0);
    settle(w);
    CHECK_EQ(mail_of(w, l.id) & AP_MAIL_GONE, 0);
    CHECK_EQ(!(ap_conn_status(l.conn) & AP_IS_GONE), !gone); /* behind our own shutdown, too */
    CHECK_OK(ap_conn_close(l.conn, 0, 0));
    CHECK_EQ(!(ap_conn_status(l.conn) & AP_IS_GONE), !gone);
    link_close(&l);
    world_close(w);
}

static int64_t by_writing(struct link *l)
{
    if (l->conn->type == AP_SEQPACKET)
        return ap_conn_send_fds(l->conn, "x", 1, NULL, 0);
    return ap_conn_write(l->conn, "x", 1);
}

static int64_t by_shutting_down(struct link *l)
{
    return ap_conn_shutdown(l->conn);
}

static void say_and_reset(struct link *l)
{
    peer_say(l, 1, 0, 10);
    peer_reset(l);
}

static int64_t by_lingering(struct link *l)
{
    CHECK_EQ(ap_conn_linger(l->conn, 0, 0), 0); /* there is nothing to wait for */
    return -ENOTCONN;
}

/* Over UNIX sockets a close with unread input is a reset. */
static void say_and_close_unread(struct link *l)
{
    CHECK_EQ(by_writing(l), 1);
    peer_say(l, 1, 0, 1);
    peer_close(l);
}

static int64_t by_reading_what_came_before(struct link *l)
{
    ap_view view;
    int none = 0;
    CHECK_EQ(ap_conn_receive(l->conn, 1, 0, &view, &none, &none), 1);
    ap_block_unref(view.block);
    return -ECONNRESET;
}

static int fault;

static int64_t by_a_fault_of_writing(struct link *l)
{
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, fault, 0, 1, 0));
    return ap_conn_write(l->conn, "x", 1);
}

static int64_t by_a_fault_of_reading(struct link *l)
{
    CHECK_OK(ap_fault_set(AP_CALL_READ, fault, 0, 1, 0));
    return want(l, 1);
}

TEST(watch_learned_by_the_loop)
{
    for (int kind = AP_TCP; kind <= AP_SEQPACKET; kind++) {
        learned_by(kind, peer_close, by_reading, true);
        if (kind != AP_TCP) /* which takes one more */
            learned_by(kind, peer_close, by_writing, true);
    }
    learned_by(AP_TCP, peer_reset, by_reading, true);
    learned_by(AP_TCP, peer_reset, by_writing, true);
    learned_by(AP_TCP, peer_reset, by_shutting_down, true);
    learned_by(AP_TCP, say_and_reset, by_lingering, true);
    learned_by(AP_SEQPACKET, say_and_close_unread, by_reading_what_came_before, true);
}

static void stop_reading(struct link *l)
{
    CHECK_OK(shutdown(l->peer, SHUT_RD));
}

/* EPIPE says no more than that over UNIX sockets: the peer may still send. */
TEST(watch_a_peer_that_only_stops_reading)
{
    learned_by(AP_UNIX, stop_reading, by_writing, false);
    learned_by(AP_SEQPACKET, stop_reading, by_writing, false);
}

TEST(watch_errors_of_either_side)
{
    static const int peers[] = {ECONNRESET, EPIPE, ETIMEDOUT, EHOSTUNREACH, ENETDOWN, ECONNABORTED};
    static const int own[] = {ENOBUFS, ENOMEM, EPERM, EACCES, EINVAL, EFAULT, EMSGSIZE};
    for (size_t i = 0; i < AP_ARRAY_SIZE(peers) + AP_ARRAY_SIZE(own); i++) {
        bool gone = i < AP_ARRAY_SIZE(peers);
        fault = gone ? peers[i] : own[i - AP_ARRAY_SIZE(peers)];
        learned_by(AP_TCP, NULL, by_a_fault_of_writing, gone);
        learned_by(AP_TCP, NULL, by_a_fault_of_reading, gone);
        learned_by(AP_TCP, peer_close, by_a_fault_of_writing, true); /* the socket is asked */
        learned_by(AP_TCP, peer_close, by_a_fault_of_reading, true);
    }
}

/* A driver of its own, and calls that take some, all, or nothing: no byte is lost, and the wait is
 * always over when there is something to do. */
TEST(request_beside_a_driver)
{
    struct world *w = world_open();
    world_start(w);
    struct link l = link_open(w, AP_UNIX, 16 * KB);
    uint64_t total = ROUNDS(4 * MB), sent = 0, read = 0, seed = 7;
    while (read < total) {
        if (sent < total)
            sent += peer_push(&l, 1, sent,
                              1 + random_below(&seed, total - sent < 3000 ? total - sent : 3000));
        int64_t result = request(&l, 0);
        if (result == -EAGAIN && sent == total)
            await(w, l.id, AP_MAIL_READ);
        if (result < 0)
            continue;
        size_t there = (size_t)buffered(&l);
        size_t n = random_below(&seed, 4) && sent < total ? random_below(&seed, there + 1) : there;
        expect_stream(&l, 1, read, n);
        read += n;
    }
    CHECK_EQ(request(&l, 0), -EAGAIN);
    link_close(&l);
    world_stop(w);
    world_close(w);
}
