/* input.c: when a connection is read, how much, and into what. */
#include "fixture.h"

#include <linux/errqueue.h>
#include <linux/net_tstamp.h>
#include <sys/mman.h>

/* ---- woken once ------------------------------------------------------- */

/* Never per segment (L02): the token comes with the last byte, and once. */
LINK_TEST(input_wakes_once_per_request, STREAMS, HIGH)
{
    CHECK_EQ(want(l, 1000), -EAGAIN);
    for (uint64_t i = 0; i < 20; i++) {
        CHECK_EQ(w->tokens, 0);
        CHECK_EQ(mail_of(w, l->id), 0);
        peer_say(l, 1, i * 50, i == 19 ? 49 : 50);
        UNTIL(w, buffered(l) >= (int64_t)(i * 50 + 49));
    }
    CHECK_EQ(mail_of(w, l->id), 0); /* one byte is missing */
    peer_say(l, 1, 999, 1);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(w->tokens, 1);
    CHECK_EQ(stats(w).wakeups + stats(w).wakeups_coalesced, 1);
    expect(l, 1, 0, 1000);
}

LINK_TEST(input_wait_for_delimiter_wakes_with_its_last_byte, STREAMS, HIGH)
{
    const char *text = "a\rbc\nd\r\r\n";
    CHECK_EQ(ap_conn_find(l->conn, 0, "\r\n", 2, 1000, 0, 0, NULL, 0), -EAGAIN);
    for (size_t i = 0; i < strlen(text); i++) {
        CHECK_EQ(mail_of(w, l->id), 0);
        peer_send(l, text + i, 1);
        UNTIL(w, buffered(l) == (int64_t)i + 1);
    }
    await(w, l->id, AP_MAIL_READ);
    int64_t length = ap_conn_find(l->conn, 0, "\r\n", 2, 1000, 0, 0, NULL, 0);
    CHECK_EQ(length & UINT32_MAX, strlen(text));
    CHECK_EQ(w->tokens, 1);
}

/* max_bytes without the delimiter is an end of the wait too. */
LINK_TEST(input_wait_for_delimiter_ends_at_max_bytes, TCP, HIGH)
{
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, 100, 0, 0, NULL, 0), -EAGAIN);
    for (int i = 0; i < 100; i++)
        peer_send(l, "x", 1);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, 100, 0, 0, NULL, 0), AP_EDELIM);
}

LINK_TEST(input_nobody_waits_nobody_is_woken, TCP, HIGH)
{
    peer_say(l, 1, 0, 1000); /* L16: data before the first wait */
    UNTIL(w, buffered(l) == 1000);
    CHECK_EQ(collect(w), 0);
    expect(l, 1, 0, 1000);
}

/* ---- the water marks -------------------------------------------------- */

static void fill_to_pause(struct link *l, uint64_t n)
{
    peer_say(l, 1, 0, n);
    UNTIL(l->w, is_paused(l));
    settle(l->w);
}

static void consume_to(struct link *l, uint64_t *from, uint64_t level)
{
    uint64_t now = (uint64_t)buffered(l);
    CHECK(now >= level);
    CHECK_OK(ap_conn_consume(l->conn, l->pos, now - level));
    *from += now - level;
    link_drop_block(l);
}

/* O16: what nobody waits for is bounded, and goes on below a quarter. */
LINK_TEST(input_pauses_at_high_water_and_resumes_at_a_quarter, STREAMS, 64 * KB)
{
    uint64_t from = 0;
    peer_say(l, 1, 0, 64 * KB);
    UNTIL(w, is_paused(l));
    peer_say(l, 1, 64 * KB, 30 * KB);
    arrived(l, 1); /* more waits in the kernel (its count on UNIX is per message) */
    settle(w);
    CHECK_EQ(buffered(l), 64 * KB);
    consume_to(l, &from, 16 * KB + 1);
    settle(w);
    CHECK(is_paused(l));
    CHECK_EQ(buffered(l), 16 * KB + 1);
    uint64_t events = stats(w).events;
    consume_to(l, &from, 16 * KB);
    UNTIL(w, buffered(l) == 46 * KB);
    CHECK_EQ(stats(w).events, events); /* nothing of epoll: work left over has no edge */
    expect_stream(l, 1, from, 46 * KB);
}

