/* read.c: the window, contiguity, searching, and output that comes along. */
#include "fixture.h"

static int64_t find(struct link *l, const char *delimiter, size_t max)
{
    int64_t result =
        ap_conn_find(l->conn, l->pos, delimiter, strlen(delimiter), max, 0, 0, NULL, 0);
    if (result >= 0 && result >> AP_NEW_BLOCK_SHIFT)
        link_fetch(l);
    return result < 0 ? result : result & UINT32_MAX;
}

static int64_t find_wait(struct link *l, const char *delimiter, size_t max)
{
    int64_t result;
    while ((result = find(l, delimiter, max)) == -EAGAIN)
        await(l->w, l->id, AP_MAIL_READ);
    return result;
}

/* ---- bytes ------------------------------------------------------------ */

/* A stream in random segments, read in random portions, is that stream (L03, L42). */
LINK_TEST(read_any_portions_of_any_segments, STREAMS, 64 * KB)
{
    uint64_t sent = 0, read = 0, seed = 5;
    uint64_t total = SANITIZED ? 3 * MB : 30 * MB;
    while (read < total) {
        sent += peer_push(l, 2, sent, random_below(&seed, 3) ? random_below(&seed, 20000) : 1);
        if (sent == read)
            continue;
        uint64_t n = 1 + random_below(&seed, sent - read);
        expect(l, 2, read, n);
        read += n;
        if (random_below(&seed, 8) == 0)
            link_drop_block(l);
        if (random_below(&seed, 4) == 0)
            settle(w);
    }
    CHECK_EQ(link_stats(l).bytes_received, stats(w).bytes_received);
}

LINK_TEST(read_at_once_what_is_there, TCP, HIGH)
{
    peer_say(l, 1, 0, 100);
    arrived(l, 100);
    CHECK_EQ(want(l, 100), 0); /* the driver has not run at all */
    CHECK_EQ(stats(w).polls, 0);
    pattern_check(link_at(l), 1, 0, 100);
}

/* The loop stops at the bound as well, and what is left is the driver's: paused until then, and
 * without an event of its own. */
LINK_TEST(read_at_once_is_bounded, UNIX, MB)
{
    int size = 8 * 1024 * 1024;
    setsockopt(l->peer, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    size_t sent = peer_push(l, 1, 0, MB + 600 * KB);
    if (sent < MB + 600 * KB)
        SKIP("no right to a large socket buffer");
    UNTIL(w, is_paused(l));
    settle(w);
    CHECK_OK(ap_conn_consume(l->conn, l->pos, 724 * KB)); /* above a quarter: still paused */
    CHECK_EQ(buffered(l), 300 * KB);
    CHECK_EQ(ap_conn_read(l->conn, l->pos, 300 * KB + 1, AP_SCATTER, 0, NULL, 0), 0);
    CHECK_EQ(buffered(l), 300 * KB + AP_BOUND);
    uint64_t events = stats(w).events;
    for (int i = 0; i < 10; i++)
        step(w, 0);
    CHECK_EQ(buffered(l), 900 * KB);
    CHECK_EQ(stats(w).events, events);
    expect_stream(l, 1, 724 * KB, 900 * KB);
}

/* A token says where the window ends, if the bytes lie in the block that is shown: the loop needs
 * no call for them. */
LINK_TEST(read_token_carries_the_window, TCP, HIGH)
{
    ap_token token;
    CHECK_EQ(want(l, 100), -EAGAIN);
    peer_say(l, 1, 0, 100);
    settle(w);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.bits, AP_MAIL_READ);
    CHECK_EQ(token.value, 0); /* nothing was shown yet */
    expect(l, 1, 0, 100);
    for (uint64_t i = 1; i < 40; i++) {
        CHECK_EQ(want(l, 100), -EAGAIN);
        ap_block *shown = l->block;
        peer_say(l, 1, i * 100, 120);
        settle(w);
        CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
        if (token.value) {
            CHECK(l->conn->shown == shown);
            CHECK_EQ(token.value, l->pos + 120);
            pattern_check(link_at(l), 1, i * 100, 120);
        } else {
            CHECK(l->conn->shown != shown || shown->end - l->pos < 100);
        }
        char rest[20];
        expect(l, 1, i * 100, 100);
        CHECK_OK(ap_conn_consume(l->conn, l->pos, sizeof rest)); /* keeps the streams in step */
        l->pos += sizeof rest;
    }
}

