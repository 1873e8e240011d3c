/* hub.c: the mailbox, its one signal, and its end. */
#include "fixture.h"

static uint64_t signals_of(struct world *w)
{
    uint64_t count = 0;
    return read(ap_hub_fd(w->hub), &count, sizeof count) == sizeof count ? count : 0;
}

/* Posts as a driver does. */
static void post(struct link *l, uint32_t bits)
{
    ap_slot_lock(&l->conn->slot);
    ap_hub_post(&l->conn->slot, bits);
    ap_slot_unlock(&l->conn->slot);
}

TEST(hub_keeps_the_order_of_arrival)
{
    enum { N = 40 };
    struct world *w = world_open();
    struct link links[N];
    ap_token tokens[N + 1];
    for (int i = 0; i < N; i++)
        links[i] = link_open(w, AP_UNIX, HIGH);
    for (int i = 0; i < N; i++)
        post(&links[(i * 7) % N], AP_MAIL_IDLE);
    for (int i = 0; i < 10; i++)
        post(&links[i], AP_MAIL_IDLE); /* queued already: keeps its place */
    int n = 0;
    for (int got; (got = ap_hub_take(w->hub, tokens + n, 3)) > 0;) /* in portions */
        n += got;
    CHECK_EQ(n, N);
    for (int i = 0; i < N; i++)
        CHECK_EQ(tokens[i].id, links[(i * 7) % N].id);
    for (int i = 0; i < N; i++)
        link_close(&links[i]);
    world_close(w);
}

/* One write of the descriptor for any number of tokens, until the loop takes. */
TEST(hub_is_signalled_once)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_UNIX, HIGH), b = link_open(w, AP_UNIX, HIGH);
    for (int round = 0; round < 5; round++) {
        uint64_t wakeups = stats(w).wakeups, coalesced = stats(w).wakeups_coalesced;
        for (int i = 0; i < 10; i++) {
            post(&a, AP_MAIL_IDLE);
            post(&b, AP_MAIL_IDLE);
        }
        CHECK_EQ(signals_of(w), 1);
        CHECK_EQ(stats(w).wakeups, wakeups + 1);
        CHECK_EQ(stats(w).wakeups_coalesced, coalesced + 19);
        CHECK_EQ(mail_of(w, a.id), AP_MAIL_IDLE);
        CHECK_EQ(mail_of(w, b.id), AP_MAIL_IDLE);
        CHECK_EQ(signals_of(w), 0);
    }
    link_close(&a);
    link_close(&b);
    world_close(w);
}

/* Between two portions of one list a slot may be posted again: it comes again, once. */
TEST(hub_post_between_two_takes_of_one_list)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_UNIX, HIGH), b = link_open(w, AP_UNIX, HIGH);
    ap_token token;
    post(&a, AP_MAIL_IDLE);
    post(&b, AP_MAIL_IDLE);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.id, a.id);
    post(&a, AP_MAIL_IDLE);
    post(&b, AP_MAIL_IDLE); /* still in the list that was taken */
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.id, b.id);
    CHECK_EQ(signals_of(w), 1); /* the second post of a */
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.id, a.id);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 0);
    link_close(&a);
    link_close(&b);
    world_close(w);
}

/* Only waits that are met *now* are reported: a hint that was overtaken is not. */
TEST(hub_looks_at_the_target_again)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(want(&l, 4), -EAGAIN);
    peer_say(&l, 1, 0, 4);
    settle(w);
    CHECK_OK(ap_conn_disarm_read(l.conn)); /* the waiter was cancelled */
    CHECK_EQ(mail_of(w, l.id), 0);

    CHECK_EQ(want(&l, 8), -EAGAIN); /* a new and larger wait under an old token */
    post(&l, AP_MAIL_READ);
    CHECK_EQ(mail_of(w, l.id), 0);
    peer_say(&l, 1, 4, 4);
    settle(w);
    CHECK_EQ(mail_of(w, l.id), AP_MAIL_READ);
    expect(&l, 1, 0, 8);
    link_close(&l);
    world_close(w);
}

/* ---- the end ---------------------------------------------------------- */

