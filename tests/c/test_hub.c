/* hub.c: the mailbox, its one signal, and its end. */
#include "fixture.h"

#include <pthread.h>

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

LINKS_TEST(hub_keeps_the_order_of_arrival, UNIX, HIGH, 40)
{
    ap_token tokens[40 + 1];
    for (int i = 0; i < 40; i++)
        post(&l[(i * 7) % 40], AP_MAIL_IDLE);
    for (int i = 0; i < 10; i++)
        post(&l[i], AP_MAIL_IDLE); /* queued already: keeps its place */
    int n = 0;
    for (int got; (got = ap_hub_take(w->hub, tokens + n, 3)) > 0;) /* in portions */
        n += got;
    CHECK_EQ(n, 40);
    for (int i = 0; i < 40; i++)
        CHECK_EQ(tokens[i].id, l[(i * 7) % 40].id);
}

/* One write of the descriptor for any number of tokens, until the loop takes. */
LINKS_TEST(hub_is_signalled_once, UNIX, HIGH, 2)
{
    struct link *a = &l[0], *b = &l[1];
    for (int round = 0; round < 5; round++) {
        uint64_t wakeups = stats(w).wakeups, coalesced = stats(w).wakeups_coalesced;
        for (int i = 0; i < 10; i++) {
            post(a, AP_MAIL_IDLE);
            post(b, AP_MAIL_IDLE);
        }
        CHECK_EQ(signals_of(w), 1);
        CHECK_EQ(stats(w).wakeups, wakeups + 1);
        CHECK_EQ(stats(w).wakeups_coalesced, coalesced + 19);
        CHECK_EQ(mail_of(w, a->id), AP_MAIL_IDLE);
        CHECK_EQ(mail_of(w, b->id), AP_MAIL_IDLE);
        CHECK_EQ(signals_of(w), 0);
    }
}

/* Between two portions of one list a slot may be posted again: it comes again, once. */
LINKS_TEST(hub_post_between_two_takes_of_one_list, UNIX, HIGH, 2)
{
    struct link *a = &l[0], *b = &l[1];
    ap_token token;
    post(a, AP_MAIL_IDLE);
    post(b, AP_MAIL_IDLE);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.id, a->id);
    post(a, AP_MAIL_IDLE);
    post(b, AP_MAIL_IDLE); /* still in the list that was taken */
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.id, b->id);
    CHECK_EQ(signals_of(w), 1); /* the second post of a */
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    CHECK_EQ(token.id, a->id);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 0);
}

/* Only waits that are met *now* are reported: a hint that was overtaken is not. */
LINK_TEST(hub_looks_at_the_target_again, UNIX, HIGH)
{
    CHECK_EQ(want(l, 4), -EAGAIN);
    peer_say(l, 1, 0, 4);
    settle(w);
    CHECK_OK(ap_conn_disarm_read(l->conn)); /* the waiter was cancelled */
    CHECK_EQ(mail_of(w, l->id), 0);

    CHECK_EQ(want(l, 8), -EAGAIN); /* a new and larger wait under an old token */
    post(l, AP_MAIL_READ);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_say(l, 1, 4, 4);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_READ);
    expect(l, 1, 0, 8);
}

/* ---- the end ---------------------------------------------------------- */

LINKS_TEST(hub_kill_closes_what_is_open, STREAMS, HIGH, 5)
{
    for (int i = 0; i < 3; i++)
        post(&l[i], AP_MAIL_IDLE); /* some of them are queued */
    CHECK_OK(ap_hub_kill(w->hub));
    for (int i = 0; i < 5; i++) {
        CHECK_EQ(ap_conn_status(l[i].conn), AP_IS_CLOSED);
        CHECK_EQ(want(&l[i], 1), -EBADF);
        peer_expect_eof(&l[i]);
    }
    CHECK_OK(ap_hub_kill(w->hub)); /* idempotent */
    CHECK_EQ(stats(w).connections, 0);
    CHECK_EQ(collect(w), 0);
}