/* Measured: 60 KB sent, a part read, and no further EPOLLIN. */
LINK_TEST(input_left_in_the_kernel_has_no_edge, STREAMS, 20000)
{
    peer_say(l, 1, 0, 60000);
    UNTIL(w, is_paused(l));
    for (int tries = 0; unread_in_kernel(l->fd) < 40000 && tries < 1000; tries++)
        usleep(100); /* all has left the peer */
    settle(w);
    uint64_t events = stats(w).events;
    expect_stream(l, 1, 0, 60000);
    CHECK_EQ(stats(w).events, events);
}

/* A wait lifts the mark: "paused at 256K, consumed to 100K, next(200_000)" hung for ever. */
LINK_TEST(input_wait_reads_on_although_paused, STREAMS, HIGH)
{
    uint64_t from = 0;
    fill_to_pause(l, HIGH);
    size_t more = peer_push(l, 1, HIGH, 150000);
    consume_to(l, &from, 100 * KB);
    settle(w);
    CHECK(is_paused(l));
    for (int64_t rc; (rc = want(l, 200000)) != 0;) {
        CHECK_EQ(rc, -EAGAIN);
        if (!mail_of(w, l->id))
            breathe(w);
        if (more < 150000)
            more += peer_push(l, 1, HIGH + more, 150000 - more);
    }
    pattern_check(link_at(l), 1, from, 200000);
}

LINK_TEST(input_wait_above_high_water, STREAMS, 32 * KB)
{
    CHECK_EQ(want(l, MB), -EAGAIN);
    peer_say(l, 1, 0, MB);
    expect(l, 1, 0, MB);
    CHECK_EQ(w->tokens, 1);
}

LINK_TEST(input_wait_for_delimiter_above_high_water, TCP, 32 * KB)
{
    char *text = malloc(300 * KB);
    memset(text, 'x', 300 * KB);
    text[300 * KB - 1] = '\n';
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, MB, 0, 0, NULL, 0), -EAGAIN);
    peer_send(l, text, 300 * KB);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, MB, 0, 0, NULL, 0) & UINT32_MAX, 300 * KB);
    CHECK_EQ(w->tokens, 1);
    free(text);
}

/* Reading is on while a wait is armed *and not met*: a loop that is busy must not make memory
 * grow up to max_bytes. */
LINK_TEST(input_met_wait_reads_no_further_than_high_water, TCP, 32 * KB)
{
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, 64 * MB, 0, 0, NULL, 0), -EAGAIN);
    peer_send(l, "line\n", 5);
    UNTIL(w, buffered(l) == 5);
    size_t pushed = 0;
    for (int i = 0; i < 50; i++) { /* the loop does not come */
        pushed += peer_push(l, 1, pushed, 64 * KB);
        settle(w);
    }
    CHECK(pushed > 64 * KB);
    CHECK(buffered(l) <= 64 * (int64_t)KB);
}

LINK_TEST(input_wait_for_bytes_reads_no_further_than_it_must, TCP, 32 * KB)
{
    CHECK_EQ(want(l, 40 * KB), -EAGAIN);
    size_t pushed = peer_push(l, 1, 0, 300 * KB);
    await(w, l->id, AP_MAIL_READ);
    for (int i = 0; i < 20; i++) {
        pushed += peer_push(l, 1, pushed, 64 * KB);
        settle(w);
    }
    CHECK_EQ(buffered(l), 40 * KB);
    expect_stream(l, 1, 0, pushed);
}

/* ---- ends ------------------------------------------------------------- */

/* L09, L10: data and FIN together: all of the data, then the end, and one wake-up. */
LINK_TEST(input_data_and_fin_at_once, STREAMS, HIGH)
{
    CHECK_EQ(want(l, 200), -EAGAIN);
    peer_say(l, 1, 0, 100);
    peer_close(l);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(want(l, 200), AP_EEOF);
    expect(l, 1, 0, 100);
    CHECK_EQ(want(l, 1), AP_EEOF);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_EOF | AP_IS_GONE);
    CHECK_EQ(w->tokens, 1);
}

