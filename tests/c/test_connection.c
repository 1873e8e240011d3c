/* connection.c: its counters, and how the end of its peer is learned. */
#include "fixture.h"

LINK_TEST(connection_counts_itself, TCP, HIGH)
{
    int64_t before = ap_now_coarse();
    peer_say(l, 1, 0, 500);
    expect(l, 1, 0, 200);
    CHECK_EQ(ap_conn_write(l->conn, "abc", 3), 0);
    ap_conn_stats s = link_stats(l);
    CHECK_EQ(s.bytes_received, 500);
    CHECK_EQ(s.bytes_sent, 3);
    CHECK_EQ(s.writes, 1);
    CHECK(s.reads >= 1);
    CHECK_EQ(s.buffered_input, 300);
    CHECK(s.created_at <= ap_now() && s.last_activity >= before);
    CHECK_EQ(stats(w).bytes_received, 500);
    CHECK_EQ(stats(w).connections, 1);
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
LINK_TEST(watch_too_late, TCP, HIGH)
{
    settle(w);
    peer_close(l);
    UNTIL(w, ap_conn_status(l->conn) & AP_IS_GONE);
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_GONE, 0); /* nobody has asked */
    CHECK_OK(ap_conn_watch_peer(l->conn));
    gone_once(l);
}

/* What this side has done is no departure: the end of its output, an idle end. */
LINK_TEST(watch_own_ends, TCP, HIGH)
{
    CHECK_OK(ap_conn_watch_peer(l->conn));
    CHECK_OK(shutdown(l->fd, SHUT_WR));
    settle(w);
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_GONE, 0);
    CHECK_OK(ap_conn_set_idle(l->conn, MS));
    await(w, l->id, AP_MAIL_IDLE);
    settle(w);
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_GONE, 0);
    CHECK(!(ap_conn_status(l->conn) & AP_IS_GONE));
}

/* What was known before an own end is known behind it. */
LINK_TEST(watch_own_ends_hide_nothing, TCP, HIGH)
{
    CHECK_OK(ap_conn_set_idle(l->conn, MS));
    CHECK_OK(ap_conn_watch_peer(l->conn));
    peer_close(l);
    gone_once(l);
    await(w, l->id, AP_MAIL_IDLE);
    CHECK(ap_conn_status(l->conn) & AP_IS_GONE);
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

static int64_t by_reading(struct link *l)
{
    if (l->conn->type != AP_SEQPACKET)
        return want(l, 1);
    ap_view view;
    int none = 0;
    return ap_conn_receive(l->conn, 1, 0, &view, &none, &none);
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
