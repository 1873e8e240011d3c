/* How TLS sessions end: by a close_notify, or without one. */
#include "sessions.h"

static void peer_shuts_session(struct session *s)
{
    ap_ssl.err_clear();
    CHECK(ap_ssl.shutdown(s->peer) >= 0);
    peer_flush(s);
}

/* ---- close_notify --------------------------------------------------------- */

static void both_say_goodbye(struct session *s, bool peer_first)
{
    peer_tells(s, 1, 0, 100);
    if (peer_first)
        peer_shuts_session(s);
    else
        CHECK_EQ(ap_conn_say_goodbye(s->l.conn), 0);
    hear(s, 1, 0, 100);
    if (peer_first) {
        ends_with(s, AP_EEOF);
        uint8_t *said = tell(s, 2, 0, 100); /* one direction is enough */
        peer_hears(s, 2, 0, 100);
        free(said);
        CHECK_EQ(status_of(s).phase, AP_TLS_ENDED);
        CHECK_EQ(ap_conn_say_goodbye(s->l.conn), 0);
        MEANWHILE(s, peer_was_left(s));
    } else {
        MEANWHILE(s, peer_was_left(s));
        peer_tells(s, 1, 100, 100);
        hear(s, 1, 100, 100);
        peer_shuts_session(s);
        ends_with(s, AP_EEOF);
    }
    CHECK_EQ(ap_conn_say_goodbye(s->l.conn), 0);
    CHECK_EQ(ap_conn_write(s->l.conn, "a", 1), -EPIPE);
    CHECK(ap_conn_status(s->l.conn) & AP_IS_SHUT);
}

SESSION_TEST(the_peer_says_goodbye_first, TLS12, true)
{
    both_say_goodbye(s, true);
}

SESSION_TEST(the_peer_says_goodbye_last, TLS13, true)
{
    both_say_goodbye(s, false);
}

/* It goes behind the output, which may have to wait. */
SESSION_TEST(goodbye_comes_last, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, EAGAIN, 0, 1, 0));
    uint8_t *said = tell(s, 2, 0, 1000);
    ap_fault_clear();
    int64_t queued = ap_conn_queued(conn);
    CHECK(queued > 1000);
    CHECK_EQ(ap_conn_drain(conn, 0, 0), -EAGAIN);
    CHECK(ap_conn_say_goodbye(conn) > queued);
    kick(&s->l);
    peer_hears(s, 2, 0, 1000);
    MEANWHILE(s, peer_was_left(s));
    CHECK_EQ(await(w, s->l.id, AP_MAIL_SENT | AP_MAIL_WRITE), AP_MAIL_SENT | AP_MAIL_WRITE);
    free(said);
}

SESSION_TEST(goodbye_waits_for_output, TLS13, true)
{
    s->deaf = true;
    CHECK(ap_conn_write(s->l.conn, (char *)much(), MUCH) > 0);
    CHECK_EQ(ap_conn_say_goodbye(s->l.conn), -EBUSY);
    s->deaf = false;
    peer_hears(s, 1, 0, MUCH);
    MEANWHILE(s, ap_conn_queued(s->l.conn) == 0);
    CHECK_EQ(ap_conn_say_goodbye(s->l.conn), 0);
    MEANWHILE(s, peer_was_left(s));
}

/* The kernel has no room just then: that is remembered, and nothing else is queued. */
SESSION_TEST(goodbye_finds_no_room, TLS13, true)
{
    ap_slot_lock(&s->l.conn->slot);
    s->l.conn->slot.ready &= (uint8_t)~AP_WRITABLE;
    ap_slot_unlock(&s->l.conn->slot);
    CHECK(ap_conn_say_goodbye(s->l.conn) > 0);
    kick(&s->l);
    MEANWHILE(s, peer_was_left(s));
    CHECK_EQ(ap_conn_queued(s->l.conn), 0);
}