/* L08: FIN alone is one wake-up, no spin. */
LINK_TEST(input_fin_alone, STREAMS, HIGH)
{
    CHECK_EQ(want(l, 1), -EAGAIN);
    settle(w);
    shutdown(l->peer, SHUT_WR);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(want(l, 1), AP_EEOF);
    uint64_t events = stats(w).events;
    settle(w);
    CHECK_EQ(stats(w).events, events);
    CHECK_EQ(w->tokens, 1);
}

/* L10: send k bytes and close, for many k. */
TEST(input_peer_that_sends_and_closes)
{
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        struct world *w = world_open();
        for (size_t k = 1; k < (SANITIZED ? 300000 : 4 * MB); k = k * 3 + 7) {
            struct link l = link_open(w, kind, 64 * KB);
            for (size_t sent = 0, read = 0; read < k;) {
                if (sent < k)
                    sent += peer_push(&l, 9, sent, k - sent < 64 * KB ? k - sent : 64 * KB);
                if (sent == k)
                    peer_close(&l);
                size_t n = sent - read < 16 * KB ? sent - read : 16 * KB;
                expect(&l, 9, read, n);
                read += n;
            }
            CHECK_EQ(want_wait(&l, 1), AP_EEOF);
            link_close(&l);
        }
        world_close(w);
    }
}

/* O1: half-close is not close. */
LINK_TEST(input_half_close_leaves_writing, STREAMS, HIGH)
{
    peer_say(l, 1, 0, 10);
    shutdown(l->peer, SHUT_WR);
    expect(l, 1, 0, 10);
    CHECK_EQ(want_wait(l, 1), AP_EEOF);
    CHECK_EQ(ap_conn_write(l->conn, "answer", 6), 0);
    char answer[6];
    CHECK_EQ(recv(l->peer, answer, 6, MSG_WAITALL), 6);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_EOF | AP_IS_GONE);
}

/* Measured: what was received before a RST is still readable; the error comes after it, and is
 * an error and no FIN (O12). */
LINK_TEST(input_reset_comes_after_the_data, TCP, HIGH)
{
    peer_say(l, 1, 0, 1000);
    arrived(l, 1000);
    peer_reset(l);
    arrived_event(l, POLLERR);
    expect(l, 1, 0, 1000);
    CHECK_EQ(want_wait(l, 1), -ECONNRESET);
    CHECK_EQ(want(l, 1), -ECONNRESET); /* and stays */
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_BROKEN | AP_IS_GONE);
}

LINK_TEST(input_reset_ends_a_wait, TCP, HIGH)
{
    CHECK_EQ(want(l, 1), -EAGAIN);
    settle(w);
    peer_reset(l);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(want(l, 1), -ECONNRESET);
    CHECK_EQ(w->tokens, 1);
}

/* A failed write takes the socket's error with it; the reader must not see a FIN then (O12). */
LINK_TEST(input_reset_is_no_fin_after_a_failed_write, TCP, HIGH)
{
    settle(w);
    peer_reset(l);
    arrived_event(l, POLLERR);
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -ECONNRESET);
    CHECK_EQ(want_wait(l, 1), -ECONNRESET);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_BROKEN | AP_IS_GONE);
}

/* ---- events behind paused input --------------------------------------- */

/* Measured, level-triggered: 229,000 events in 200 ms for RDHUP, 234,000 for HUP, 235,000 for a
 * RST. Edge-triggered it is a handful (O16). */
