/* driver.c, with poller.c, inbox.c and runlist.c: driving, sleeping and being woken, the run list.
 */
#include "fixture.h"

#include <sys/resource.h>

/* L26 */
TEST(poller_new_unwinds)
{
    static const int calls[] = {AP_CALL_ALLOC, AP_CALL_EPOLL_CREATE, AP_CALL_EVENTFD,
                                AP_CALL_EPOLL_CTL};
    for (size_t i = 0; i < AP_ARRAY_SIZE(calls); i++) { /* L26 */
        for (int skip = 0;; skip++) {
            ap_poller *poller;
            CHECK_OK(ap_fault_set(calls[i], ENFILE, skip, 1, 0));
            int rc = ap_poller_new(&poller);
            ap_fault_clear();
            if (rc == 0) {
                CHECK(skip > 0);
                ap_poller_unref(poller);
                break;
            }
            CHECK_EQ(rc, calls[i] == AP_CALL_ALLOC ? -ENOMEM : -ENFILE);
        }
    }
}

TEST(poller_starts_and_stops)
{
    struct world *w = world_open();
    CHECK_OK(ap_fault_set(AP_CALL_THREAD, EAGAIN, 0, 1, 0));
    CHECK_EQ(ap_poller_start(w->poller), -EAGAIN);
    CHECK_OK(ap_poller_stop(w->poller)); /* none there */
    for (int i = 0; i < 50; i++) {
        CHECK_OK(ap_poller_start(w->poller));
        CHECK_EQ(ap_poller_start(w->poller), -EALREADY);
        CHECK_OK(ap_poller_stop(w->poller));
    }
    CHECK_OK(ap_poller_stop(w->poller));
    ap_fault_clear();
    world_close(w);
}

/* L40: stopping is an event, not the next tick of something. */
LINK_TEST(poller_stops_at_once, TCP, HIGH)
{
    world_start(w);
    CHECK_EQ(want(l, 1), -EAGAIN);
    UNTIL(w, stats(w).waits > 0);
    int64_t before = ap_now();
    world_stop(w);
    CHECK(ap_now() - before < PATIENCE); /* it would be for ever */
}

/* ---- the lease -------------------------------------------------------- */

struct stepper {
    struct world *w;
    _Atomic int rc;
    _Atomic bool done;
};

static void *step_once(void *arg)
{
    struct stepper *s = arg;
    atomic_store(&s->rc, ap_poller_step(s->w->poller, 10000, BUDGET));
    atomic_store(&s->done, true);
    return NULL;
}

TEST(poller_has_one_driver_at_a_time)
{
    struct stepper s = {.w = world_open()};
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, step_once, &s) == 0);
    while (stats(s.w).waits == 0)
        sched_yield();
    CHECK_EQ(ap_poller_step(s.w->poller, 0, BUDGET), -EBUSY);
    CHECK_OK(ap_poller_nudge(s.w->poller));
    pthread_join(thread, NULL);
    CHECK_OK(atomic_load(&s.rc));
    CHECK_OK(ap_poller_step(s.w->poller, 0, BUDGET));
    world_close(s.w);
}

/* Whoever drives, the work is the same: the seam for lending the lease. */
LINK_TEST(poller_may_change_its_driver, TCP, HIGH)
{
    for (uint64_t i = 0; i < 20; i++) {
        if (i % 2)
            world_start(w);
        peer_say(l, 1, i * 1000, 1000);
        expect(l, 1, i * 1000, 1000);
        if (i % 2)
            world_stop(w);
    }
}

/* ---- sleeping and being woken ----------------------------------------- */

static int64_t sleeps_until(struct world *w)
{
    return atomic_load_explicit(&w->poller->blocked_until, memory_order_seq_cst);
}

static void wait_asleep(struct world *w)
{
    for (int64_t end = ap_now() + PATIENCE; sleeps_until(w) == 0;) {
        CHECK(ap_now() < end);
        sched_yield();
    }
}