/* A delimiter, an end or a deadline tells no window. */
LINK_TEST(read_token_without_a_window, TCP, HIGH)
{
    ap_token token;
    peer_say(l, 1, 0, 100);
    expect(l, 1, 0, 100);
    CHECK_EQ(find(l, "\n", 100), -EAGAIN);
    peer_send(l, "abc\n", 4);
    settle(w);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.value, 0);
    CHECK_EQ(find(l, "\n", 100), 4);
    l->pos += 4;
    CHECK_EQ(want(l, 100), -EAGAIN);
    peer_close(l);
    UNTIL(w, ap_hub_take(w->hub, &token, 1) == 1);
    CHECK_EQ(token.bits, AP_MAIL_READ);
    CHECK_EQ(token.value, 0);
    CHECK_EQ(want(l, 100), AP_EEOF);
}

TEST(read_before_register_and_without_wait)
{
    struct world *w = world_open();
    int fds[2];
    sockets_of(AP_UNIX, fds);
    struct link l = link_fd(w, AP_UNIX, HIGH, fds[0], fds[1]);
    CHECK_EQ(ap_conn_read(l.conn, 0, 1, AP_NOWAIT, 0, NULL, 0), -EAGAIN);
    CHECK_EQ(l.conn->want, AP_WANT_NOTHING);
    peer_say(&l, 1, 0, 1);
    link_register(&l);
    settle(w);
    CHECK_EQ(mail_of(w, l.id), 0);
    expect(&l, 1, 0, 1);
    link_close(&l);
    world_close(w);
}

LINK_TEST(read_of_nothing, UNIX, HIGH)
{
    ap_view view;
    CHECK_EQ(ap_conn_read(l->conn, 0, 0, 0, 0, NULL, 0), 0); /* L05 */
    CHECK_EQ(ap_conn_block(l->conn, 0, &view), -ENODATA);
    CHECK_EQ(ap_conn_consume(l->conn, 0, 0), 0);
    CHECK_EQ(ap_conn_consume(l->conn, 0, 1), -EINVAL);
    CHECK_EQ(ap_conn_find(l->conn, 0, "", 0, 10, 0, 0, NULL, 0), -EINVAL);
    CHECK_EQ(ap_conn_find(l->conn, 0, "x", 1, 0, 0, 0, NULL, 0), AP_EDELIM);
    peer_close(l);
    CHECK_EQ(want_wait(l, 1), AP_EEOF);
    CHECK_EQ(ap_conn_read(l->conn, 0, 0, 0, 0, NULL, 0), 0);
}

/* ---- contiguity ------------------------------------------------------- */

/* Across blocks a request is merged once, also above the size of the largest block; what was
 * handed out before stays as it was. */
static void merge(size_t n)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, n < HIGH ? HIGH : (uint32_t)n);
    size_t sent = 0;
    while (sent < n) {
        sent += peer_push(&l, 4, sent, n - sent < 3000 ? n - sent : 3000);
        settle(w);
    }
    UNTIL(w, buffered(&l) == (int64_t)n);
    CHECK_EQ(want(&l, 100), 0);
    ap_block *before = l.block;
    uint32_t at = l.pos;
    ap_block_ref(before);
    CHECK_EQ(want(&l, n), 0);
    pattern_check(link_at(&l), 4, 0, n);
    CHECK(l.block != before);
    pattern_check(ap_block_at(before, at), 4, 0, 100);
    ap_block_unref(before);
    l.pos += (uint32_t)n;
    peer_say(&l, 4, n, 5000);
    expect(&l, 4, n, 5000);
    link_close(&l);
    world_close(w);
}

/* Also in more than one hold of the mutex (256 KiB each). */
TEST(read_merges_across_blocks)
{
    static const size_t sizes[] = {10000, 200 * KB, 700 * KB, SANITIZED ? 8 * MB + 1000 : 20 * MB};
    for (size_t i = 0; i < AP_ARRAY_SIZE(sizes); i++)
        merge(sizes[i]);
}

/* An awaited message of a usual size lies in one block, and is not copied together. */
LINK_TEST(read_awaited_message_lies_in_one_block, TCP, HIGH)
{
    for (uint64_t i = 0; i < 10; i++) {
        CHECK_EQ(want(l, 60 * KB), -EAGAIN);
        peer_say(l, 1, i * 60 * KB, 60 * KB);
        await(w, l->id, AP_MAIL_READ);
        ap_poller_stats before = hub_blocks(w);
        expect(l, 1, i * 60 * KB, 60 * KB);
        if (i > 4) /* it has adapted */
            CHECK(hub_blocks(w).blocks_in_use <= before.blocks_in_use);
    }
}

