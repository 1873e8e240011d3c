/* TLS sessions that are left in the middle, by whatever thread, and forks. */
#include "sessions.h"

#include <pthread.h>

/* ---- a session that is left where it is ---------------------------------- */

enum leave { BY_CLOSE, BY_RESET, BY_KILL, BY_STOP, BY_PEER, WAYS };

static void leave(struct world *w, struct session *s, enum leave way)
{
    switch (way) {
    case BY_CLOSE: CHECK_OK(ap_conn_close(s->l.conn, 0, 0)); break;
    case BY_RESET: CHECK_OK(ap_conn_close(s->l.conn, 1, 0)); break;
    case BY_KILL: CHECK_OK(ap_hub_kill(w->hub)); break;
    case BY_STOP: CHECK_OK(ap_poller_stop(w->poller)); break;
    default: peer_close(&s->l); break;
    }
}

/* The peer says so much, in small pieces, and then the session is left. The jobs' thread may be
 * anywhere. */
static void leave_after(size_t pieces, enum leave way, bool threaded, bool server)
{
    struct world *w = world_open();
    struct session s;
    char memory[100];
    if (threaded)
        world_start(w);
    session_open(&s, w, AP_TCP, pieces & 1 ? TLS12 : TLS13, server);
    session_start(&s, 0);
    CHECK_EQ(ap_conn_shake(s.l.conn, 0, 0), -EAGAIN);
    s.cut = sizeof memory;
    for (size_t i = 0; i < pieces; i++)
        peer_turn(&s);
    leave(w, &s, way);
    if (way <= BY_KILL)
        CHECK_EQ(ap_conn_settle_tls(s.l.conn), 0);
    session_close(&s);
    world_close(w);
}

static void leave_anywhere(bool threaded)
{
    tls_load();
    for (int way = 0; way < WAYS; way++) {
        for (size_t pieces = 0; pieces < 6; pieces++)
            leave_after(pieces, (enum leave)way, threaded, pieces & 2);
    }
}

TEST(a_handshake_is_left_anywhere)
{
    leave_anywhere(false);
}

TEST(a_handshake_is_left_anywhere_with_a_thread)
{
    leave_anywhere(true);
}

static void *close_soon(void *arg)
{
    struct session *s = arg;
    for (int64_t until = ap_now() + (int64_t)((uintptr_t)s->l.id * 7919 % 1500) * 1000;
         ap_now() < until;)
        sched_yield();
    ap_conn_close(s->l.conn, 0, 0);
    CHECK_EQ(ap_conn_settle_tls(s->l.conn), 0);
    return NULL;
}

/* Another thread closes, as garbage collection may. */
TEST(a_handshake_is_closed_by_another_thread)
{
    tls_load();
    struct world *w = world_open();
    world_start(w);
    RACE(round, 300)
    {
        struct session s;
        pthread_t thread;
        session_open(&s, w, AP_TCP, TLS13, round & 1);
        session_start(&s, 0);
        CHECK(pthread_create(&thread, NULL, close_soon, &s) == 0);
        while (ap_conn_shake(s.l.conn, 0, 0) == -EAGAIN)
            peer_turn(&s);
        CHECK(pthread_join(thread, NULL) == 0);
        session_close(&s);
    }
    world_close(w);
}

/* ---- fork ---------------------------------------------------------------------- */

/* OpenSSL works in the child: a handshake between two objects in its memory. */
static void shake_in_child(ap_ossl_ctx *ctx)
{
    CHECK_EQ(ap_fork_child(), 0);
    ap_ossl_ssl *ends[] = {ossl.SSL_new(ctx), ossl.SSL_new(ctx)};
    ap_ossl_bio *there = ossl.BIO_new(ossl.BIO_s_mem()), *back = ossl.BIO_new(ossl.BIO_s_mem());
    ap_ssl.bio_up_ref(there);
    ap_ssl.bio_up_ref(back);
    ap_ssl.set_bio(ends[0], there, back);
    ap_ssl.set_bio(ends[1], back, there);
    ossl.SSL_set_connect_state(ends[0]);
    ossl.SSL_set_accept_state(ends[1]);
    bool done = false;
    for (int i = 0; i < 10 && !done; i++) {
        int a = ap_ssl.do_handshake(ends[0]), b = ap_ssl.do_handshake(ends[1]);
        done = a == 1 && b == 1;
    }
    CHECK(done);
    check_leave(0);
}

TEST(a_fork_leaves_no_lock_behind)
{
    tls_load();
    struct world *w = world_open();
    world_start(w);
    struct session s[8];
    RACE(round, 60)
    {
        for (size_t i = 0; i < AP_ARRAY_SIZE(s); i++) {
            session_open(&s[i], w, AP_TCP, TLS13, i & 1);
            session_start(&s[i], 0);
            peer_turn(&s[i]);
        }
        fflush(NULL);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0)
            shake_in_child(s[0].ctx);
        for (size_t i = 0; i < AP_ARRAY_SIZE(s); i++) {
            shake_hands(&s[i]);
            session_close(&s[i]);
        }
        int status;
        CHECK_EQ(waitpid(child, &status, 0), child);
        CHECK_EQ(status, 0);
    }
    world_close(w);
}

SESSION_TEST(the_child_of_a_fork_leaves_sessions_alone, TLS13, true)
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        ap_tls_status status;
        ap_conn *conn = s->l.conn;
        CHECK_EQ(ap_conn_start_tls(conn, 0, s->ssl, 0), -ECHILD);
        CHECK_EQ(ap_conn_shake(conn, 0, 0), -ECHILD);
        CHECK_EQ(ap_conn_say_goodbye(conn), -ECHILD);
        CHECK_EQ(ap_conn_end_tls(conn, 0), -ECHILD);
        CHECK_EQ(ap_conn_hold_tls(conn), -ECHILD);
        CHECK_EQ(ap_conn_release_tls(conn), -ECHILD);
        CHECK_EQ(ap_conn_tls_status(conn, &status), -ECHILD);
        CHECK_EQ(ap_conn_settle_tls(conn), 0);
        check_leave(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK_EQ(status, 0);
    peer_tells(s, 1, 0, 1000);
    hear(s, 1, 0, 1000);
}
