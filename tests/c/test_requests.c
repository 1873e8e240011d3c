/* read.c, ap_conn_request: is a call due, does it wait, or has the input ended? */
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

LINK_TEST(request_waits_for_input_and_is_told_once, STREAMS, HIGH)
{
    settle(w);
    for (uint64_t i = 0; i < 3; i++) {
        CHECK_EQ(request(l, 0), -EAGAIN);
        settle(w);
        CHECK_EQ(mail_of(w, l->id), 0);
        peer_say(l, 1, 10 * i, 10);
        CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
        settle(w);
        CHECK_EQ(mail_of(w, l->id), 0);
        CHECK(request(l, 0) > 0); /* the end of the window */
        pattern_check(link_at(l), 1, 10 * i, 10);
        take(l, 10 * i, 10);
    }
    CHECK_EQ(request(l, 0), -EAGAIN);
}

/* What is readable is read at once, whether or not the driver has come to it. */
LINK_TEST(request_reads_what_is_there, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    arrived(l, 100);
    CHECK(request(l, 1) > 0);
    CHECK_EQ(stats(w).polls, 0);
    take(l, 0, 100);
}

/* Untouched, only more than there was when the last call began makes another one due. */
LINK_TEST(request_untouched_waits_for_more, STREAMS, HIGH)
{
    uint64_t sent = 10;
    peer_say(l, 1, 0, sent);
    settle(w);
    CHECK(request(l, 0) > 0);
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(request(l, 0), -EAGAIN);
        settle(w);
        CHECK_EQ(mail_of(w, l->id), 0);
        peer_say(l, 1, sent++, 1);
        await(w, l->id, AP_MAIL_READ);
        CHECK_EQ(request(l, 0), 0);
    }
    peer_say(l, 1, sent++, 1); /* while the call runs */
    settle(w);
    CHECK_EQ(request(l, 0), 0);
    CHECK_EQ(request(l, 0), -EAGAIN);
    CHECK(request(l, 1) > 0); /* to another function all of it is news */
    take(l, 0, 4);
    CHECK(request(l, 0) > 0); /* and so is what a call leaves that has taken some */
    CHECK_EQ(request(l, 0), -EAGAIN);
    expect_stream(l, 1, 4, sent - 4);
}

/* What is idle has no window, also if a view keeps its block from beginning anew: the next call is
 * shown the block again. */
LINK_TEST(request_idle_has_no_window, UNIX, HIGH)
{
    peer_say(l, 1, 0, 10);
    settle(w);
    CHECK(request(l, 0) > 0);
    ap_block *view = l->block;
    ap_block_ref(view);
    CHECK_EQ(request(l, 0), -EAGAIN);
    CHECK(!l->block);
    CHECK(!l->conn->shown);
    CHECK(!l->conn->lent);
    peer_say(l, 1, 10, 10);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(request(l, 0), 0);
    take(l, 0, 20);
    CHECK(request(l, 0) < 0);
    peer_say(l, 1, 20, 10);
    await(w, l->id, AP_MAIL_READ);
    CHECK(request(l, 0) > 0);
    take(l, 20, 10);
    pattern_check(ap_block_at(view, AP_BLOCK_HEADER), 1, 0, 10);
    ap_block_unref(view);
}

/* What the loop has read itself lies in blocks of its own, and it may never take one again: they
 * are filed when the next connection becomes idle. */
LINK_TEST(request_files_what_the_loop_has_read, TCP, HIGH)
{
    ap_poller_stats before = {0}, after = {0};
    peer_say(l, 1, 0, 100);
    arrived(l, 100);
    CHECK(request(l, 1) > 0);
    take(l, 0, 100);
    CHECK_EQ(request(l, 0), -EAGAIN);
    CHECK_EQ(ap_hub_statistics(w->hub, &before), 0);
    CHECK_EQ(request(l, 0), -EAGAIN);
    CHECK_EQ(ap_hub_statistics(w->hub, &after), 0);
    CHECK_EQ(after.blocks_free, before.blocks_free + 1);
}

/* An idle connection gives its block back at once, and not after a second. */
LINK_TEST(request_gives_the_block_back, TCP, HIGH)
{
    for (uint64_t i = 0; i < 3; i++) {
        peer_say(l, 1, 100 * i, 100);
        settle(w);
        CHECK(request(l, 0) > 0);
        CHECK(bytes_in_use(w) > 0);
        take(l, 100 * i, 100);
        CHECK_EQ(request(l, 0), -EAGAIN);
        settle(w);
        CHECK_EQ(bytes_in_use(w), 0);
    }
}