TEST(input_paused_sees_no_event_storm)
{
    struct world *w = world_open();
    for (int end = 0; end < 3; end++) {
        struct link l = link_open(w, AP_TCP, 4 * KB);
        peer_say(&l, 1, 0, 6 * KB);
        UNTIL(w, is_paused(&l));
        if (end == 1) /* both FINs */
            CHECK_OK(ap_conn_shutdown(l.conn));
        settle(w);
        ap_poller_stats before = stats(w);
        if (end == 2)
            peer_reset(&l);
        else
            shutdown(l.peer, SHUT_WR);
        arrived_event(&l, end == 2 ? POLLERR : POLLIN);
        for (int i = 0; i < 200; i++)
            step(w, 0);
        CHECK(stats(w).events - before.events <= 4);
        CHECK_EQ(stats(w).reads + stats(w).again, before.reads + before.again);
        CHECK_EQ(buffered(&l), 4 * KB);
        link_close(&l);
    }
    world_close(w);
}

LINK_TEST(input_reset_is_noticed_while_paused, TCP, 4 * KB)
{
    peer_say(l, 1, 0, 10 * KB);
    UNTIL(w, is_paused(l));
    arrived(l, 6 * KB);
    CHECK_EQ(ap_conn_status(l->conn), 0);
    peer_reset(l);
    UNTIL(w, ap_conn_status(l->conn) & AP_IS_BROKEN);
    expect_stream(l, 1, 0, 10 * KB); /* found as such only by the reads that follow */
    CHECK_EQ(want_wait(l, 1), -ECONNRESET);
}

/* A FIN behind paused input is no end yet (O16). */
LINK_TEST(input_fin_behind_paused_input, TCP, 4 * KB)
{
    peer_say(l, 1, 0, 10 * KB);
    UNTIL(w, is_paused(l));
    arrived(l, 6 * KB);
    peer_close(l);
    arrived_event(l, POLLRDHUP);
    settle(w);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_GONE);
    expect_stream(l, 1, 0, 10 * KB);
    CHECK_EQ(want_wait(l, 1), AP_EEOF);
}

/* Puts a message into the error queue: EPOLLERR, and SO_ERROR is 0. */
static void make_queued_error(struct link *l)
{
    unsigned flags = SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE;
    CHECK(setsockopt(l->fd, SOL_SOCKET, SO_TIMESTAMPING, &flags, sizeof flags) == 0);
    CHECK_EQ(ap_conn_write(l->conn, "t", 1), 0);
    for (int tries = 0; !(peek_events(l->fd, POLLERR) & POLLERR); tries++) {
        if (tries > 1000)
            SKIP("no transmit timestamps here");
        usleep(1000);
    }
    flags = 0;
    CHECK(setsockopt(l->fd, SOL_SOCKET, SO_TIMESTAMPING, &flags, sizeof flags) == 0);
}

/* ERR alone is the error queue: drained, and nothing else (L19). */
TEST(input_error_queue_is_drained)
{
    for (int paused = 0; paused < 2; paused++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_TCP, 4 * KB);
        if (paused) {
            peer_say(&l, 1, 0, 10 * KB);
            UNTIL(w, is_paused(&l));
            arrived(&l, 6 * KB);
        }
        settle(w);
        make_queued_error(&l);
        UNTIL(w, !(peek_events(l.fd, POLLERR) & POLLERR));
        CHECK_EQ(ap_conn_status(l.conn), 0);
        if (!paused)
            peer_say(&l, 1, 0, 10 * KB);
        expect_stream(&l, 1, 0, 10 * KB);
        link_close(&l);
        world_close(w);
    }
}

/* After an error was ever reported a short read says nothing: only EAGAIN does. */
LINK_TEST(input_short_read_proves_nothing_after_an_error, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    expect(l, 1, 0, 100);
    settle(w);
    CHECK(!(ready_flags(l) & AP_READABLE)); /* cleared by the short read */
    uint64_t again = stats(w).again;
    peer_say(l, 1, 100, 100);
    expect(l, 1, 100, 100);
    settle(w);
    CHECK_EQ(stats(w).again, again); /* which saves the EAGAIN */
    make_queued_error(l);
    UNTIL(w, !(peek_events(l->fd, POLLERR) & POLLERR));
    again = stats(w).again;
    peer_say(l, 1, 200, 100);
    expect(l, 1, 200, 100);
    settle(w);
    CHECK(stats(w).again > again);
}