TEST(hub_kill_closes_what_is_open)
{
    struct world *w = world_open();
    struct link links[5];
    for (int i = 0; i < 5; i++)
        links[i] = link_open(w, i % 2 ? AP_TCP : AP_UNIX, HIGH);
    for (int i = 0; i < 3; i++)
        post(&links[i], AP_MAIL_IDLE); /* some of them are queued */
    CHECK_OK(ap_hub_kill(w->hub));
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(ap_conn_status(links[i].conn), AP_IS_CLOSED);
        CHECK_EQ(want(&links[i], 1), -EBADF);
        char byte;
        CHECK_EQ(recv(links[i].peer, &byte, 1, 0), 0);
    }
    CHECK_OK(ap_hub_kill(w->hub)); /* idempotent */
    CHECK_EQ(stats(w).connections, 0);
    CHECK_EQ(collect(w), 0);
    for (int i = 0; i < 5; i++)
        link_close(&links[i]);
    world_close(w);
}

TEST(hub_kill_with_half_a_list_taken)
{
    struct world *w = world_open();
    struct link links[6];
    ap_token token;
    for (int i = 0; i < 6; i++)
        links[i] = link_open(w, AP_UNIX, HIGH);
    for (int i = 0; i < 6; i++)
        post(&links[i], AP_MAIL_IDLE);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    post(&links[0], AP_MAIL_IDLE);
    CHECK_OK(ap_hub_kill(w->hub));
    for (int i = 0; i < 6; i++)
        link_close(&links[i]);
    settle(w);
    CHECK_EQ(stats(w).slots, 0);
    world_close(w);
}

TEST(hub_dead_takes_no_connections)
{
    struct world *w = world_open();
    int fds[2];
    ap_conn *conn;
    sockets_of(AP_TCP, fds);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_EQ(ap_conn_new(w->poller, w->hub, fds[0], AP_TCP, HIGH, &conn), -EBADF);
    CHECK(fcntl(fds[0], F_GETFD) >= 0); /* still the caller's */
    close(fds[0]);
    close(fds[1]);
    settle(w);
    CHECK_EQ(stats(w).slots, 0);
    CHECK_EQ(stats(w).connections, 0);
    world_close(w);
}

/* A disowned descriptor is somebody else's to close: Python's socket has it. */
TEST(hub_kill_keeps_disowned_descriptors)
{
    struct world *w = world_open();
    struct link a = link_open(w, AP_UNIX, HIGH), b = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(ap_conn_fd(a.conn, 1), a.fd);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK(fcntl(a.fd, F_GETFD) >= 0);
    CHECK(fcntl(b.fd, F_GETFD) < 0);
    uint64_t events = stats(w).events;
    CHECK_EQ(write(a.peer, "x", 1), 1);
    settle(w);
    CHECK_EQ(stats(w).events, events); /* but it is out of epoll */
    close(a.fd);
    link_close(&a);
    link_close(&b);
    world_close(w);
}

/* A dead hub is never signalled: its descriptor's number may be somebody else's. */
TEST(hub_dead_is_not_signalled)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    int efd = ap_hub_fd(w->hub);
    CHECK_OK(ap_hub_kill(w->hub));
    int other = ap_sys_eventfd();
    CHECK_EQ(other, efd);
    /* a post that comes late, as if its driver had slept */
    ap_hub_post(&l.conn->slot, AP_MAIL_READ);
    uint64_t count;
    CHECK(read(other, &count, sizeof count) < 0 && errno == EAGAIN);
    CHECK_OK(ap_hub_kill(w->hub)); /* takes it out again */
    ap_sys_close(other);
    link_close(&l);
    world_close(w);
}

/* The hub's memory lives until the last slot that names it. */
TEST(hub_lives_until_the_last_slot)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    ap_hub *hub = w->hub;
    peer_say(&l, 1, 0, 100);
    expect(&l, 1, 0, 100);
    CHECK_OK(ap_hub_kill(hub));
    ap_hub_unref(hub);
    CHECK_EQ(want(&l, 1), -EBADF);
    settle(w);
    link_close(&l); /* with a block of that hub's pool */
    CHECK_OK(ap_hub_new(&w->hub));
    world_close(w);
}

/* L26: at each step of making one, failure leaves nothing behind. */
TEST(hub_new_unwinds)
{
    static const int calls[] = {AP_CALL_ALLOC, AP_CALL_EVENTFD};
    for (size_t i = 0; i < AP_ARRAY_SIZE(calls); i++) {
        for (int skip = 0;; skip++) {
            ap_hub *hub;
            CHECK_OK(ap_fault_set(calls[i], EMFILE, skip, 1, 0));
            int rc = ap_hub_new(&hub);
            ap_fault_clear();
            if (rc == 0) {
                CHECK(skip > 0);
                ap_hub_unref(hub);
                break;
            }
            CHECK_EQ(rc, calls[i] == AP_CALL_ALLOC ? -ENOMEM : -EMFILE);
        }
    }
}

/* ---- litmus: no wake-up is lost --------------------------------------- */

