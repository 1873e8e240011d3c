/* serve.c: the idle end. */
#include "fixture.h"

#define COARSE (10 * MS) /* the coarse clock's resolution, at most */

/* L48, O27: a live but silent peer; what was received stays readable, and the peer sees the end. */
LINK_TEST(connection_idle_end, STREAMS, HIGH)
{
    peer_say(l, 1, 0, 100);
    UNTIL(w, buffered(l) == 100);
    int64_t from = ap_now();
    CHECK_OK(ap_conn_set_idle(l->conn, 30 * MS));
    await(w, l->id, AP_MAIL_IDLE);
    CHECK(ap_now() - from >= 30 * MS - COARSE);
    CHECK(ap_conn_status(l->conn) & AP_IS_IDLE_END);
    CHECK(ap_conn_status(l->conn) & AP_IS_BROKEN);
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), AP_EIDLE);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), AP_EIDLE);
    expect(l, 1, 0, 100);
    CHECK_EQ(want(l, 1), AP_EIDLE);
    peer_expect_eof(l);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0); /* once */
}

LINK_TEST(connection_idle_end_wakes_everybody, TCP, HIGH)
{
    stall(l, much());
    CHECK_EQ(want(l, 1), -EAGAIN);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN);
    CHECK_OK(ap_conn_set_idle(l->conn, 10 * MS));
    uint32_t all = AP_MAIL_IDLE | AP_MAIL_READ | AP_MAIL_WRITE | AP_MAIL_SENT;
    UNTIL(w, (collect(w), (mail_at(w, l->id)->bits & all) == all));
}

/* Bytes in either direction postpone it, by an entry that is looked at and filed again. */
LINK_TEST(connection_activity_postpones_the_idle_end, TCP, HIGH)
{
    const int64_t idle = 60 * MS;
    for (int writing = 0; writing < 2; writing++) {
        int64_t last = ap_now(), begin = last;
        uint32_t bits = 0;
        CHECK_OK(ap_conn_set_idle(l->conn, idle));
        while (!bits && ap_now() - begin < 4 * idle) {
            last = ap_now();
            if (writing)
                CHECK(ap_conn_write(l->conn, "x", 1) >= 0 || mail_of(w, l->id));
            else
                CHECK(send(l->peer, "x", 1, MSG_NOSIGNAL) == 1);
            step(w, 5);
            bits = mail_of(w, l->id) & AP_MAIL_IDLE;
        }
        if (!bits)
            await(w, l->id, AP_MAIL_IDLE);
        CHECK(ap_now() - last >= idle - COARSE); /* a busy machine may be late, never early */
        link_close(l);
        *l = link_open(w, AP_UNIX, HIGH);
    }
}

LINK_TEST(connection_idle_can_be_taken_back, TCP, HIGH)
{
    CHECK_EQ(ap_conn_set_idle(l->conn, -1), -EINVAL);
    CHECK_OK(ap_conn_set_idle(l->conn, 5 * MS));
    CHECK_OK(ap_conn_set_idle(l->conn, 0));
    for (int64_t end = ap_now() + 30 * MS; ap_now() < end;)
        step(w, 5);
    CHECK_EQ(mail_of(w, l->id), 0);
    CHECK_EQ(w->poller->wheel.filed, 0); /* the entry was looked at and dropped */
}

static int64_t expire(struct link *l, int64_t now)
{
    ap_slot *slot = &l->conn->slot;
    ap_slot_lock(slot);
    int64_t next = slot->ops->expire(slot, now);
    ap_slot_unlock(slot);
    return next;
}

/* All that has come so far. */
static size_t peer_take(struct link *l)
{
    static char chunk[64 * 1024];
    size_t n = 0;
    for (ssize_t got; (got = recv(l->peer, chunk, sizeof chunk, MSG_DONTWAIT)) > 0;)
        n += (size_t)got;
    return n;
}

/* Neither input nor room that no step knows of yet is the silence that the timer has found. */
LINK_TEST(connection_news_postpones_the_idle_end, STREAMS, HIGH)
{
    const int64_t idle = 3600 * 1000 * MS, later = ap_now() + 2 * idle;
    size_t taken = 0;
    stall(l, much());
    CHECK_OK(ap_conn_set_idle(l->conn, idle));
    taken += peer_take(l);
    CHECK(!(ready_flags(l) & AP_WRITABLE));
    CHECK(expire(l, later) > later);
    CHECK_EQ(l->conn->read_end, 0);
    UNTIL(w, (taken += peer_take(l)) == MUCH);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    CHECK(!(ready_flags(l) & AP_READABLE));
    CHECK(expire(l, later) > later);
    CHECK_EQ(l->conn->read_end, 0);
    UNTIL(w, link_stats(l).bytes_received == 1);
    CHECK_EQ(expire(l, later), AP_FOREVER);
    CHECK_EQ(l->conn->read_end, AP_EIDLE);
}