/* ---- where recv stops ------------------------------------------------- */

/* Measured: recv stops at an urgent byte, and no further edge comes. */
TEST(input_urgent_data_does_not_hang)
{
    struct world *w = world_open();
    for (int after = 0; after < 2; after++) {
        struct link l = link_open(w, AP_TCP, HIGH);
        if (after) { /* the event for plain input came before */
            CHECK_EQ(want(&l, 6), -EAGAIN);
            settle(w);
        }
        CHECK_EQ(send(l.peer, "abc", 3, 0), 3);
        CHECK_EQ(send(l.peer, "!", 1, MSG_OOB), 1);
        CHECK_EQ(send(l.peer, "def", 3, 0), 3);
        CHECK_EQ(want_wait(&l, 6), 0);
        CHECK_BYTES(link_at(&l), "abcdef", 6);
        l.pos += 6;
        peer_say(&l, 1, 0, 500);
        expect(&l, 1, 0, 500);
        link_close(&l);
    }
    world_close(w);
}

/* Measured: recv stops behind a message with descriptors, and no further edge comes. */
TEST(input_short_read_proves_nothing_on_unix)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(want(&l, 9), -EAGAIN);
    settle(w);
    size_t offered = 3;
    CHECK_EQ(ap_sys_send_rights(l.peer, "abc", &offered, &l.peer, 1), 3);
    CHECK_EQ(ap_sys_send_rights(l.peer, "def", &offered, &l.peer, 1), 3);
    peer_send(&l, "ghi", 3);
    CHECK_EQ(want_wait(&l, 9), 0);
    CHECK_BYTES(link_at(&l), "abcdefghi", 9);
    link_close(&l); /* the harness counts the descriptors */
    world_close(w);
}

/* ---- memory ----------------------------------------------------------- */

/* A length prefix costs nothing: memory follows arrival. */
LINK_TEST(input_memory_follows_arrival, TCP, HIGH)
{
    CHECK_EQ(want(l, 60 * MB), -EAGAIN);
    settle(w);
    CHECK_EQ(bytes_in_use(w), 0);
    peer_say(l, 1, 0, 10000);
    UNTIL(w, buffered(l) == 10000);
    CHECK(bytes_in_use(w) <= 2 * HIGH);
    size_t sent = 10000;
    while (sent < 2 * MB) {
        peer_say(l, 1, sent, 64 * KB);
        sent += 64 * KB;
        UNTIL(w, buffered(l) == (int64_t)sent);
        CHECK(bytes_in_use(w) <= 5 * sent + 3 * HIGH); /* twice what arrived, in powers of two */
    }
}

/* The first block is small, and later ones grow with what arrives. */
LINK_TEST(input_blocks_grow_with_what_arrives, TCP, HIGH)
{
    peer_say(l, 1, 0, 10);
    expect(l, 1, 0, 10);
    CHECK_EQ(l->block->size, AP_BLOCK_MIN);
    for (uint64_t i = 0; i < 30; i++) {
        peer_say(l, 1, 10 + i * 40 * KB, 40 * KB);
        UNTIL(w, buffered(l) == 40 * (int64_t)KB);
        expect(l, 1, 10 + i * 40 * KB, 40 * KB);
    }
    CHECK(l->block->size >= 40 * KB);
}

/* Measured rule: a block is never rewound or moved while a view of it may exist. */
LINK_TEST(input_views_stay_as_they_are, STREAMS, HIGH)
{
    enum { VIEWS = 64 };
    struct link views[VIEWS];
    uint64_t begins[VIEWS + 1] = {0}, seed = 17;
    for (int i = 0; i < VIEWS; i++) {
        size_t n = 1 + random_below(&seed, 40 * KB);
        peer_say(l, 1, begins[i], n);
        CHECK_EQ(want_wait(l, n), 0);
        ap_block_ref(l->block);
        views[i] = *l;
        l->pos += (uint32_t)n;
        begins[i + 1] = begins[i] + n;
    }
    peer_say(l, 1, begins[VIEWS], 100 * KB);
    expect_stream(l, 1, begins[VIEWS], 100 * KB);
    for (int i = 0; i < VIEWS; i++)
        pattern_check(link_at(&views[i]), 1, begins[i], begins[i + 1] - begins[i]);
    link_drop_block(l);
    CHECK(link_stats(l).pinned > 0);
    for (int i = 0; i < VIEWS; i++)
        ap_block_unref(views[i].block);
    CHECK_EQ(bytes_pinned(w), 0);
    CHECK_EQ(link_stats(l).pinned, 0);
}

