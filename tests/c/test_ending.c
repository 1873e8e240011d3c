/* ending.c: pollers that drain, and pollers that fail. */
#include "fixture.h"

#define DRAINED (AP_EPOLLER - ECANCELED)
#define TRIES 20

/* As world_close, of a poller that has ended: nobody steps it, and yet nothing is left. */
static void world_close_ended(struct world *w)
{
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_OK(ap_poller_stop(w->poller));
    CHECK(ap_poller_state(w->poller) <= AP_EPOLLER);
    CHECK_EQ(stats(w).connections, 0);
    CHECK_EQ(stats(w).slots, 0);
    CHECK_EQ(bytes_in_use(w), 0);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    free(w);
}

static void fail_wait(int error, int times)
{
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, error, 0, times, 0));
}

static void fail_poller(struct world *w, int error)
{
    fail_wait(error, 1);
    CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), -error);
    ap_fault_clear();
    CHECK_EQ(ap_poller_state(w->poller), AP_EPOLLER - error);
}

/* ---- which errors ------------------------------------------------------ */

TEST(ending_errors_that_are_final)
{
    static const int errors[] = {EBADF, EINVAL, EFAULT, EPERM, ENOSYS, EIO};
    for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
        struct world *w = world_open();
        fail_poller(w, errors[i]);
        CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), AP_EPOLLER - errors[i]);
        CHECK_EQ(ap_poller_start(w->poller), AP_EPOLLER - errors[i]);
        CHECK_EQ(ap_poller_drain(w->poller, 1), AP_EPOLLER - errors[i]);
        CHECK_EQ(ap_poller_drain(w->poller, 0), AP_EPOLLER - errors[i]);
        CHECK_OK(ap_poller_nudge(w->poller));
        world_close_ended(w);
    }
}

/* Tried again; what needs no event is done meanwhile (O18). */
TEST(ending_errors_that_may_pass)
{
    static const int errors[] = {ENOMEM, ENOBUFS, EAGAIN};
    for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_TCP, HIGH);
        int64_t rc;
        while ((rc = want_until(&l, 1, ap_now() + MS)) == AP_ELATE) /* until it is in time */
            ;
        CHECK_EQ(rc, -EAGAIN);
        while (ap_now_coarse() < l.conn->want_deadline)
            sched_yield();
        fail_wait(errors[i], TRIES - 1);
        for (int k = 0; k < TRIES - 1; k++)
            CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), -errors[i]);
        CHECK_EQ(mail_of(w, l.id), AP_MAIL_READ); /* its deadline */
        CHECK_OK(ap_poller_step(w->poller, 0, BUDGET));
        peer_say(&l, 1, 0, 10);
        expect(&l, 1, 0, 10);
        fail_wait(errors[i], TRIES); /* the count began anew */
        for (int k = 0; k < TRIES; k++)
            CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), -errors[i]);
        ap_fault_clear();
        CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), AP_EPOLLER - errors[i]);
        link_close(&l);
        world_close_ended(w);
    }
}

TEST(ending_interruptions_are_none)
{
    struct world *w = world_open();
    fail_wait(EINTR, 100 * TRIES);
    for (int i = 0; i < 100 * TRIES; i++)
        CHECK_EQ(ap_poller_step(w->poller, -1, BUDGET), 0);
    ap_fault_clear();
    CHECK_EQ(ap_poller_state(w->poller), 0);
    world_close(w);
}

/* ---- what a failure leaves -------------------------------------------- */

/* Waiting for input, with a deadline, with output that stalls, with input that is unread, behind
 * a FIN, not watched yet: each is told as far as there is somebody, and none stays behind (O18). */