/* What a driver that is asleep is woken for: what is due before it would wake by itself. */
LINKS_TEST(poller_is_woken_only_for_what_is_due_earlier, UNIX, HIGH, 2)
{
    struct link *a = &l[0], *b = &l[1];
    CHECK_EQ(want_until(a, 1, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    CHECK_EQ(want(b, 1), -EAGAIN);
    settle(w);
    world_start(w);
    wait_asleep(w);
    int64_t until = sleeps_until(w);
    uint64_t events = stats(w).events, polls = stats(w).polls;
    CHECK(until != AP_FOREVER);

    CHECK_EQ(want_until(b, 1, ap_now() + 7200 * 1000 * MS), -EAGAIN); /* later: no wake */
    link_close(a);                                                    /* retired: never due */
    CHECK_EQ(sleeps_until(w), until);
    CHECK_EQ(stats(w).polls, polls);

    /* Earlier than it would wake, which may be long before the deadline: the wheel files anew. */
    CHECK_EQ(want_until(b, 1, ap_now() + (until - ap_now()) / 2), -EAGAIN);
    UNTIL(w, stats(w).events > events);
    UNTIL(w, stats(w).slots == 1); /* and then it takes what was retired */
    wait_asleep(w);
    CHECK(sleeps_until(w) < until);
}

LINK_TEST(poller_nudged_recycles_what_was_retired, UNIX, HIGH)
{
    world_start(w);
    wait_asleep(w);
    link_close(l);
    CHECK_EQ(stats(w).slots, 1);
    CHECK_OK(ap_poller_nudge(w->poller));
    UNTIL(w, stats(w).slots == 0);
}

/* Litmus: a push never finds the driver asleep beyond it. The driver has nothing else to do, and
 * the push is aimed at the moment at which it falls asleep: later if it still ran the last time,
 * else sooner. One that is missed is a round that hangs. With a release store in the driver 293,000
 * of 3 million were missed. */
static void push_work(struct link *l)
{
    ap_slot_lock(&l->conn->slot);
    ap_inbox_push(&l->conn->slot, AP_BOX_WORK, 0);
    ap_slot_unlock(&l->conn->slot);
}

static bool box_empty(struct link *l)
{
    return atomic_load_explicit(&l->conn->slot.box_bits, memory_order_seq_cst) == 0;
}

static void await_box_empty(struct link *l, int round)
{
    int64_t end = 0; /* the clock is not asked at first */
    for (int looks = 0; !box_empty(l); looks++) {
        if (looks == 100000)
            end = ap_now() + PATIENCE;
        if (looks > 100000 && ap_now() > end)
            CHECK_FAIL("round %d: the push was missed", round);
    }
}

LINK_TEST(poller_litmus_no_push_is_missed, UNIX, HIGH)
{
    uint64_t seed = 3;
    int64_t delay = 1000;
    w->poller->sweep_at = AP_FOREVER - 1; /* no sweep, which would wake it after a second */
    world_start(w);
    int64_t over = ap_now() + LITMUS;
    for (int round = 0; round < ROUNDS(400000) && (round % 64 || ap_now() < over); round++) {
        for (volatile int64_t i = delay + (int64_t)random_below(&seed, 64); i > 0; i--)
            ;
        bool asleep = sleeps_until(w) != 0;
        push_work(l);
        delay += asleep ? -(int64_t)random_below(&seed, 16) : (int64_t)random_below(&seed, 16);
        delay = delay < 0 ? 0 : delay > 20000 ? 20000 : delay;
        await_box_empty(l, round);
    }
}

/* ---- the run list ----------------------------------------------------- */

/* A write that was cut by the bound (256 KiB), not by the kernel, asks for no event (O17). */
LINK_TEST(poller_bound_needs_no_edge, UNIX, HIGH)
{
    int size = 4 * 1024 * 1024;
    if (setsockopt(l->fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) < 0)
        SKIP("no right to a large socket buffer");
    uint8_t *data = pattern_make(1, 0, MB);
    settle(w);
    uint64_t events = stats(w).events;
    CHECK_EQ(ap_conn_write(l->conn, (char *)data, MB), MB - AP_BOUND);
    step(w, 0); /* each turn is bounded as well: what is done under the mutex, and fairness */
    CHECK_EQ(link_stats(l).buffered_output, MB - 2 * AP_BOUND);
    for (int i = 0; i < 10; i++)
        step(w, 0);
    CHECK_EQ(link_stats(l).buffered_output, 0);
    CHECK_EQ(stats(w).events, events);
    CHECK_EQ(stats(w).stalls, 0);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_SENT);
    peer_expect(l, 1, 0, MB);
    free(data);
}

/* Work left over keeps epoll_wait from blocking, and a budget does not lose it. */
TEST(poller_budget_leaves_work_for_the_next_step)
{
    enum { N = 10 };
    struct world *w = world_open();
    struct link links[N];
    for (int i = 0; i < N; i++) {
        links[i] = link_open(w, AP_TCP, HIGH);
        CHECK_EQ(want(&links[i], 100), -EAGAIN);
    }
    settle(w);
    for (int i = 0; i < N; i++) {
        peer_say(&links[i], (uint64_t)i, 0, 100);
        arrived(&links[i], 100);
    }
    int served = 0;
    uint64_t waits = stats(w).waits;
    for (int steps = 0; served < N; steps++) {
        CHECK(steps < 10 * N);
        int n = ap_poller_step(w->poller, -1, 3);
        CHECK(n >= 0 && n <= 3);
        served += n;
    }
    CHECK(stats(w).waits <= waits + 1); /* only the first step could block */
    for (int i = 0; i < N; i++) {
        expect(&links[i], (uint64_t)i, 0, 100);
        link_close(&links[i]);
    }
    world_close(w);
}

/* A peer that floods does not keep another one waiting: 256 KiB a turn, then the next (O17). */
TEST(poller_is_fair)
{
    struct world *w = world_open();
    struct link flood = link_open(w, AP_UNIX, 64 * MB), other = link_open(w, AP_UNIX, HIGH);
    int size = 4 * 1024 * 1024;
    setsockopt(flood.peer, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    CHECK_EQ(want(&flood, 32 * MB), -EAGAIN);
    CHECK_EQ(want(&other, 10), -EAGAIN);
    settle(w);
    size_t in_kernel = peer_push(&flood, 1, 0, 2 * MB);
    if (in_kernel < 3 * AP_BOUND)
        SKIP("no right to a large socket buffer");
    peer_say(&other, 2, 0, 10);
    ap_poller_step(w->poller, 0, 2); /* one turn each */
    CHECK_EQ(mail_of(w, other.id), AP_MAIL_READ);
    CHECK_EQ(link_stats(&flood).buffered_input, AP_BOUND);
    /* and the flood goes on without any further event: once a step, so that events, the inbox and
     * the timers get their turn between */
    uint64_t events = stats(w).events;
    step(w, 0);
    CHECK_EQ(link_stats(&flood).buffered_input, 2 * AP_BOUND);
    for (int i = 0; i < 20; i++)
        step(w, 0);
    CHECK_EQ(link_stats(&flood).buffered_input, in_kernel);
    CHECK_EQ(stats(w).events, events);
    link_close(&flood);
    link_close(&other);
    world_close(w);
}

/* Events 5: after a wait that found something it polls once more before it blocks. */
LINK_TEST(poller_polls_once_more_before_it_blocks, TCP, HIGH)
{
    settle(w);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    CHECK(step(w, 0) > 0);
    ap_poller_stats before = stats(w);
    CHECK_EQ(step(w, 1), 0);
    CHECK_EQ(stats(w).polls, before.polls + 2);
    CHECK_EQ(stats(w).waits, before.waits + 1);
    CHECK_EQ(step(w, 1), 0); /* and only then */
    CHECK_EQ(stats(w).polls, before.polls + 3);
}

/* An idle poller costs nothing: it neither wakes nor polls (O15). */
LINK_TEST(poller_idle_does_not_wake, TCP, HIGH)
{
    CHECK_EQ(want_until(l, 1, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    settle(w);
    world_start(w);
    wait_asleep(w);
    /* the sweep of the pool, once after work */
    UNTIL(w, sleeps_until(w) > ap_now() + 3000 * MS);
    int64_t until = sleeps_until(w);
    uint64_t polls = stats(w).polls;
    usleep(100 * 1000);
    polls = stats(w).polls - polls;
    CHECK(polls == 0 || ap_now() >= until);
}
