/* Several threads at one TLS session: the loop's, which sleeps, the poller's, and those that ask.
 */
#include "sessions.h"

#include <pthread.h>

/* ---- a loop that sleeps ------------------------------------------------------ */

/* A peer in a thread of its own, over a socket that blocks: answers each request with itself. */
struct echo {
    struct session *s;
    size_t size;
    int requests;
};

static void *echo(void *arg)
{
    struct echo *e = arg;
    ap_ossl_ssl *ssl = e->s->peer;
    char *memory = malloc(e->size);
    CHECK_OK(fcntl(e->s->l.peer, F_SETFL, 0));
    CHECK_EQ(ossl.SSL_set_fd(ssl, e->s->l.peer), 1);
    CHECK_EQ(ap_ssl.do_handshake(ssl), 1);
    for (int i = 0; i < e->requests; i++) {
        for (size_t done = 0; done < e->size;) {
            int got = ap_ssl.read(ssl, memory + done, (int)(e->size - done));
            CHECK(got > 0);
            done += (size_t)got;
        }
        CHECK_EQ(ap_ssl.write(ssl, memory, (int)e->size), e->size);
    }
    CHECK(ap_ssl.shutdown(ssl) >= 0);
    free(memory);
    return NULL;
}

/* Sleeps until a token of that kind comes, however long that takes: nothing else wakes it. */
static void sleep_for(struct session *s, uint32_t bits)
{
    struct world *w = s->l.w;
    ap_token tokens[16];
    struct pollfd doors[] = {{.fd = ap_hub_fd(w->hub), .events = POLLIN},
                             {.fd = ap_poller_fd(w->poller), .events = POLLIN}};
    bool drives = ap_hub_drives(w->hub, w->poller);
    while (!told(s, bits)) {
        CHECK(poll(doors, drives ? 2 : 1, (int)(PATIENCE / MS)) > 0);
        int n = drives ? ap_hub_drive(w->hub, w->poller, tokens, 16) : 0;
        CHECK_OK(n);
        for (int i = 0; i < n; i++)
            mail_at(w, tokens[i].id)->bits |= tokens[i].bits;
    }
}

static void exchange(struct session *s, size_t size, int requests)
{
    struct link *l = &s->l;
    uint8_t *request = pattern_make(1, 0, size);
    int64_t rc;
    session_start(s, 0);
    while ((rc = ap_conn_shake(l->conn, 0, 0)) == -EAGAIN)
        sleep_for(s, AP_MAIL_READ);
    CHECK_EQ(rc, 0);
    for (int i = 0; i < requests; i++) {
        CHECK_OK(ap_conn_write(l->conn, (char *)request, size));
        while ((rc = want(l, size)) == -EAGAIN)
            sleep_for(s, AP_MAIL_READ);
        CHECK_EQ(rc, 0);
        pattern_check(link_at(l), 1, 0, size);
        l->pos += (uint32_t)size;
        while ((rc = ap_conn_drain(l->conn, 0, 0)) == -EAGAIN)
            sleep_for(s, AP_MAIL_WRITE);
        CHECK_EQ(rc, 0);
    }
    while ((rc = want(l, 1)) == -EAGAIN)
        sleep_for(s, AP_MAIL_READ);
    CHECK_EQ(rc, AP_EEOF);
    free(request);
}

/* ---- whoever asks the SSL object ------------------------------------------------ */

struct asker {
    struct session *s;
    _Atomic bool over;
    _Atomic uint64_t asked;
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
        atomic_fetch_add(&a->asked, 1);
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
        UNTIL(s->l.w, atomic_load(&askers[i].asked) > 0);
        atomic_store(&askers[i].over, true);
        CHECK(pthread_join(threads[i], NULL) == 0);
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
    CHECK_EQ(ap_conn_shake(s.l.conn, 0, 0), -EAGAIN);
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

/* ---- all of it, in a loop that sleeps ------------------------------------------ */

static void exchange_much(struct session *s)
{
    exchange(s, 50000, 5);
}

static void sleep_and_exchange(bool lent, bool asked)
{
    tls_load();
    struct world *w = world_open();
    world_start(w);
    if (lent)
        CHECK_OK(ap_poller_lend(w->poller, w->hub));
    RACE(round, 200)
    {
        struct session s;
        pthread_t thread;
        session_open(&s, w, round % 5 ? AP_TCP : AP_UNIX, round & 1 ? TLS12 : TLS13, round & 2);
        struct echo e = {&s, asked ? 50000 : (size_t)1 << (round % 19), 5};
        CHECK(pthread_create(&thread, NULL, echo, &e) == 0);
        if (asked)
            asked_meanwhile(&s, exchange_much);
        else
            exchange(&s, e.size, e.requests);
        CHECK(pthread_join(thread, NULL) == 0);
        session_close(&s);
    }
    world_close(w);
}

TEST(a_loop_sleeps_until_it_is_told)
{
    sleep_and_exchange(false, false);
}

TEST(a_loop_that_drives_sleeps_until_it_is_told)
{
    sleep_and_exchange(true, false);
}

TEST(whoever_asks_wakes_a_loop)
{
    sleep_and_exchange(false, true);
}

TEST(whoever_asks_wakes_a_loop_that_drives)
{
    sleep_and_exchange(true, true);
}

/* ---- a peer without end --------------------------------------------------------- */

struct flood {
    int fd;
    _Atomic bool over;
};

/* Sends messages that a handshake skips, faster than they can be. */
static void *flood(void *arg)
{
    static const uint8_t hello_request[] = {22, 3, 3, 0, 4, 0, 0, 0, 0};
    struct flood *f = arg;
    uint8_t memory[9000];
    for (size_t i = 0; i < sizeof memory; i++)
        memory[i] = hello_request[i % sizeof hello_request];
    for (size_t at = 0; !atomic_load(&f->over);) {
        ssize_t n = send(f->fd, memory + at, sizeof memory - at, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n > 0)
            at = (at + (size_t)n) % sizeof memory;
        else
            sched_yield();
    }
    return NULL;
}

TEST(an_endless_handshake_does_not_keep_others_out)
{
    tls_load();
    struct world *w = world_open();
    struct session endless, s;
    pthread_t thread;
    world_start(w);
    session_open(&endless, w, AP_TCP, TLS12, false);
    struct flood f = {.fd = endless.l.peer};
    CHECK(pthread_create(&thread, NULL, flood, &f) == 0);
    session_start(&endless, 0);
    for (int i = 0; i < 5; i++) {
        session_open(&s, w, AP_TCP, TLS13, i & 1);
        session_start(&s, 0);
        shake_hands(&s);
        session_close(&s);
    }
    CHECK_EQ(status_of(&endless).phase, AP_TLS_SHAKING);
    atomic_store(&f.over, true);
    CHECK(pthread_join(thread, NULL) == 0);
    session_close(&endless);
    world_close(w);
}