LINKS_TEST(hub_kill_with_half_a_list_taken, UNIX, HIGH, 6)
{
    ap_token token;
    for (int i = 0; i < 6; i++)
        post(&l[i], AP_MAIL_IDLE);
    CHECK_EQ(ap_hub_take(w->hub, &token, 1), 1);
    post(&l[0], AP_MAIL_IDLE);
    CHECK_OK(ap_hub_kill(w->hub));
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
LINKS_TEST(hub_kill_keeps_disowned_descriptors, UNIX, HIGH, 2)
{
    struct link *a = &l[0], *b = &l[1];
    CHECK_EQ(ap_conn_fd(a->conn, 1), a->fd);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK(fcntl(a->fd, F_GETFD) >= 0);
    CHECK(fcntl(b->fd, F_GETFD) < 0);
    uint64_t events = stats(w).events;
    CHECK_EQ(write(a->peer, "x", 1), 1);
    settle(w);
    CHECK_EQ(stats(w).events, events); /* but it is out of epoll */
    close(a->fd);
}

/* A dead hub is never signalled: its descriptor's number may be somebody else's. */
LINK_TEST(hub_dead_is_not_signalled, UNIX, HIGH)
{
    int efd = ap_hub_fd(w->hub);
    CHECK_OK(ap_hub_kill(w->hub));
    int other = ap_sys_eventfd();
    CHECK_EQ(other, efd);
    /* a post that comes late, as if its driver had slept */
    ap_hub_post(&l->conn->slot, AP_MAIL_READ);
    uint64_t count;
    CHECK(read(other, &count, sizeof count) < 0 && errno == EAGAIN);
    CHECK_OK(ap_hub_kill(w->hub)); /* takes it out again */
    ap_sys_close(other);
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

/* Two rivals: a driver that makes the read waits of some slots come true, and the loop, which has
 * nothing but the mailbox to learn it from. A round is over when the loop has seen every wait of
 * the round, so a wake-up that is lost is a round that hangs. Orders that were measured to lose:
 *   - signalled is reset before the descriptor is read, or after the list was taken;
 *   - the bits are reset after the wait was looked at;
 *   - `next` is read after the bits were reset.
 * The first test lets the loop take again and again while the driver posts, so that a post falls
 * between any two of its steps; the second one aims at the steps that are close together.
 */

#define SLOTS 3
#define ALL_SLOTS ((1u << SLOTS) - 1)
#define NO_MORE INT32_MAX

struct rivals {
    struct world *w;
    struct link links[SLOTS];
    _Atomic int begun; /* the round; NO_MORE: the race is over */
    int rounds;
};

/* Spins, for what comes in less than a microsecond if both run. */
static void wait_for(_Atomic int *number, int value)
{
    int64_t end = 0;
    for (int looks = 0; atomic_load_explicit(number, memory_order_acquire) < value; looks++) {
        if (looks < 20000)
            continue;
        end = end ? end : ap_now() + 2 * PATIENCE;
        if (ap_now() > end)
            CHECK_FAIL("round %d: the other one does not come", value);
        sched_yield();
    }
}

static void spin(uint64_t *seed, uint64_t most)
{
    for (volatile uint64_t i = random_below(seed, most); i > 0; i--)
        ;
}

/* As a driver that has found the end of input, or nothing of interest. */
static void serve_like_a_driver(struct link *l, bool end)
{
    ap_slot_lock(&l->conn->slot);
    if (end)
        l->conn->read_end = AP_EEOF;
    ap_hub_post(&l->conn->slot, AP_MAIL_READ);
    ap_slot_unlock(&l->conn->slot);
}

static void *driver(void *arg)
{
    struct rivals *r = arg;
    uint64_t seed = 99;
    for (int round = 1; round <= r->rounds; round++) {
        wait_for(&r->begun, round);
        if (atomic_load(&r->begun) == NO_MORE)
            break;
        for (int k = 0; k < SLOTS; k++) {
            serve_like_a_driver(&r->links[k], false);
            spin(&seed, 40);
        }
        for (int k = 0; k < SLOTS; k++) {
            spin(&seed, 40);
            serve_like_a_driver(&r->links[k], true);
        }
    }
    return NULL;
}

/* The wait is over: it is made anew for the next round. */
static void arm_again(struct link *l)
{
    ap_slot_lock(&l->conn->slot);
    CHECK_EQ(l->conn->want, AP_WANT_NOTHING);
    l->conn->read_end = 0;
    l->conn->want = AP_WANT_BYTES;
    l->conn->want_bytes = 1;
    ap_slot_unlock(&l->conn->slot);
}

/* Which slots ended, as bits. */
static unsigned collect_ends(struct rivals *r)
{
    unsigned ended = 0;
    collect(r->w);
    for (unsigned k = 0; k < SLOTS; k++) {
        if (mail_of_quietly(r->w, r->links[k].id) & AP_MAIL_READ) {
            arm_again(&r->links[k]);
            ended |= 1u << k;
        }
    }
    return ended;
}

/* Without anything but the descriptor to depend on. */
static void await_ends(struct rivals *r, int round, unsigned seen)
{
    while (seen != ALL_SLOTS) {
        struct pollfd door = {.fd = ap_hub_fd(r->w->hub), .events = POLLIN};
        if (poll(&door, 1, (int)(PATIENCE / MS)) != 1)
            CHECK_FAIL("round %d: only %x was seen, and no wake-up", round, seen);
        seen |= collect_ends(r);
    }
}

/* Mostly takes without being woken, to meet the driver at any step; when it does that no longer it
 * depends on the descriptor. */
static void play_loop(struct rivals *r, int round, uint64_t *seed)
{
    unsigned seen = 0;
    atomic_store(&r->begun, round);
    for (uint64_t busy = random_below(seed, 12); busy > 0 && seen != ALL_SLOTS; busy--) {
        seen |= collect_ends(r);
        spin(seed, 20);
    }
    await_ends(r, round, seen);
}

/* L02 */
TEST(hub_litmus_no_wakeup_is_lost)
{
    static struct rivals r;
    pthread_t thread;
    uint64_t seed = 7;
    r.w = world_open();
    r.rounds = ROUNDS(150000);
    for (int k = 0; k < SLOTS; k++) {
        r.links[k] = link_open(r.w, AP_UNIX, HIGH);
        arm_again(&r.links[k]);
    }
    CHECK(pthread_create(&thread, NULL, driver, &r) == 0);
    int64_t over = ap_now() + LITMUS;
    for (int round = 1; round <= r.rounds && ap_now() < over; round++)
        play_loop(&r, round, &seed);
    atomic_store(&r.begun, NO_MORE);
    pthread_join(thread, NULL);
    for (int k = 0; k < SLOTS; k++)
        link_close(&r.links[k]);
    world_close(r.w);
}

/* Each round the loop takes once, at a signal, and the driver posts at the same moment: later if
 * the loop saw it in that very take the last time, else sooner. So half of the posts fall just
 * before and half just after the step that decides. Then the loop depends on being woken.
 *
 * Aimed at the list: the post is of a slot that is not in it. Aimed at the bits: it is of the first
 * slot in the list, posted for nothing before, with others behind it.
 */
enum aim { AT_LIST, AT_BITS, AIMS };
enum { FIRST, BEHIND, OUTSIDE };

struct duel {
    struct rivals r;
    _Atomic int ready, go;
    _Atomic int delay[AIMS];
};

static void *aiming_driver(void *arg)
{
    struct duel *d = arg;
    uint64_t seed = 11;
    for (int round = 1; round <= d->r.rounds; round++) {
        enum aim aim = (enum aim)(round % AIMS);
        wait_for(&d->r.begun, round);
        if (atomic_load(&d->r.begun) == NO_MORE)
            break;
        serve_like_a_driver(&d->r.links[FIRST], aim == AT_LIST);
        serve_like_a_driver(&d->r.links[BEHIND], true);
        if (aim == AT_BITS)
            serve_like_a_driver(&d->r.links[OUTSIDE], true);
        atomic_store_explicit(&d->ready, round, memory_order_release);
        wait_for(&d->go, round);
        uint64_t jitter = random_below(&seed, 4) ? 16 : 300;
        for (volatile uint64_t i =
                 (uint64_t)atomic_load(&d->delay[aim]) + random_below(&seed, jitter);
             i > 0; i--)
            ;
        serve_like_a_driver(&d->r.links[aim == AT_LIST ? OUTSIDE : FIRST], true);
    }
    return NULL;
}

static void duel_round(struct duel *d, int round)
{
    enum aim aim = (enum aim)(round % AIMS);
    atomic_store_explicit(&d->r.begun, round, memory_order_release);
    wait_for(&d->ready, round);
    atomic_store_explicit(&d->go, round, memory_order_release);
    unsigned seen = collect_ends(&d->r);
    bool early = seen & 1u << (aim == AT_LIST ? OUTSIDE : FIRST);
    int delay = atomic_load(&d->delay[aim]) + (early ? 3 : -3);
    atomic_store(&d->delay[aim], delay < 0 ? 0 : delay > 5000 ? 5000 : delay);
    await_ends(&d->r, round, seen);
}

TEST(hub_litmus_aimed)
{
    static struct duel d;
    pthread_t thread;
    d.r.w = world_open();
    d.r.rounds = ROUNDS(400000);
    for (int k = 0; k < SLOTS; k++) {
        d.r.links[k] = link_open(d.r.w, AP_UNIX, HIGH);
        arm_again(&d.r.links[k]);
    }
    CHECK(pthread_create(&thread, NULL, aiming_driver, &d) == 0);
    int64_t over = ap_now() + LITMUS;
    for (int round = 1; round <= d.r.rounds && ap_now() < over; round++)
        duel_round(&d, round);
    atomic_store(&d.r.begun, NO_MORE);
    pthread_join(thread, NULL);
    for (int k = 0; k < SLOTS; k++)
        link_close(&d.r.links[k]);
    world_close(d.r.w);
}
