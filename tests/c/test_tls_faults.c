/* TLS sessions without a thread, memory, or system calls that work. */
#include "sessions.h"

/* ---- handshakes and the poller's jobs -------------------------------------- */

TEST(a_poller_stops_with_handshakes_in_its_queue)
{
    enum { MANY = 20 };
    tls_load();
    struct world *w = world_open();
    struct session s[MANY];
    world_start(w);
    for (int i = 0; i < MANY; i++) {
        session_open(&s[i], w, AP_TCP, TLS13, i & 1);
        session_start(&s[i], 0);
        peer_turn(&s[i]);
    }
    world_stop(w);
    for (int i = 0; i < MANY; i++)
        session_close(&s[i]);
    world_close(w);
}

/* Nothing moves any more. */
TEST(a_stopped_poller_makes_no_handshake)
{
    tls_load();
    struct world *w = world_open();
    struct session s;
    CHECK_OK(ap_poller_stop(w->poller));
    session_open(&s, w, AP_TCP, TLS13, false);
    session_start(&s, 0);
    settle(w);
    CHECK_EQ(unread_in_kernel(s.l.peer), 0);
    session_close(&s);
    world_close(w);
}

/* Whoever finds that there is something to do computes. */
static void without_a_thread(size_t cut)
{
    tls_load();
    struct world *w = world_open();
    for (int i = 0; i < 4; i++) {
        struct session s;
        session_open(&s, w, AP_TCP, i & 1 ? TLS12 : TLS13, i & 2);
        s.cut = cut;
        CHECK_OK(ap_fault_set(AP_CALL_THREAD, EAGAIN, 0, -1, 0));
        session_start(&s, 0);
        shake_hands(&s);
        CHECK(ap_fault_hits(AP_CALL_THREAD) > 0);
        ap_fault_clear();
        peer_tells(&s, 1, 0, 1000);
        hear(&s, 1, 0, 1000);
        session_close(&s);
    }
    world_close(w);
}

TEST(there_is_no_thread_for_handshakes)
{
    without_a_thread(0);
}

TEST(there_is_no_thread_for_handshakes_in_pieces)
{
    without_a_thread(50);
}

/* A peer can send messages without end that a handshake skips. */
TEST(an_endless_handshake_lets_others_have_their_turn)
{
    static const uint8_t hello_request[] = {22, 3, 3, 0, 4, 0, 0, 0, 0};
    tls_load();
    struct world *w = world_open();
    struct session s;
    char memory[900];
    for (size_t i = 0; i < sizeof memory; i++)
        memory[i] = (char)hello_request[i % sizeof hello_request];
    session_open(&s, w, AP_TCP, TLS12, false);
    int much_room = 4 << 20;
    setsockopt(s.l.fd, SOL_SOCKET, SO_RCVBUF, &much_room, sizeof much_room);
    uint64_t sent = 0, before = 0;
    for (ssize_t n; (n = send(s.l.peer, memory, sizeof memory, MSG_DONTWAIT)) > 0;)
        sent += (uint64_t)n;
    arrived(&s.l, AP_BOUND + 64 * 1024);
    CHECK_OK(ap_fault_set(AP_CALL_THREAD, EAGAIN, 0, -1, 0));
    session_start(&s, 0);
    for (; before < sent; step(w, 0)) {
        uint64_t received = link_stats(&s.l).bytes_received;
        CHECK(received - before <= AP_BOUND); /* at once */
        before = received;
    }
    CHECK_EQ(status_of(&s).phase, AP_TLS_SHAKING);
    ap_fault_clear();
    session_close(&s);
    world_close(w);
}

/* ---- no memory ---------------------------------------------------------------- */

/* All that a session does, until something fails. */
static void live(struct session *s)
{
    ap_conn *conn = s->l.conn;
    int64_t rc;
    uint8_t *said = pattern_make(2, 0, 100000);
    if (ap_conn_start_tls(conn, 0, s->ssl, ossl.SSL_is_server(s->ssl) ? AP_TLS_SERVER : 0) < 0)
        goto over;
    if (shake(s) < 0)
        goto over;
    MEANWHILE(s, s->result == 1 || s->error == AP_OSSL_ERROR_SSL ||
                     ap_conn_status(conn) & AP_IS_BROKEN);
    if (s->result != 1 || ap_conn_write(conn, (char *)said, 100000) < 0)
        goto over;
    peer_encrypt(s, 1, 0, 100000);
    while ((rc = want(&s->l, 50000)) == -EAGAIN)
        MEANWHILE(s, told(s, AP_MAIL_READ));
    if (rc < 0)
        goto over;
    pattern_check(link_at(&s->l), 1, 0, 50000);
    MEANWHILE(s, ap_conn_queued(conn) == 0);
    while (ap_ssl.read(s->peer, said, 1000) > 0)
        ;
    ap_ssl.shutdown(s->peer);
    link_drop_block(&s->l);
    while ((rc = want(&s->l, 100001)) == -EAGAIN)
        MEANWHILE(s, told(s, AP_MAIL_READ));
    CHECK(rc < 0);
    if (rc != AP_EEOF || ap_conn_say_goodbye(conn) < 0)
        goto over;
    MEANWHILE(s, ap_conn_queued(conn) == 0);
    CHECK_OK(ap_conn_consume(conn, 0, (size_t)buffered(&s->l)));
    ap_conn_end_tls(conn, 0);
over:
    link_drop_block(&s->l);
    CHECK_OK(ap_conn_close(conn, 0, 0)); /* said goes */
    free(said);
}

/* After skip allocations one fails. False: there were not so many. */
static bool live_without(int call, int skip, bool server)
{
    struct world *w = world_open();
    struct session s;
    session_open(&s, w, AP_TCP, TLS13, server);
    CHECK_OK(ap_fault_set(call, ENOMEM, skip, 1, 0));
    live(&s);
    bool hit = ap_fault_hits(call) > 0;
    ap_fault_clear();
    session_close(&s);
    world_close(w);
    return hit;
}

TEST(any_allocation_may_fail)
{
    tls_load();
    for (int skip = 0; live_without(AP_CALL_ALLOC, skip, skip & 1); skip++)
        CHECK(skip < 1000);
}

TEST(any_block_may_fail)
{
    tls_load();
    for (int skip = 0; live_without(AP_CALL_MAP, skip, true); skip++)
        CHECK(skip < 1000);
}

TEST(any_system_call_may_fail)
{
    static const int calls[] = {AP_CALL_READ, AP_CALL_WRITE, AP_CALL_SHUTDOWN, AP_CALL_EPOLL_CTL,
                                AP_CALL_IOCTL};
    tls_load();
    for (size_t i = 0; i < AP_ARRAY_SIZE(calls); i++) {
        for (int skip = 0; live_without(calls[i], skip, skip & 1); skip++)
            CHECK(skip < 1000);
    }
}