TEST(ending_a_failure_ends_every_connection)
{
    struct world *w = world_open();
    struct link reads = link_open(w, AP_TCP, HIGH), writes = link_open(w, AP_UNIX, HIGH);
    struct link unread = link_open(w, AP_TCP, HIGH), ended = link_open(w, AP_UNIX, HIGH);
    struct link closed = link_open(w, AP_UNIX, HIGH), pushed = link_open(w, AP_UNIX, HIGH);
    int fds[2];
    sockets_of(AP_TCP, fds);
    struct link fresh = link_fd(w, AP_TCP, HIGH, fds[0], fds[1]);
    CHECK_EQ(want_until(&reads, 1, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    peer_say(&unread, 3, 0, 1000);
    UNTIL(w, buffered(&unread) == 1000);
    peer_close(&ended);
    CHECK_EQ(want_wait(&ended, 1), AP_EEOF);
    uint8_t *data = pattern_make(4, 0, 4 * MB);
    CHECK(ap_conn_write(writes.conn, (char *)data, 4 * MB) > 0);
    CHECK_EQ(ap_conn_drain(writes.conn, 0, 0), -EAGAIN);
    settle(w);
    collect(w);
    link_close(&closed); /* not taken by the driver yet */
    ap_slot_lock(&pushed.conn->slot);
    ap_inbox_push(&pushed.conn->slot, AP_BOX_WORK | AP_BOX_DEADLINE, 0);
    ap_slot_unlock(&pushed.conn->slot);

    fail_poller(w, EBADF);
    int code = AP_EPOLLER - EBADF;
    CHECK_EQ(mail_of(w, reads.id), AP_MAIL_READ | AP_MAIL_FAILED);
    CHECK_EQ(mail_at(w, reads.id)->error, code);
    CHECK_EQ(mail_of(w, writes.id), AP_MAIL_WRITE | AP_MAIL_SENT | AP_MAIL_FAILED);
    CHECK_EQ(mail_of(w, unread.id), AP_MAIL_FAILED);
    CHECK_EQ(mail_of(w, fresh.id), 0); /* nobody has it yet */
    free(data);                        /* no one reads it any more */

    CHECK_EQ(want(&reads, 1), code);
    CHECK_EQ(ap_conn_write(reads.conn, "x", 1), code);
    CHECK_EQ(ap_conn_drain(writes.conn, 0, 0), code);
    expect(&unread, 3, 0, 1000); /* what had come is there */
    CHECK_EQ(want(&unread, 1), code);
    CHECK_EQ(want(&ended, 1), AP_EEOF);
    CHECK_EQ(ap_conn_write(ended.conn, "x", 1), code);
    CHECK(ap_conn_status(unread.conn) & AP_IS_BROKEN);
    CHECK_EQ(ap_conn_linger(unread.conn, unread.pos, 0), 0);
    CHECK_OK(ap_conn_set_idle(pushed.conn, MS));
    int result;
    CHECK_EQ(ap_conn_register(&fresh.conn, &result, 1), 1);
    CHECK_EQ(result, code);

    ap_conn *conn;
    sockets_of(AP_TCP, fds);
    CHECK_EQ(ap_conn_new(w->poller, w->hub, fds[0], AP_TCP, HIGH, &conn), code);
    close(fds[0]); /* still ours */
    close(fds[1]);
    link_close(&reads);
    link_close(&writes);
    link_close(&ended);
    link_close(&pushed);
    link_close(&fresh);
    link_drop_block(&unread);
    CHECK_EQ(ap_conn_detach(unread.conn, 0), unread.fd);
    close(unread.fd);
    ap_conn_release(unread.conn);
    peer_close(&unread);
    world_close_ended(w);
}

/* Those that the loop has not closed are closed with the hub. */
TEST(ending_a_hub_that_dies_after_its_poller)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_TCP, HIGH), b = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(want(&a, 1), -EAGAIN);
    fail_poller(w, EINVAL);
    CHECK_OK(ap_hub_kill(w->hub)); /* with the tokens in it */
    CHECK_EQ(want(&a, 1), -EBADF);
    link_close(&a);
    link_close(&b);
    world_close_ended(w);
}

TEST(ending_a_failure_ends_listeners)
{
    struct world *w = world_open();
    struct sockaddr_in address;
    ap_account *account;
    ap_listener *listener, *other;
    ap_accepted got[2];
    CHECK_OK(ap_account_new(&account));
    int fd = listen_tcp(8, &address);
    CHECK_OK(ap_listener_new(w->poller, w->hub, fd, account, &listener));
    uint64_t id = ap_listener_id(listener);
    int peer = connect_tcp(&address);
    CHECK_OK(ap_account_add(account, 1));
    UNTIL(w, stats(w).accepts == 1);
    mail_of(w, id);
    fail_poller(w, EBADF);
    int code = AP_EPOLLER - EBADF;
    CHECK_EQ(mail_of(w, id), AP_MAIL_ACCEPT | AP_MAIL_FAILED);
    CHECK_EQ(mail_at(w, id)->error, code);
    CHECK_EQ(ap_listener_take(listener, got, 2), 1); /* what was accepted is not lost */
    ap_fd_close(got[0].fd);
    for (int i = 0; i < 3; i++) /* for whoever asks, not only once */
        CHECK_EQ(ap_listener_take(listener, got, 2), code);
    CHECK_OK(ap_account_add(account, 1));
    CHECK_EQ(ap_account_take_back(account), 1);
    int second = listen_tcp(8, &address);
    CHECK_EQ(ap_listener_new(w->poller, w->hub, second, account, &other), code);
    close(second);
    close(peer);
    ap_listener_release(listener);
    ap_account_unref(account);
    world_close_ended(w);
}