LINK_TEST(read_merge_without_memory_loses_nothing, TCP, HIGH)
{
    for (uint64_t i = 0; i < 10; i++) {
        peer_say(l, 1, i * 3000, 3000);
        UNTIL(w, buffered(l) == (int64_t)(i + 1) * 3000);
    }
    CHECK_OK(ap_fault_set(AP_CALL_MAP, ENOMEM, 0, -1, 0));
    CHECK_EQ(want(l, 30000), -ENOMEM);
    ap_fault_clear();
    expect(l, 1, 0, 30000);
}

/* Without contiguity the caller walks from block to block. */
LINK_TEST(read_scattered_copies_nothing, TCP, HIGH)
{
    for (uint64_t i = 0; i < 20; i++) {
        peer_say(l, 1, i * 3000, 3000);
        UNTIL(w, buffered(l) == (int64_t)(i + 1) * 3000);
    }
    CHECK_OK(ap_conn_read(l->conn, 0, 60000, AP_SCATTER, 0, NULL, 0));
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0);
    uint64_t from = 0;
    while (from < 60000) {
        ap_view view;
        int rc = ap_conn_block(l->conn, l->pos, &view);
        CHECK_OK(rc);
        if (rc == 1) {
            if (l->block)
                ap_block_unref(l->block);
            l->block = view.block;
        }
        pattern_check(ap_block_at(view.block, view.start), 1, from, view.end - view.start);
        from += view.end - view.start;
        l->pos = view.end;
    }
    CHECK_EQ(from, 60000);
    CHECK_EQ(buffered(l), 0);
}

/* ---- the window ------------------------------------------------------- */

/* What is shown beyond a request is bounded, so that what was consumed gets reported. */
LINK_TEST(read_window_is_bounded, TCP, MB)
{
    CHECK_EQ(want(l, 500 * KB), -EAGAIN);
    peer_say(l, 1, 0, 500 * KB);
    await(w, l->id, AP_MAIL_READ);
    int64_t end = ap_conn_read(l->conn, 0, 500 * KB, 0, 0, NULL, 0);
    CHECK(end >> AP_NEW_BLOCK_SHIFT == 1);
    link_fetch(l);
    CHECK_EQ((end & UINT32_MAX) - l->pos, 500 * KB); /* a request is shown whole */
    end = ap_conn_read(l->conn, l->pos, 1, 0, 0, NULL, 0);
    CHECK_EQ(end - l->pos, 64 * KB);
}

LINK_TEST(read_position_counts_as_consumed, TCP, HIGH)
{
    peer_say(l, 1, 0, 1000);
    CHECK_EQ(want_wait(l, 1000), 0);
    l->pos += 300;
    CHECK_EQ(buffered(l), 700);
    CHECK_EQ(link_stats(l).buffered_input, 700);
    CHECK_OK(ap_conn_consume(l->conn, l->pos, 100));
    CHECK_EQ(ap_conn_consume(l->conn, l->pos + 100, 601), -EINVAL);
    l->pos += 100;
    expect(l, 1, 400, 600);
    CHECK_EQ(buffered(l), 0);
}

LINK_TEST(read_same_block_is_handed_out_once, UNIX, HIGH)
{
    ap_view view;
    peer_say(l, 1, 0, 100);
    CHECK_EQ(want_wait(l, 100), 0);
    CHECK_EQ(ap_conn_block(l->conn, l->pos, &view), 0);
    CHECK(view.block == l->block);
    CHECK_EQ(ap_conn_read(l->conn, l->pos, 100, 0, 0, NULL, 0) >> AP_NEW_BLOCK_SHIFT, 0);
    peer_say(l, 1, 100, 100);
    UNTIL(w, buffered(l) == 200);
    CHECK_EQ(ap_conn_block(l->conn, l->pos, &view), 0); /* grown, but the same */
    CHECK_EQ(view.end - view.start, 200);
}

/* ---- searching -------------------------------------------------------- */

/* The memory of how far it was searched belongs to one delimiter and to unread bytes. */
LINK_TEST(find_another_delimiter_begins_anew, TCP, HIGH)
{
    peer_send(l, "a;b,c;d", 7);
    UNTIL(w, buffered(l) == 7);
    CHECK_EQ(find(l, "\n", 100), -EAGAIN);
    CHECK_EQ(find(l, ",", 100), 4);
    CHECK_EQ(find(l, ";", 100), 2);
    l->pos += 2;
    CHECK_EQ(find(l, ";", 100), 4);
    l->pos += 4;
    CHECK_EQ(find(l, ";", 100), -EAGAIN);
}