/* Posters bump a number under the slot's mutex and post; the loop, woken only through the
 * descriptor, must always get to see the last number. Orders that were measured to lose: exchange
 * before read, a store in place of the exchange, and looking before taking the bits. */

#define POSTERS 3
#define SLOTS 4

struct litmus {
    struct world *w;
    struct link links[SLOTS];
    _Atomic uint64_t posted[SLOTS];
    _Atomic int running;
    int rounds;
};

static void *poster(void *arg)
{
    struct litmus *t = arg;
    uint64_t seed = (uint64_t)(uintptr_t)&seed | 1;
    for (int i = 0; i < t->rounds; i++) {
        uint64_t k = random_below(&seed, SLOTS);
        ap_slot *slot = &t->links[k].conn->slot;
        ap_slot_lock(slot);
        atomic_fetch_add_explicit(&t->posted[k], 1, memory_order_relaxed);
        ap_hub_post(slot, AP_MAIL_IDLE);
        ap_slot_unlock(slot);
    }
    atomic_fetch_sub(&t->running, 1);
    return NULL;
}

/* The loop: sleeps on the descriptor alone. */
static void litmus_loop(struct litmus *t)
{
    uint64_t seen[SLOTS] = {0};
    bool over = false;
    while (!over) {
        struct pollfd door = {.fd = ap_hub_fd(t->w->hub), .events = POLLIN};
        bool last = atomic_load(&t->running) == 0; /* all was posted before this poll */
        int woken = poll(&door, 1, last ? 0 : 2000);
        CHECK_OK(woken);
        if (woken)
            collect(t->w);
        for (int k = 0; k < SLOTS; k++) {
            if (mail_of_quietly(t->w, t->links[k].id))
                seen[k] = atomic_load(&t->posted[k]);
        }
        over = last && !woken;
    }
    for (int k = 0; k < SLOTS; k++)
        CHECK_EQ(seen[k], atomic_load(&t->posted[k]));
}

TEST(hub_litmus_no_wakeup_is_lost)
{
    static struct litmus t;
    pthread_t threads[POSTERS];
    t.w = world_open();
    t.rounds = ROUNDS(700000);
    atomic_store(&t.running, POSTERS);
    for (int k = 0; k < SLOTS; k++)
        t.links[k] = link_open(t.w, AP_UNIX, HIGH);
    for (int i = 0; i < POSTERS; i++)
        CHECK(pthread_create(&threads[i], NULL, poster, &t) == 0);
    litmus_loop(&t);
    for (int i = 0; i < POSTERS; i++)
        pthread_join(threads[i], NULL);
    for (int k = 0; k < SLOTS; k++)
        link_close(&t.links[k]);
    world_close(t.w);
}

/* The same for one slot and one poster in strict alternation: each round is one wake-up, and a
 * round without it hangs at once. */
struct pingpong {
    struct link l;
    _Atomic uint64_t asked, answered;
    int rounds;
};

static void *answerer(void *arg)
{
    struct pingpong *p = arg;
    for (uint64_t i = 1; i <= (uint64_t)p->rounds; i++) {
        int64_t end = ap_now() + PATIENCE;
        while (atomic_load_explicit(&p->asked, memory_order_acquire) < i)
            CHECK(ap_now() < end);
        ap_slot_lock(&p->l.conn->slot);
        atomic_store_explicit(&p->answered, i, memory_order_relaxed);
        ap_hub_post(&p->l.conn->slot, AP_MAIL_IDLE);
        ap_slot_unlock(&p->l.conn->slot);
    }
    return NULL;
}

TEST(hub_litmus_every_post_wakes)
{
    static struct pingpong p;
    pthread_t thread;
    struct world *w = world_open();
    p.l = link_open(w, AP_UNIX, HIGH);
    p.rounds = ROUNDS(100000);
    CHECK(pthread_create(&thread, NULL, answerer, &p) == 0);
    for (uint64_t i = 1; i <= (uint64_t)p.rounds; i++) {
        atomic_store_explicit(&p.asked, i, memory_order_release);
        struct pollfd door = {.fd = ap_hub_fd(w->hub), .events = POLLIN};
        while (!(mail_of(w, p.l.id) & AP_MAIL_IDLE)) {
            if (poll(&door, 1, 10000) != 1)
                CHECK_FAIL("round %llu: no wake-up", (unsigned long long)i);
        }
        CHECK_EQ(atomic_load_explicit(&p.answered, memory_order_relaxed), i);
    }
    pthread_join(thread, NULL);
    link_close(&p.l);
    world_close(w);
}