/* L28, L37: a request at a time in one place: no more memory than the first block. */
LINK_TEST(input_drained_block_begins_anew, TCP, HIGH)
{
    for (uint64_t i = 0; i < 200; i++) {
        link_drop_block(l); /* no view is left */
        CHECK_EQ(want(l, 100), -EAGAIN);
        peer_say(l, 1, i * 100, 100);
        expect(l, 1, i * 100, 100);
        CHECK_EQ(l->pos, AP_BLOCK_HEADER + 100);
        CHECK_EQ(bytes_in_use(w), AP_BLOCK_MIN);
    }
}

/* Reads what the loop has been shown, to its end, and has no views. */
static int rewind_block(struct link *l)
{
    int rc = ap_conn_rewind(l->conn, l->block, &l->pos);
    CHECK_OK(rc);
    return rc;
}

/* Without views, one block serves for any number of messages, and stays shown. */
LINK_TEST(input_shown_block_is_rewound, STREAMS, HIGH)
{
    enum { SIZE = 100 };
    const ap_block *first = NULL;
    for (uint64_t i = 0; i < 200; i++) {
        peer_say(l, 1, i * SIZE, SIZE);
        int64_t result;
        while ((result = ap_conn_read(l->conn, l->pos, SIZE, 0, 0, NULL, 0)) == -EAGAIN)
            await(w, l->id, AP_MAIL_READ);
        CHECK_EQ(result >> AP_NEW_BLOCK_SHIFT, first == NULL);
        if (!first)
            link_fetch(l);
        first = l->block;
        CHECK_EQ(result & UINT32_MAX, AP_BLOCK_HEADER + SIZE);
        pattern_check(link_at(l), 1, i * SIZE, SIZE);
        l->pos += SIZE;
        CHECK_EQ(rewind_block(l), 1);
        CHECK_EQ(l->pos, AP_BLOCK_HEADER);
        CHECK_EQ(buffered(l), 0);
    }
    CHECK_EQ(bytes_in_use(w), AP_BLOCK_MIN);
}

/* A token tells the end of the window in the rewound block. */
LINK_TEST(input_rewound_block_is_the_tokens, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    expect(l, 1, 0, 100);
    CHECK_EQ(rewind_block(l), 1);
    CHECK_EQ(want(l, 50), -EAGAIN);
    peer_say(l, 1, 100, 50);
    settle(w);
    ap_token token;
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.value, AP_BLOCK_HEADER + 50);
    pattern_check(link_at(l), 1, 100, 50);
}

/* A block that is full to its last byte would leave the chain: rewound, it stays. */
LINK_TEST(input_full_block_is_rewound, TCP, HIGH)
{
    size_t room = AP_BLOCK_MIN - AP_BLOCK_HEADER;
    for (uint64_t i = 0; i < 3; i++) {
        CHECK_EQ(want(l, room), -EAGAIN);
        peer_say(l, 1, i * room, room);
        const ap_block *before = l->block;
        expect(l, 1, i * room, room);
        CHECK(!before || l->block == before);
        CHECK_EQ(l->pos, l->block->size);
        CHECK_EQ(rewind_block(l), 1);
    }
}