static bool ended(struct world *w)
{
    return ap_poller_state(w->poller) <= AP_EPOLLER;
}

/* Of its own accord; the error of the seam does not wait for an event. */
TEST(ending_a_thread_ends_when_its_poller_fails)
{
    static const int errors[] = {EBADF, ENOMEM};
    for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
        struct world *w = world_open();
        struct link l = link_open(w, AP_TCP, HIGH);
        CHECK_EQ(want(&l, 1), -EAGAIN);
        world_start(w);
        UNTIL(w, stats(w).waits > 0);
        fail_wait(errors[i], -1);
        CHECK_OK(ap_poller_nudge(w->poller));
        UNTIL(w, ended(w));
        ap_fault_clear();
        CHECK_EQ(await(w, l.id, AP_MAIL_READ), AP_MAIL_READ);
        CHECK_EQ(want(&l, 1), AP_EPOLLER - errors[i]);
        link_close(&l);
        world_close_ended(w);
    }
}

struct stopper {
    struct world *w;
    _Atomic bool let_go;
};

static void *stop_it(void *arg)
{
    struct stopper *s = arg;
    CHECK_OK(ap_poller_stop(s->w->poller));
    CHECK(atomic_load(&s->let_go));
    return NULL;
}

/* Its state says already that it has ended, but its thread waits for a slot still. */
TEST(ending_stopped_while_it_fails)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    struct stopper s = {.w = w};
    pthread_t thread;
    CHECK_EQ(want(&l, 1), -EAGAIN);
    settle(w); /* no event is left for which the driver would wait for the slot, and not fail */
    world_start(w);
    ap_slot_lock(&l.conn->slot);
    fail_wait(EBADF, -1);
    CHECK_OK(ap_poller_nudge(w->poller));
    UNTIL(w, ended(w));
    CHECK(pthread_create(&thread, NULL, stop_it, &s) == 0);
    UNTIL(w, !atomic_load(&w->poller->started));
    for (int i = 0; i < 1000; i++)
        sched_yield();
    atomic_store(&s.let_go, true);
    ap_slot_unlock(&l.conn->slot);
    pthread_join(thread, NULL);
    ap_fault_clear();
    CHECK_EQ(mail_of(w, l.id), AP_MAIL_READ | AP_MAIL_FAILED);
    link_close(&l);
    world_close_ended(w);
}

/* ---- draining --------------------------------------------------------- */

TEST(ending_drained_without_connections)
{
    struct world *w = world_open();
    CHECK_EQ(ap_poller_state(w->poller), 0);
    CHECK_OK(ap_poller_drain(w->poller, 1));
    CHECK_OK(ap_poller_drain(w->poller, 1));
    CHECK_EQ(ap_poller_state(w->poller), 1);
    CHECK_OK(ap_poller_step(w->poller, 0, BUDGET));
    CHECK_EQ(ap_poller_state(w->poller), DRAINED);
    CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), DRAINED);
    CHECK_EQ(ap_poller_drain(w->poller, 0), DRAINED);
    world_close_ended(w);
}

TEST(ending_drained_with_the_last_connection)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_TCP, HIGH);
    CHECK_OK(ap_poller_drain(w->poller, 1));
    settle(w);
    struct link b = link_open(w, AP_UNIX, HIGH); /* chosen before, opened now */
    peer_say(&a, 1, 0, 100);
    expect(&a, 1, 0, 100);
    link_close(&a);
    settle(w);
    peer_say(&b, 2, 0, 100);
    expect(&b, 2, 0, 100);
    CHECK_EQ(ap_poller_state(w->poller), 1);
    CHECK_OK(ap_conn_close(b.conn, 0, 0));
    CHECK_OK(ap_poller_step(w->poller, -1, BUDGET)); /* it is woken for that */
    CHECK_EQ(ap_poller_state(w->poller), DRAINED);
    CHECK_EQ(stats(w).slots, 1); /* the handle is still there */
    link_close(&b);
    world_close_ended(w);
}

