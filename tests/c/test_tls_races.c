/* TLS sessions that are left in the middle, several threads at one of them, and forks. */
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
    CHECK_EQ(ap_conn_shake(s.l.conn, 0), -EAGAIN);
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
        while (ap_conn_shake(s.l.conn, 0) == -EAGAIN)
            peer_turn(&s);
        CHECK(pthread_join(thread, NULL) == 0);
        session_close(&s);
    }
    world_close(w);
}

/* ---- whoever asks the SSL object ------------------------------------------------ */

struct asker {
    struct session *s;
    _Atomic bool over;
    uint64_t asked;
};

/* As methods of the SSL object do, and the end of a handshake's time. */
static void *ask(void *arg)
{
    struct asker *a = arg;
    ap_tls_status status;
    while (!atomic_load(&a->over)) {
        int rc = ap_conn_hold_tls(a->s->l.conn);
        CHECK(rc == 0 || rc == -EBADF);
        if (rc == 0) {
            CHECK(ossl.SSL_get_version(a->s->ssl) != NULL);
            ap_ssl.get_verify_result(a->s->ssl);
            CHECK_OK(ap_conn_release_tls(a->s->l.conn));
        }
        CHECK_OK(ap_conn_tls_status(a->s->l.conn, &status));
        a->asked++;
        sched_yield();
    }
    return NULL;
}

static void asked_meanwhile(struct session *s, void (*body)(struct session *s))
{
    enum { ASKERS = 2 };
    struct asker askers[ASKERS];
    pthread_t threads[ASKERS];
    for (int i = 0; i < ASKERS; i++) {
        askers[i] = (struct asker){.s = s};
        CHECK(pthread_create(&threads[i], NULL, ask, &askers[i]) == 0);
    }
    body(s);
    for (int i = 0; i < ASKERS; i++) {
        atomic_store(&askers[i].over, true);
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(askers[i].asked > 0);
    }
}

static void talk(struct session *s)
{
    for (uint64_t at = 0; at < ROUNDS(40) * 50000; at += 50000) {
        peer_encrypt(s, 1, at, 50000);
        uint8_t *said = tell(s, 2, at, 50000);
        hear(s, 1, at, 50000);
        peer_hears(s, 2, at, 50000);
        MEANWHILE(s, ap_conn_queued(s->l.conn) == 0);
        free(said);
    }
}

SESSION_TEST(a_session_is_asked_while_data_flows, TLS13, true)
{
    world_start(w);
    asked_meanwhile(s, talk);
}

TEST(a_session_is_asked_during_the_handshake)
{
    tls_load();
    struct world *w = world_open();
    world_start(w);
    RACE(round, 100)
    {
        struct session s;
        session_open(&s, w, AP_TCP, round & 2 ? TLS12 : TLS13, round & 1);
        s.cut = 200;
        session_start(&s, 0);
        asked_meanwhile(&s, shake_hands);
        session_close(&s);
    }
    world_close(w);
}

/* Nobody else uses it: neither the step of a handshake nor data. */
SESSION_TEST(a_session_that_is_held_stands_still, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    CHECK_OK(ap_conn_hold_tls(conn));
    CHECK_OK(ap_conn_hold_tls(conn));
    peer_tells(s, 1, 0, 100);
    CHECK_EQ(want(&s->l, 100), -EAGAIN);
    uint8_t *said = tell(s, 2, 0, 100);
    CHECK_EQ(ap_conn_queued(conn), 100);
    CHECK_EQ(ap_conn_say_goodbye(conn), -EBUSY);
    CHECK_OK(ap_conn_release_tls(conn));
    settle(w);
    CHECK_EQ(ap_conn_queued(conn), 100);
    CHECK_EQ(mail_of(w, s->l.id), 0);
    CHECK_OK(ap_conn_release_tls(conn));
    hear(s, 1, 0, 100);
    peer_hears(s, 2, 0, 100);
    MEANWHILE(s, ap_conn_queued(conn) == 0);
    free(said);
}

static _Atomic bool inside;

static void stay_inside(const ap_ossl_ssl *ssl, int where, int result)
{
    (void)ssl, (void)where, (void)result;
    atomic_store(&inside, true);
    poll(NULL, 0, 20);
    atomic_store(&inside, false);
}

/* Whoever wants to ask waits for the step that is being made. */
TEST(a_step_of_a_handshake_is_awaited)
{
    tls_load();
    struct world *w = world_open();
    struct session s;
    session_open(&s, w, AP_TCP, TLS13, false);
    ossl.SSL_set_info_callback(s.ssl, stay_inside);
    session_start(&s, 0);
    UNTIL(w, atomic_load(&inside));
    CHECK_OK(ap_conn_hold_tls(s.l.conn));
    CHECK(!atomic_load(&inside));
    CHECK_OK(ap_conn_release_tls(s.l.conn));
    MEANWHILE(&s, atomic_load(&inside));
    CHECK_OK(ap_conn_close(s.l.conn, 0, 0));
    CHECK_EQ(ap_conn_hold_tls(s.l.conn), -EBADF);
    CHECK(!atomic_load(&inside));
    session_close(&s);
    world_close(w);
}

TEST(a_handshake_that_is_held_stands_still)
{
    tls_load();
    struct world *w = world_open();
    struct session s;
    session_open(&s, w, AP_TCP, TLS13, true);
    session_start(&s, 0);
    CHECK_OK(ap_conn_hold_tls(s.l.conn));
    CHECK_EQ(ap_conn_shake(s.l.conn, 0), -EAGAIN);
    peer_turn(&s);
    settle(w);
    CHECK_EQ(unread_in_kernel(s.l.peer), 0);
    CHECK_OK(ap_conn_release_tls(s.l.conn));
    shake_hands(&s);
    session_close(&s);
    world_close(w);
}

SESSION_TEST(a_session_is_closed_while_it_is_held, TLS13, true)
{
    ap_conn *conn = s->l.conn;
    CHECK_OK(ap_conn_hold_tls(conn));
    CHECK_EQ(ap_conn_settle_tls(conn), -EBUSY);
    CHECK_OK(ap_conn_close(conn, 0, 0));
    CHECK_EQ(ap_conn_hold_tls(conn), -EBADF);
    CHECK(ossl.SSL_get_version(s->ssl) != NULL);
    CHECK_OK(ap_conn_release_tls(conn));
    CHECK_EQ(ap_conn_settle_tls(conn), 0);
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
        CHECK_EQ(ap_conn_shake(conn, 0), -ECHILD);
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
    talk(s);
}