/* A loop that drives gives a large one back, for whichever connection is next. */
LINKS_TEST(input_large_block_is_given_back, TCP, HIGH, 2)
{
    size_t n = AP_BLOCK_LARGE / 2 + 1;
    const ap_block *before = NULL;
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
    for (uint64_t i = 0; i < 6; i++) {
        struct link *link = &l[i % 2];
        CHECK_EQ(want(link, n), -EAGAIN);
        peer_say(link, 1, i * n, n);
        expect(link, 1, i * n, n);
        CHECK_EQ(link->block->size, AP_BLOCK_LARGE);
        CHECK(!before || link->block == before);
        before = link->block;
        CHECK_EQ(rewind_block(link), 2);
        CHECK_EQ(bytes_in_use(w), AP_BLOCK_LARGE); /* ours, still */
        ap_block_unref(link->block);
        link->block = NULL;
        link->pos = 0;
        CHECK_EQ(bytes_in_use(w), 0);
        CHECK_EQ(bytes_pinned(w), 0);
        CHECK_EQ(buffered(link), 0);
    }
    /* the pool of the loop may have it: it is trimmed as if the block were still there */
    CHECK_EQ(want(l, 1), -EAGAIN);
    CHECK(ap_input_idle(l->conn));
    CHECK_OK(ap_poller_lend(w->poller, NULL));
    CHECK_EQ(want(&l[1], n), -EAGAIN);
    peer_say(&l[1], 1, 0, n);
    expect(&l[1], 1, 0, n);
    CHECK_EQ(rewind_block(&l[1]), 1); /* a thread keeps it for the connection */
}

/* Not while anything in it is unread, or a view is left, or it is not what is shown. */
LINK_TEST(input_is_not_rewound_under_anyone, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    CHECK_EQ(want_wait(l, 100), 0);
    uint32_t begin = l->pos;
    l->pos += 99;
    CHECK_EQ(rewind_block(l), 0);
    CHECK_EQ(l->pos, begin + 99);
    CHECK_EQ(buffered(l), 1);
    l->pos = begin + 100;
    ap_block_ref(l->block);
    CHECK_EQ(rewind_block(l), 0);
    peer_say(l, 1, 100, 100);
    expect(l, 1, 100, 100);
    CHECK_EQ(l->pos, begin + 200);
    pattern_check(ap_block_at(l->block, begin), 1, 0, 100);
    ap_block_unref(l->block);
    uint32_t pos = l->pos;
    CHECK_EQ(ap_conn_rewind(l->conn, NULL, &pos), 0);
    CHECK_EQ(pos, l->pos);
    peer_say(l, 1, 200, 100);
    UNTIL(w, buffered(l) == 100);
    CHECK_EQ(rewind_block(l), 0); /* what has come meanwhile is not shown yet */
    expect(l, 1, 200, 100);
    CHECK_EQ(rewind_block(l), 1);
}

/* Rewinding consumes: reading goes on below the low water mark. */
LINK_TEST(input_rewinding_resumes_reading, TCP, 1000)
{
    uint64_t sent = peer_push(l, 1, 0, 64 * KB), read = 0;
    while (read < sent) {
        CHECK_EQ(want_wait(l, 1), 0);
        ap_view view;
        CHECK_OK(ap_conn_block(l->conn, l->pos, &view));
        pattern_check(link_at(l), 1, read, view.end - l->pos);
        read += view.end - l->pos;
        l->pos = view.end;
        if (rewind_block(l))
            CHECK_EQ(buffered(l), 0);
    }
}

static bool is_mapped(void *page)
{
    unsigned char there;
    return mincore(page, 4096, &there) == 0;
}

/* An empty block goes back about a second after it was drained, with the loop's help when it
 * has a wrapper of it; and then the pool's slabs. This is the one test that waits for real. */