TEST(ending_a_listener_keeps_a_draining_poller)
{
    struct world *w = world_open();
    struct sockaddr_in address;
    ap_account *account;
    ap_listener *listener;
    ap_accepted got[2];
    CHECK_OK(ap_account_new(&account));
    CHECK_OK(ap_listener_new(w->poller, w->hub, listen_tcp(8, &address), account, &listener));
    CHECK_OK(ap_poller_drain(w->poller, 1));
    settle(w);
    int peer = connect_tcp(&address);
    CHECK_OK(ap_account_add(account, 1));
    UNTIL(w, stats(w).accepts == 1);
    CHECK_EQ(ap_listener_take(listener, got, 2), 1);
    ap_fd_close(got[0].fd);
    close(peer);
    ap_listener_release(listener);
    ap_account_unref(account);
    CHECK_OK(ap_poller_step(w->poller, 0, BUDGET));
    CHECK_EQ(ap_poller_state(w->poller), DRAINED);
    world_close_ended(w);
}

/* The moment in which the driver looks once more. */
TEST(ending_poller_admits_nobody)
{
    struct world *w = world_open();
    ap_conn *conn;
    int fds[2];
    sockets_of(AP_UNIX, fds);
    atomic_store(&w->poller->state, AP_ENDING);
    CHECK_EQ(ap_conn_new(w->poller, w->hub, fds[0], AP_UNIX, HIGH, &conn), DRAINED);
    CHECK_EQ(stats(w).connections, 0);
    CHECK_OK(ap_poller_drain(w->poller, 1));
    CHECK_EQ(ap_poller_state(w->poller), 1);
    CHECK_OK(ap_poller_drain(w->poller, 0));
    close(fds[0]);
    close(fds[1]);
    world_close(w);
}

LINK_TEST(ending_may_be_called_off, TCP, HIGH)
{
    CHECK_OK(ap_poller_drain(w->poller, 1));
    settle(w);
    CHECK_OK(ap_poller_drain(w->poller, 0));
    CHECK_OK(ap_poller_drain(w->poller, 0));
    CHECK_EQ(ap_poller_state(w->poller), 0);
    link_close(l);
    settle(w);
    CHECK_EQ(ap_poller_state(w->poller), 0);
    *l = link_open(w, AP_TCP, HIGH);
    peer_say(l, 1, 0, 100);
    expect(l, 1, 0, 100);
}

/* In the moment in which the driver looks once more there may be a connection, which has come just
 * before: whoever were told that the poller has ended would stop its thread. */
LINK_TEST(ending_may_be_called_off_at_the_last_moment, TCP, HIGH)
{
    atomic_store(&w->poller->state, AP_ENDING);
    CHECK_OK(ap_poller_drain(w->poller, 0));
    CHECK_EQ(ap_poller_state(w->poller), 0);
    peer_say(l, 1, 0, 100);
    expect(l, 1, 0, 100);
    link_close(l);
    settle(w);
    CHECK_EQ(ap_poller_state(w->poller), 0);
}

/* The thread sleeps, for ever if it is not told. */
TEST(ending_a_thread_ends_with_its_last_connection)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    CHECK_EQ(want(&l, 1), -EAGAIN);
    world_start(w);
    uint64_t polls = stats(w).polls; /* before it is told, or it may be asleep again by then */
    CHECK_OK(ap_poller_drain(w->poller, 1));
    UNTIL(w, stats(w).polls > polls && atomic_load(&w->poller->blocked_until) != 0);
    CHECK(!ended(w));
    link_close(&l);
    UNTIL(w, ended(w));
    world_close_ended(w);
}

/* ---- races ------------------------------------------------------------ */

struct opener {
    struct world *w;
    _Atomic bool go;
    uint64_t seed;
    int opened, refused, broken;
};

static void dawdle(uint64_t *seed)
{
    for (volatile uint64_t i = random_below(seed, 3000); i > 0; i--)
        ;
}

/* One connection: it works, or it is refused, or its poller fails. */
static void open_one(struct opener *o)
{
    int fds[2], result;
    ap_conn *conn;
    sockets_of(AP_UNIX, fds);
    int rc = ap_conn_new(o->w->poller, o->w->hub, fds[0], AP_UNIX, HIGH, &conn);
    if (rc < 0) {
        CHECK(rc <= AP_EPOLLER);
        o->refused++;
        close(fds[0]);
        close(fds[1]);
        return;
    }
    o->opened++;
    if (ap_conn_register(&conn, &result, 1) == 0) {
        result = (int)ap_conn_read(conn, 0, 1, 0, 0, NULL, 0);
        CHECK(result == -EAGAIN || result <= AP_EPOLLER);
        dawdle(&o->seed);
        if (result == -EAGAIN)
            result = (int)ap_conn_write(conn, "x", 1);
    }
    CHECK(result >= 0 || result <= AP_EPOLLER);
    o->broken += result < 0;
    ap_conn_release(conn);
    close(fds[1]);
}