/* A wait for more goes on above high water, and not byte by byte. */
LINK_TEST(request_untouched_lifts_high_water, UNIX, 4 * KB)
{
    size_t sent = peer_push(l, 1, 0, 100 * KB);
    settle(w);
    CHECK_EQ(buffered(l), 4 * KB);
    int calls = 0;
    UNTIL(w, (calls += request(l, 0) >= 0, buffered(l) == (int64_t)sent));
    CHECK(calls <= 30);
    while (request(l, 0) >= 0)
        CHECK(++calls <= 30);
    expect_stream(l, 1, 0, sent);
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
LINK_TEST(request_data_with_the_end, TCP, HIGH)
{
    CHECK_EQ(request(l, 0), -EAGAIN);
    peer_say(l, 1, 0, 10);
    peer_close(l);
    await(w, l->id, AP_MAIL_READ);
    settle(w);
    CHECK(request(l, 0) > 0);
    take(l, 0, 10);
    CHECK_EQ(request(l, 0), AP_EEOF);
}

LINK_TEST(request_on_a_closed_connection, TCP, HIGH)
{
    CHECK_OK(ap_conn_close(l->conn, 0, 0));
    CHECK_EQ(request(l, 0), -EBADF);
    CHECK_EQ(ap_conn_watch_peer(l->conn), -EBADF);
}

/* Output goes along with a wait, and stays the caller's with a call. */
LINK_TEST(request_takes_output_along, UNIX, HIGH)
{
    CHECK_EQ(ap_conn_request(l->conn, 0, 0, "abc", 3), -EAGAIN);
    char got[4];
    ssize_t n;
    UNTIL(w, (n = recv(l->peer, got, sizeof got, MSG_DONTWAIT)) > 0);
    CHECK_EQ(n, 3);
    CHECK_BYTES(got, "abc", 3);
    peer_say(l, 1, 0, 1);
    settle(w);
    int64_t result = ap_conn_request(l->conn, 0, 0, "def", 3);
    CHECK(result > 0);
    settle(w);
    CHECK_EQ(recv(l->peer, got, sizeof got, MSG_DONTWAIT), -1);
}

/* ---- messages --------------------------------------------------------- */

LINK_TEST(request_messages, MESSAGES, HIGH)
{
    settle(w);
    CHECK_EQ(request(l, 0), -EAGAIN);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_send(l, "first", 5);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(request(l, 0), 0);
    CHECK_EQ(request(l, 0), -EAGAIN); /* that one was not received */
    for (int i = 0; i < 5; i++) {     /* and whatever else happens does not make it new */
        kick(l);
        settle(w);
        mail_of(w, l->id);
        CHECK_EQ(request(l, 0), -EAGAIN);
    }
    peer_send(l, "second", 6);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(request(l, 0), 0);
    CHECK_EQ(request(l, 0), -EAGAIN);
    CHECK_EQ(request(l, 1), 0); /* but to another function it is */
    close(l->peer);
    l->peer = -1;
    settle(w);
    CHECK_EQ(request(l, 0), AP_EEOF); /* what no call has received, none ever will */
    CHECK_EQ(request(l, 1), 0);
}

/* FIONREAD does not count it, and neither do reads. */
LINK_TEST(request_an_empty_message, MESSAGES, HIGH)
{
    ap_view view;
    int none = 0;
    settle(w);
    CHECK_EQ(request(l, 0), -EAGAIN);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(send(l->peer, "", 0, 0), 0);
        await(w, l->id, AP_MAIL_READ);
        CHECK_EQ(request(l, 0), 0);
        CHECK_EQ(request(l, 0), -EAGAIN); /* that call has taken nothing */
        CHECK_EQ(request(l, 1), 0);
        CHECK_EQ(ap_conn_receive(l->conn, 1, 0, &view, &none, &none), AP_EEOF);
        CHECK_EQ(request(l, 0), -EAGAIN); /* and now nothing is there */
        settle(w);
        CHECK_EQ(mail_of(w, l->id), 0);
    }
    CHECK_EQ(send(l->peer, "", 0, 0), 0);
    peer_close(l);
    settle(w);
    CHECK_EQ(request(l, 0), AP_EEOF); /* a call would be told no more than that */
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

LINK_TEST(request_messages_before_the_driver, MESSAGES, HIGH)
{
    peer_send(l, "first", 5);
    CHECK_EQ(request(l, 0), 0);
    CHECK_EQ(stats(w).polls, 0);
}

LINK_TEST(request_messages_that_cannot_be_counted, MESSAGES, HIGH)
{
    peer_send(l, "first", 5);
    CHECK_OK(ap_fault_set(AP_CALL_IOCTL, EINTR, 0, 3, 0));
    CHECK_EQ(request(l, 0), 0);
    CHECK_EQ(ap_fault_hits(AP_CALL_IOCTL), 3);
    CHECK_OK(ap_fault_set(AP_CALL_IOCTL, EINVAL, 0, 1, 0));
    CHECK_EQ(request(l, 1), -EINVAL); /* else it would wait for what is there */
    ap_fault_clear();
    CHECK_EQ(request(l, 1), 0);
}

/* A driver of its own, and calls that take some, all, or nothing: no byte is lost, and the wait is
 * always over when there is something to do. */
LINK_TEST(request_beside_a_driver, UNIX, 16 * KB)
{
    world_start(w);
    uint64_t total = ROUNDS(4 * MB), sent = 0, read = 0, seed = 7;
    while (read < total) {
        if (sent < total)
            sent += peer_push(l, 1, sent,
                              1 + random_below(&seed, total - sent < 3000 ? total - sent : 3000));
        int64_t result = request(l, 0);
        if (result == -EAGAIN && sent == total)
            await(w, l->id, AP_MAIL_READ);
        if (result < 0)
            continue;
        size_t there = (size_t)buffered(l);
        size_t n = random_below(&seed, 4) && sent < total ? random_below(&seed, there + 1) : there;
        expect_stream(l, 1, read, n);
        read += n;
    }
    CHECK_EQ(request(l, 0), -EAGAIN);
    link_close(l);
    world_stop(w);
}