TEST(input_empty_block_is_taken_back)
{
    struct world *w = world_open();
    struct link held = link_open(w, AP_TCP, HIGH), dropped = link_open(w, AP_TCP, HIGH);
    struct link *both[] = {&held, &dropped};
    for (int i = 0; i < 2; i++) {
        peer_say(both[i], 1, 0, 100);
        expect(both[i], 1, 0, 100);
    }
    link_drop_block(&dropped);
    int64_t armed = ap_now();
    for (int i = 0; i < 2; i++)
        CHECK_EQ(want(both[i], 1), -EAGAIN);
    struct link large = link_open(w, AP_TCP, HIGH);
    CHECK_EQ(want(&large, 200 * KB), -EAGAIN);
    peer_say(&large, 1, 0, 200 * KB);
    expect(&large, 1, 0, 200 * KB);
    void *kept = large.block; /* for a while, by the pool */
    CHECK(large.block->home == w->poller->context.pool);
    link_close(&large);
    step(w, 0);
    CHECK(bytes_in_use(w) > 0);
    CHECK_EQ(await(w, held.id, AP_MAIL_TRIM), AP_MAIL_TRIM);
    CHECK(ap_now() - armed >= AP_TRIM_AFTER - 20 * MS);
    link_drop_block(&held);
    UNTIL(w, bytes_in_use(w) == 0);
    UNTIL(w, !is_mapped(kept));
    CHECK(w->tokens <= 3);
    for (int i = 0; i < 2; i++) { /* and the wait is armed as before */
        peer_say(both[i], 1, 100, 100);
        await(w, both[i]->id, AP_MAIL_READ);
        expect(both[i], 1, 100, 100);
        link_close(both[i]);
    }
    world_close(w);
}

/* ---- faults ----------------------------------------------------------- */

/* L21: interruptions, false EAGAINs and short reads between them lose nothing. */
LINK_TEST(input_survives_faults_of_recv, STREAMS, HIGH)
{
    static const int errors[] = {EINTR, EAGAIN, 0};
    uint64_t from = 0, seed = 99;
    for (int i = 0; i < 200; i++) {
        size_t n = 1 + random_below(&seed, 5000);
        CHECK_OK(ap_fault_set(AP_CALL_READ, errors[i % 3], (int)random_below(&seed, 3),
                              1 + (int)random_below(&seed, 3), 1 + random_below(&seed, 100)));
        peer_say(l, 1, from, n);
        while (want(l, n) == -EAGAIN) {
            kick(l);
            breathe(w);
            collect(w);
        }
        expect(l, 1, from, n);
        from += n;
    }
    ap_fault_clear();
}

LINK_TEST(input_error_of_recv_is_reported, TCP, HIGH)
{
    CHECK_EQ(want(l, 1), -EAGAIN);
    settle(w);
    CHECK_OK(ap_fault_set(AP_CALL_READ, ETIMEDOUT, 0, 1, 0));
    peer_say(l, 1, 0, 1);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(want(l, 1), -ETIMEDOUT);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_BROKEN | AP_IS_GONE);
    ap_fault_clear();
}

/* Without memory the connection ends with an error, and what was received stays readable. */
LINK_TEST(input_without_memory_ends_the_connection, TCP, HIGH)
{
    CHECK_EQ(want(l, 100), -EAGAIN);
    settle(w);
    CHECK_OK(ap_fault_set(AP_CALL_MAP, ENOMEM, 0, -1, 0));
    peer_say(l, 1, 0, 100);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(want(l, 100), -ENOMEM);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_BROKEN);
    ap_fault_clear();
}

/* The first block is as large as was asked for, later ones no smaller. */
TEST(input_blocks_have_a_size_at_least)
{
    static const struct {
        uint32_t high, asked, first;
    } sizes[] = {{HIGH, 2048, 2048},
                 {HIGH, 10000, 16384},
                 {HIGH, 65536, 65536},
                 {4096, 65536, 4096}};
    for (size_t i = 0; i < AP_ARRAY_SIZE(sizes); i++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_TCP, sizes[i].high);
        CHECK_EQ(ap_conn_set_block(l.conn, AP_BLOCK_MIN - 1), -EINVAL);
        CHECK_EQ(ap_conn_set_block(l.conn, AP_BLOCK_MAX + 1), -EINVAL);
        CHECK_OK(ap_conn_set_block(l.conn, sizes[i].asked));
        for (uint64_t k = 0; k < 40; k++) {
            peer_say(&l, 1, k, 1);
            arrived(&l, 1);
            expect(&l, 1, k, 1);
            CHECK_EQ(l.block->size, sizes[i].first);
        }
        link_close(&l);
        world_close(w);
    }
}