LINK_TEST(find_delimiter_at_the_limit, TCP, HIGH)
{
    peer_send(l, "12345678\r\n", 10);
    UNTIL(w, buffered(l) == 10);
    CHECK_EQ(find(l, "\r\n", 9), AP_EDELIM);
    CHECK_EQ(find(l, "\r\n", 10), 10);
    CHECK_EQ(find(l, "\r\n", 5), AP_EDELIM);
    peer_close(l);
    CHECK_EQ(find_wait(l, "xx", 100), AP_EEOF);
    CHECK_EQ(find_wait(l, "\r\n", 100), 10); /* what is buffered stays */
}

/* Longer than what is kept inline, and across blocks of the input. */
LINK_TEST(find_long_delimiters_across_blocks, TCP, HIGH)
{
    char delimiter[200], noise[3000];
    memset(delimiter, 'd', 199);
    delimiter[199] = 0;
    memset(noise, 'n', sizeof noise);
    size_t before = 0;
    for (int i = 0; i < 5; i++) {
        peer_send(l, noise, sizeof noise);
        peer_send(l, delimiter, 100);
        before += sizeof noise + 100;
        UNTIL(w, buffered(l) == (int64_t)before);
        CHECK_EQ(find(l, delimiter, 100000), -EAGAIN);
    }
    peer_send(l, noise, 10);
    for (int i = 0; i < 199; i++)
        peer_send(l, "d", 1);
    CHECK_EQ(find_wait(l, delimiter, 100000), before + 10 + 199);
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, -1, 0));
    delimiter[198] = 'e';
    CHECK_EQ(find(l, delimiter, 100000), -ENOMEM);
    ap_fault_clear();
    delimiter[198] = 'd';
    CHECK_EQ(find(l, delimiter, 100000), before + 10 + 199);
}

/* Random lines in random segments. */
LINK_TEST(find_random_lines, TCP, 8 * KB)
{
    uint64_t seed = 12;
    char line[3000];
    for (int i = 0; i < ROUNDS(2000); i++) {
        size_t n = 2 + random_below(&seed, sizeof line - 2);
        for (size_t k = 0; k < n; k++)
            line[k] = (char)('a' + random_below(&seed, 20));
        memcpy(line + n - 2, "\r\n", 2);
        for (size_t done = 0; done < n;) {
            size_t part = 1 + random_below(&seed, n - done);
            peer_send(l, line + done, part);
            done += part;
            if (done < n && random_below(&seed, 2)) {
                int64_t rc = find(l, "\r\n", 4096);
                CHECK(rc == -EAGAIN);
                settle(w);
            }
        }
        CHECK_EQ(find_wait(l, "\r\n", 4096), n);
        CHECK_BYTES(link_at(l), line, n);
        l->pos += (uint32_t)n;
    }
}

/* ---- output that comes along ------------------------------------------ */

LINK_TEST(read_sends_the_output_when_it_waits, TCP, HIGH)
{
    char got[5];
    CHECK_EQ(ap_conn_read(l->conn, 0, 4, 0, 0, "ask 1", 5), -EAGAIN);
    CHECK_EQ(recv(l->peer, got, 5, MSG_WAITALL), 5);
    peer_say(l, 1, 0, 8);
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(mail_of(w, l->id), 0); /* nothing was queued, so nothing is owed */
    expect(l, 1, 0, 4);
    UNTIL(w, buffered(l) == 4);
    CHECK(ap_conn_read(l->conn, l->pos, 4, 0, 0, "ask 2", 5) >= 0); /* met: not sent */
    settle(w);
    CHECK(recv(l->peer, got, 5, MSG_DONTWAIT) < 0 && errno == EAGAIN);
}

LINK_TEST(read_queues_output_that_is_not_taken, UNIX, HIGH)
{
    size_t n = 4 * MB;
    uint8_t *data = pattern_make(6, 0, n);
    CHECK_EQ(ap_conn_find(l->conn, 0, "\n", 1, 10, 0, 0, (char *)data, n), AP_EQUEUED);
    peer_expect(l, 6, 0, n);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
    peer_send(l, "\n", 1);
    await(w, l->id, AP_MAIL_READ);
    free(data);
}

/* ---- deadlines -------------------------------------------------------- */

/* L41: in the past with the bytes there: the bytes; without: the timeout. */
LINK_TEST(read_deadline_in_the_past, TCP, HIGH)
{
    CHECK_EQ(want_until(l, 1, 1), AP_ELATE);
    CHECK_EQ(stats(w).timeouts, 1);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    settle(w);
    CHECK_EQ(want_until(l, 10, 1), 0);
}