/* Whoever is at the socket when there is room sends: Python is told all the same. */
SESSION_TEST(goodbye_sends_what_was_queued, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, EAGAIN, 0, 1, 0));
    uint8_t *said = tell(s, 2, 0, 1000);
    ap_fault_clear();
    ap_slot_lock(&conn->slot);
    conn->slot.ready |= AP_WRITABLE; /* an event has come, and the slot's turn has not */
    ap_slot_unlock(&conn->slot);
    CHECK_EQ(ap_conn_say_goodbye(conn), 0);
    kick(&s->l);
    settle(w);
    CHECK(told(s, AP_MAIL_SENT));
    peer_hears(s, 2, 0, 1000);
    free(said);
}

SESSION_TEST(no_fin_comes_before_the_goodbye, TLS13, true)
{
    CHECK_EQ(ap_conn_shutdown(s->l.conn), -EBUSY);
    free(tell(s, 1, 0, 10));
    peer_hears(s, 1, 0, 10);
}

/* ---- the connection afterwards --------------------------------------------- */

SESSION_TEST(plain_bytes_follow, TLS13, true)
{
    struct link *l = &s->l;
    CHECK_EQ(ap_conn_end_tls(l->conn, 0), -EBUSY);
    peer_tells(s, 1, 0, 10);
    ap_ssl.shutdown(s->peer);
    char memory[1000];
    int n = ossl.BIO_read(s->out, memory, sizeof memory);
    memcpy(memory + n, "plain", 5);
    peer_send(l, memory, (size_t)n + 5); /* in one piece */
    settle(w);
    CHECK_EQ(ap_conn_say_goodbye(l->conn), 0);
    CHECK_EQ(ap_conn_end_tls(l->conn, l->pos), -EBUSY); /* not all is read */
    hear(s, 1, 0, 10);
    ends_with(s, AP_EEOF);
    link_drop_block(l);
    CHECK_EQ(ap_conn_end_tls(l->conn, 0), 0);
    CHECK_EQ(status_of(s).phase, AP_TLS_NONE);
    CHECK_EQ(want_wait(l, 5), 0);
    CHECK_BYTES(link_at(l), "plain", 5);
    l->pos += 5;
    CHECK_EQ(ap_conn_write(l->conn, "also", 4), 0);
    peer_send(l, "more", 4);
    CHECK_EQ(want_wait(l, 4), 0);
    CHECK_BYTES(link_at(l), "more", 4);
    CHECK_OK(shutdown(l->peer, SHUT_WR));
    CHECK_EQ(want_wait(l, 5), AP_EEOF);
}

/* The end of the session is not that of the connection, where more may have come. */
SESSION_TEST(the_connection_lingers, TLS13, true)
{
    struct link *l = &s->l;
    peer_shuts_session(s);
    ends_with(s, AP_EEOF);
    CHECK_EQ(ap_conn_say_goodbye(l->conn), 0);
    peer_send(l, "more", 4);
    arrived(l, 4);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), -EAGAIN);
    UNTIL(w, unread_in_kernel(l->fd) == 0);
    CHECK_EQ(mail_of(w, l->id), 0);
    CHECK_OK(shutdown(l->peer, SHUT_WR));
    await(w, l->id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), 0);
}

/* Another session can follow, and what has come of it is not lost. */
SESSION_TEST(another_session_follows, TLS13, true)
{
    struct link *l = &s->l;
    ap_ossl_ssl *old[] = {s->ssl, s->peer};
    peer_shuts_session(s);
    ends_with(s, AP_EEOF);
    CHECK_EQ(ap_conn_say_goodbye(l->conn), 0);
    CHECK_EQ(ap_conn_end_tls(l->conn, l->pos), 0);
    MEANWHILE(s, peer_was_left(s));
    s->ssl = ossl.SSL_new(s->ctx);
    s->peer = ossl.SSL_new(s->ctx);
    s->in = ossl.BIO_new(ossl.BIO_s_mem());
    s->out = ossl.BIO_new(ossl.BIO_s_mem());
    ap_ssl.set_bio(s->peer, s->in, s->out);
    ossl.SSL_set_accept_state(s->ssl);
    ossl.SSL_set_connect_state(s->peer);
    s->result = 0;
    peer_turn(s);
    UNTIL(w, buffered(l) > 0); /* its hello is read as plain bytes */
    session_start(s, 0);
    shake_hands(s);
    peer_tells(s, 1, 0, 100);
    hear(s, 1, 0, 100);
    ap_ssl.free(old[0]);
    ap_ssl.free(old[1]);
}

