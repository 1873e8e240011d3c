/* Input that goes straight from the socket into the memory of who asks for it. */
#include "fixture.h"

#define PIECE (64 * KB)
#define PART (20 * KB)

static char memory[PIECE];

/* As receive() asks: 0, the socket is to be read; the end of a window; or the error. */
static int64_t ask(struct link *l)
{
    int64_t result = ap_conn_read(l->conn, l->pos, 1, AP_STRAIGHT, 0, NULL, 0);
    if (result == 0 && l->block) { /* what was shown is not kept */
        ap_block_unref(l->block);
        l->block = NULL;
        l->pos = 0;
    }
    return result;
}

/* Makes it a connection on which much arrives, of a loop that drives. */
static void grow(struct world *w, struct link *l)
{
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
    peer_say(l, 1, 0, 2 * PIECE);
    expect(l, 1, 0, 2 * PIECE);
    while (l->conn->grow < PIECE) {
        peer_say(l, 1, 0, PIECE);
        expect(l, 1, 0, PIECE);
    }
    settle(w);
    CHECK_EQ(ask(l), -EAGAIN);
    CHECK(l->conn->straight);
}

static int64_t take(struct link *l, size_t most)
{
    return ap_conn_read_straight(l->conn, l->pos, memory, most);
}

LINK_TEST(straight_into_memory, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, 1000);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(unread_in_kernel(l->fd), 1000); /* the driver has left it there */
    CHECK_EQ(ask(l), 0);
    uint64_t reads = link_stats(l).reads;
    CHECK_EQ(take(l, PIECE), 1000);
    pattern_check(memory, 1, 0, 1000);
    CHECK_EQ(link_stats(l).reads, reads + 1);
    CHECK_EQ(bytes_in_use(w), 0); /* no block */
    uint64_t again = stats(w).again;
    CHECK_EQ(ask(l), -EAGAIN); /* a short read has said so: no second one that finds nothing */
    CHECK_EQ(stats(w).again, again);
}

LINK_TEST(straight_nothing_is_there, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, PIECE);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    arrived(l, PIECE);
    CHECK_EQ(ask(l), 0);
    CHECK_EQ(take(l, PIECE), (int64_t)PIECE);
    CHECK_EQ(ask(l), 0); /* it was filled: there may be more */
    CHECK_EQ(take(l, PIECE), -EAGAIN);
    CHECK_EQ(ask(l), -EAGAIN);
}

/* Whoever does not ask in this way gets what is there as ever, and reading ahead begins again. */
LINK_TEST(straight_ends_with_another_request, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, PART);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    expect(l, 1, 0, PART);
    peer_say(l, 1, PART, PART);
    arrived(l, PART);
    settle(w);
    CHECK_EQ(unread_in_kernel(l->fd), 0);
    expect(l, 1, PART, PART);

    CHECK_EQ(ask(l), -EAGAIN);
    CHECK(l->conn->straight);
    CHECK_EQ(ap_conn_find(l->conn, l->pos, "\n", 1, 100, 0, 0, NULL, 0), -EAGAIN);
    CHECK(!l->conn->straight);
}

/* What is buffered comes first, and is not added to. */
LINK_TEST(straight_after_what_is_buffered, TCP, HIGH)
{
    grow(w, l);
    CHECK_EQ(want(l, PART), -EAGAIN);
    peer_say(l, 1, 0, PART);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK(ask(l) > 0);
    peer_say(l, 1, PART, PART);
    arrived(l, PART);
    settle(w);
    CHECK_EQ(take(l, 500), 500);
    CHECK_EQ(take(l, PIECE), (int64_t)PART - 500);
    CHECK_EQ(take(l, PIECE), (int64_t)PART);
    pattern_check(memory, 1, PART, PART);
}

LINK_TEST(straight_queries_read_it, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, 1000);
    arrived(l, 1000);
    CHECK_EQ(buffered(l), 1000);
    peer_say(l, 1, 1000, 10);
    arrived(l, 10);
    CHECK_EQ(buffered(l), 1010);
    expect(l, 1, 0, 1010);
}

/* A wait that has begun is over all the same, though the socket is not readable any more. */
LINK_TEST(straight_queries_do_not_disturb_a_wait, TCP, HIGH)
{
    grow(w, l);
    CHECK_EQ(ask(l), -EAGAIN);
    CHECK_EQ(buffered(l), 0);
    peer_say(l, 1, 0, 1000);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(unread_in_kernel(l->fd), 0);
    CHECK(ask(l) > 0);
    expect(l, 1, 0, 1000);
}