LINK_TEST(read_deadline_passes, TCP, HIGH)
{
    for (int i = 0; i < 5; i++) {
        int64_t deadline = ap_now() + 3 * MS;
        int64_t rc = want_until(l, 10, deadline);
        if (rc == -EAGAIN) {
            await(w, l->id, AP_MAIL_READ);
            CHECK(ap_now() >= deadline);
            rc = want_until(l, 10, deadline);
        }
        CHECK_EQ(rc, AP_ELATE);
        settle(w);
        CHECK_EQ(mail_of(w, l->id), 0);
    }
    peer_say(l, 1, 0, 10); /* L31: the next wait is not touched by the last one's end */
    CHECK_EQ(want_until(l, 20, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_say(l, 1, 10, 10);
    expect(l, 1, 0, 20);
}

/* Time 2: at the tie data wins (L41). */
LINK_TEST(read_data_wins_at_the_tie, TCP, HIGH)
{
    int64_t deadline = ap_now() + 2 * MS;
    int64_t rc = want_until(l, 10, deadline);
    if (rc == -EAGAIN)
        await(w, l->id, AP_MAIL_READ); /* told that the deadline has passed ... */
    peer_say(l, 1, 0, 10);
    arrived(l, 10); /* ... and now the bytes come after all */
    settle(w);
    CHECK_EQ(want_until(l, 10, deadline), 0);
}

/* Both at once in one step of the driver: the events come before the timers. */
LINK_TEST(read_data_and_deadline_in_one_step, TCP, HIGH)
{
    settle(w);
    int64_t deadline, rc;
    do { /* until it is armed in time */
        deadline = ap_now() + 20 * MS;
        rc = want_until(l, 10, deadline);
        settle(w);
    } while (mail_of(w, l->id) != 0 || rc != -EAGAIN);
    uint64_t timeouts = stats(w).timeouts;
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    while (ap_now() < deadline + 2 * MS)
        usleep(1000);
    step(w, 0);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_READ);
    CHECK_EQ(want_until(l, 10, deadline), 0);
    CHECK_EQ(stats(w).timeouts, timeouts);
}

/* Entries are lazy: an unchanged timeout costs one entry per timeout and not one per wait, and
 * the driver is not told. */
LINK_TEST(read_deadlines_are_filed_lazily, TCP, HIGH)
{
    for (uint64_t i = 0; i < 500; i++) {
        CHECK_EQ(want_until(l, 10, ap_now() + 30 * 1000 * MS), -EAGAIN);
        if (i == 0) { /* the trim of an empty block is due before, and files once */
            settle(w);
            CHECK_EQ(w->poller->wheel.filed, 1);
        } else if (i > 1) {
            CHECK_EQ(atomic_load(&l->conn->slot.box_bits), 0);
        }
        peer_say(l, 1, i * 10, 10);
        expect(l, 1, i * 10, 10);
        CHECK_EQ(w->poller->wheel.filed, 1);
    }
}

/* A shorter timeout than the one that is filed comes in time, and a longer one is not early. */
LINK_TEST(read_deadlines_in_any_order, TCP, HIGH)
{
    static const int ms[] = {3600000, 4, 20, 3, 3600000, 5, 9, 6};
    for (size_t i = 0; i < AP_ARRAY_SIZE(ms); i++) {
        int64_t deadline = ap_now() + ms[i] * MS;
        int64_t rc = want_until(l, 10, deadline);
        if (ms[i] > 1000) {
            CHECK_EQ(rc, -EAGAIN);
            settle(w);
            CHECK_OK(ap_conn_disarm_read(l->conn));
            continue;
        }
        if (rc == -EAGAIN)
            await(w, l->id, AP_MAIL_READ);
        CHECK(ap_now() >= deadline);
        CHECK_EQ(want_until(l, 10, deadline), AP_ELATE);
    }
}

/* ---- detach ----------------------------------------------------------- */

/* O24: what was read ahead goes along. */
LINK_TEST(read_rest_of_a_detached_connection, TCP, HIGH)
{
    char *rest = malloc(30000);
    peer_say(l, 1, 0, 30000);
    UNTIL(w, buffered(l) == 30000);
    expect(l, 1, 0, 1000);
    CHECK_EQ(ap_conn_detach(l->conn, l->pos), l->fd);
    CHECK_EQ(ap_conn_rest(l->conn, rest, 5000), 5000);
    CHECK_EQ(ap_conn_rest(l->conn, rest + 5000, 30000), 24000);
    CHECK_EQ(ap_conn_rest(l->conn, rest, 1), 0);
    pattern_check(rest, 1, 1000, 29000);
    peer_say(l, 1, 30000, 10);
    CHECK_EQ(recv(l->fd, rest, 10, 0), 10); /* and the descriptor works */
    pattern_check(rest, 1, 30000, 10);
    close(l->fd);
    free(rest);
}