static void *open_some(void *arg)
{
    struct opener *o = arg;
    while (!atomic_load(&o->go))
        ;
    for (int i = 0; i < 5; i++) {
        dawdle(&o->seed);
        open_one(o);
    }
    return NULL;
}

/* The hub is the other thread's, whose loop it plays. */
static void race(int round, struct opener *o, void (*end)(struct world *w))
{
    *o = (struct opener){.w = world_open(), .seed = (uint64_t)round + 1};
    pthread_t thread;
    uint64_t seed = (uint64_t)round + 1000;
    world_start(o->w);
    CHECK(pthread_create(&thread, NULL, open_some, o) == 0);
    atomic_store(&o->go, true);
    for (uint64_t i = random_below(&seed, 30); i > 0; i--)
        dawdle(&seed);
    end(o->w);
    pthread_join(thread, NULL);
    collect(o->w);
    UNTIL(o->w, ended(o->w));
    world_close_ended(o->w);
    ap_fault_clear();
}

static void drain(struct world *w)
{
    CHECK_OK(ap_poller_drain(w->poller, 1));
}

/* O18: no connection is opened on a poller that has ended, and none is orphaned. */
TEST(ending_races_opening_against_draining)
{
    struct opener o;
    RACE(round, 3000)
    {
        race(round, &o, drain);
        CHECK_EQ(o.opened + o.refused, 5);
        CHECK_EQ(o.broken, 0);
    }
}

static void drain_and_keep(struct world *w)
{
    int rc = 0;
    for (int i = 0; i < 20 && rc == 0; i++) {
        drain(w);
        sched_yield();
        rc = ap_poller_drain(w->poller, 0);
    }
    CHECK(rc == 0 || rc == DRAINED);
    if (rc == DRAINED) /* as Python does, and then nothing may be open */
        CHECK_OK(ap_poller_stop(w->poller));
    drain(w);
}

TEST(ending_races_opening_against_keeping)
{
    struct opener o;
    RACE(round, 1000)
    {
        race(round, &o, drain_and_keep);
        CHECK_EQ(o.opened + o.refused, 5);
        CHECK_EQ(o.broken, 0);
    }
}

static void break_down(struct world *w)
{
    fail_wait(EBADF, -1);
    CHECK_OK(ap_poller_nudge(w->poller));
}

/* Whatever is in the middle of being opened, used or closed: nothing is left. */
TEST(ending_races_everything_against_failing)
{
    struct opener o;
    RACE(round, 3000)
    race(round, &o, break_down);
}

static void *break_down_some_time(void *arg)
{
    struct opener *o = arg;
    for (uint64_t i = random_below(&o->seed, 30); i > 0; i--)
        dawdle(&o->seed);
    break_down(o->w);
    return NULL;
}

/* As at exit: stopped before, while or after it fails, with connections that the hub closes at the
 * same time. The thread is gone in any case, and nothing is left. */
TEST(ending_races_stopping_against_failing)
{
    RACE(round, 1000)
    {
        struct world *w = world_open();
        struct link a = link_open(w, AP_TCP, HIGH), b = link_open(w, AP_UNIX, HIGH);
        struct opener o = {.w = w, .seed = (uint64_t)round + 1};
        uint64_t seed = (uint64_t)round + 1000;
        pthread_t thread;
        CHECK_EQ(want(&a, 1), -EAGAIN);
        world_start(w);
        CHECK(pthread_create(&thread, NULL, break_down_some_time, &o) == 0);
        for (uint64_t i = random_below(&seed, 30); i > 0; i--)
            dawdle(&seed);
        if (round % 2)
            CHECK_OK(ap_hub_kill(w->hub));
        CHECK_OK(ap_poller_stop(w->poller));
        pthread_join(thread, NULL);
        ap_fault_clear();
        if (!ended(w)) /* the fault has come too late */
            fail_poller(w, EBADF);
        link_close(&a);
        link_close(&b);
        world_close_ended(w);
    }
}