LINK_TEST(straight_bytes_that_are_put_back, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, PIECE);
    arrived(l, PIECE);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(ask(l), 0);
    CHECK_EQ(take(l, PART), (int64_t)PART);
    CHECK_OK(ap_conn_put_back(l->conn, memory, PART));
    expect(l, 1, 0, PIECE);

    CHECK_EQ(ask(l), -EAGAIN);
    peer_say(l, 1, 0, PIECE);
    arrived(l, PIECE);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(ask(l), 0);
    CHECK_EQ(take(l, PART), (int64_t)PART);
    CHECK_EQ(buffered(l), (int64_t)(PIECE - PART)); /* the rest is read: they go in front of it */
    CHECK_OK(ap_conn_put_back(l->conn, memory, PART));
    expect(l, 1, 0, PIECE);
}

LINK_TEST(straight_bytes_of_a_closed_connection, TCP, HIGH)
{
    ap_conn_close(l->conn, 0, 0);
    CHECK_EQ(ap_conn_put_back(l->conn, "x", 1), -EBADF);
}

LINK_TEST(straight_bytes_that_cannot_be_put_back, TCP, HIGH)
{
    grow(w, l);
    CHECK_OK(ap_fault_set(AP_CALL_MAP, ENOMEM, 0, -1, 0));
    int rc = ap_conn_put_back(l->conn, memory, MB);
    ap_fault_clear();
    CHECK_EQ(rc, -ENOMEM);
    CHECK_EQ(ask(l), -ENOMEM);
}

LINK_TEST(straight_until_the_peer_ends, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, 1000);
    peer_close(l);
    arrived_event(l, POLLRDHUP);
    settle(w);
    CHECK_EQ(unread_in_kernel(l->fd), 0); /* there is no more to come: the end is to be known */
    CHECK(ap_conn_status(l->conn) & AP_IS_EOF);
    expect(l, 1, 0, 1000);
    CHECK_EQ(ask(l), AP_EEOF);
}

LINK_TEST(straight_until_a_reset, TCP, HIGH)
{
    grow(w, l);
    peer_say(l, 1, 0, 1000);
    arrived(l, 1000);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(ask(l), 0);
    peer_reset(l);
    arrived_event(l, POLLERR);
    CHECK_EQ(take(l, PIECE), 1000); /* it came before the RST */
    CHECK_EQ(take(l, PIECE), -ECONNRESET);
    CHECK_EQ(ask(l), -ECONNRESET);
}

LINK_TEST(straight_timeout, TCP, HIGH)
{
    grow(w, l);
    CHECK_EQ(ap_conn_read(l->conn, 0, 1, AP_STRAIGHT, ap_now() + MS, NULL, 0), -EAGAIN);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(ap_conn_read(l->conn, 0, 1, AP_STRAIGHT, ap_now() - 1, NULL, 0), AP_ELATE);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    settle(w);
    CHECK_EQ(ap_conn_read(l->conn, 0, 1, AP_STRAIGHT, ap_now() - 1, NULL, 0), 0); /* data wins */
}

/* What has come counts as activity, though it is not read. */
LINK_TEST(straight_idle_timeout, TCP, HIGH)
{
    grow(w, l);
    CHECK_OK(ap_conn_set_idle(l->conn, 1000 * 1000 * MS));
    int64_t before = l->conn->idle_from;
    UNTIL(w, ap_now_coarse() > before);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    settle(w);
    CHECK(l->conn->idle_from > before);
    CHECK_EQ(unread_in_kernel(l->fd), 10);
}

/* A thread that drives has a core of its own, and reads ahead. */
LINK_TEST(straight_only_if_the_loop_drives, TCP, HIGH)
{
    grow(w, l);
    CHECK_OK(ap_poller_lend(w->poller, NULL));
    peer_say(l, 1, 0, 1000);
    arrived(l, 1000);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK(ask(l) > 0);
    CHECK(!l->conn->straight);
    expect(l, 1, 0, 1000);
}

LINK_TEST(straight_only_where_much_arrives, STREAMS, HIGH)
{
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
    CHECK_EQ(ask(l), -EAGAIN);
    peer_say(l, 1, 0, 1000);
    arrived(l, 1000);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK(ask(l) > 0);
    link_fetch(l);
    expect(l, 1, 0, 1000);
}

LINK_TEST(straight_until_little_arrives, TCP, HIGH)
{
    grow(w, l);
    for (uint64_t i = 0; ask(l) == -EAGAIN && l->conn->straight; i++) {
        CHECK(i < 20);
        peer_say(l, 1, i, 1);
        CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
        CHECK_EQ(ask(l), 0);
        CHECK_EQ(take(l, PIECE), 1);
    }
}