/* Nobody would look after it. */
SESSION_TEST(the_session_of_a_failed_poller_does_not_end, TLS13, true)
{
    struct link *l = &s->l;
    peer_shuts_session(s);
    ends_with(s, AP_EEOF);
    CHECK_EQ(ap_conn_say_goodbye(l->conn), 0);
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, EBADF, 0, 1, 0));
    ap_poller_step(w->poller, 0, BUDGET);
    ap_fault_clear();
    CHECK(told(s, AP_MAIL_FAILED));
    CHECK_EQ(ap_conn_end_tls(l->conn, l->pos), AP_EPOLLER - EBADF);
    session_close(s);
    ap_hub_kill(w->hub);
    ap_poller_stop(w->poller);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    check_leave(0);
}

/* ---- a FIN ----------------------------------------------------------------- */

SESSION_TEST(a_fin_is_no_goodbye, TLS13, true)
{
    peer_tells(s, 1, 0, 10);
    CHECK_OK(shutdown(s->l.peer, SHUT_WR));
    hear(s, 1, 0, 10);
    ends_with(s, AP_ECUT);
    CHECK(ap_conn_status(s->l.conn) & AP_IS_GONE);
}

NEW_SESSION_TEST(a_fin_may_be_as_good, TLS13, true)
{
    session_start(s, AP_TLS_RAGGED);
    shake_hands(s);
    CHECK_OK(shutdown(s->l.peer, SHUT_WR));
    ends_with(s, AP_EEOF);
}

/* After each number of bytes of the peer's first flight. */
static void fin_in_the_handshake(int flags, int result)
{
    tls_load();
    struct world *w = world_open();
    for (size_t cut = 0; cut < 300; cut += 37) {
        struct session s;
        char memory[300];
        session_open(&s, w, AP_TCP, TLS13, true);
        session_start(&s, flags);
        CHECK_EQ(ap_conn_shake(s.l.conn, 0, 0), -EAGAIN);
        ap_ssl.do_handshake(s.peer);
        int n = ossl.BIO_read(s.out, memory, (int)cut);
        if (n > 0)
            peer_send(&s.l, memory, (size_t)n);
        settle(w);
        UNTIL(w, (bool)status_of(&s).begun == (cut > 0 && cut < 200) || cut >= 200);
        CHECK_OK(shutdown(s.l.peer, SHUT_WR));
        await(w, s.l.id, AP_MAIL_READ);
        CHECK_EQ(ap_conn_shake(s.l.conn, 0, 0), result);
        CHECK_EQ(want(&s.l, 1), result);
        session_close(&s);
    }
    world_close(w);
}

TEST(a_fin_in_the_handshake)
{
    fin_in_the_handshake(0, AP_ECUT);
}

TEST(a_fin_in_the_handshake_may_be_as_good)
{
    fin_in_the_handshake(AP_TLS_RAGGED, AP_EEOF);
}

/* It was read before the session began. */
static void fin_before(struct session *s, int flags, int result)
{
    CHECK_OK(shutdown(s->l.peer, SHUT_WR));
    UNTIL(s->l.w, ap_conn_status(s->l.conn) & AP_IS_EOF);
    session_start(s, flags);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, 0), result);
    CHECK(ap_conn_write(s->l.conn, "a", 1) < 0);
}

NEW_SESSION_TEST(a_fin_before_the_handshake, TLS13, true)
{
    fin_before(s, 0, AP_ECUT);
}

NEW_SESSION_TEST(a_fin_before_the_handshake_may_be_as_good, TLS13, false)
{
    fin_before(s, AP_TLS_RAGGED, AP_EEOF);
}

NEW_SESSION_TEST(a_reset_in_the_handshake, TLS13, true)
{
    session_start(s, 0);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, 0), -EAGAIN);
    peer_reset(&s->l);
    await(w, s->l.id, AP_MAIL_READ);
    CHECK_EQ(ap_conn_shake(s->l.conn, 0, 0), -ECONNRESET);
}
