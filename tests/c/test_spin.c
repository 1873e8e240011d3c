/* loan.c: a loop that looks again, and spins, before it goes on. */
#include "fixture.h"

#include "driver.h"

#include <sched.h>

/* A test without connections. */
#define WORLD_TEST(name_)                    \
    static void name_##_in(struct world *w); \
    TEST(name_)                              \
    {                                        \
        struct world *w = world_open();      \
        name_##_in(w);                       \
        world_close(w);                      \
    }                                        \
    static void name_##_in(struct world *w)

#define LONG (100 * 1000 * MS) /* a limit that no test reaches */

/* Lends the poller, which has one core or more. */
static void begin(struct world *w, int64_t limit, bool alone)
{
    CHECK_OK(ap_spin_limit(limit));
    settle(w);
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
    w->hub->spin.alone = alone;
}

static int note(struct world *w, const ap_token *tokens, int n)
{
    for (int i = 0; i < n; i++)
        mail_at(w, tokens[i].id)->bits |= tokens[i].bits;
    return n;
}

static int drive(struct world *w)
{
    ap_token tokens[16];
    return note(w, tokens, ap_hub_drive(w->hub, w->poller, tokens, 16));
}

static int look(struct world *w)
{
    ap_token tokens[16];
    return note(w, tokens, ap_hub_look(w->hub, w->poller, tokens, 16));
}

static int spin(struct world *w)
{
    ap_token tokens[16];
    int n = note(w, tokens, ap_hub_spin(w->hub, w->poller, tokens, 16));
    ap_hub_spun(w->hub, w->poller);
    return n;
}

static uint64_t looks(struct world *w)
{
    return stats(w).looks;
}

static uint64_t hits(struct world *w)
{
    return stats(w).hits;
}

/* Turns of the loop in which nothing comes; each has the chance to look. */
static void quiet_turns(struct world *w, int n)
{
    for (int i = 0; i < n; i++) {
        CHECK_EQ(drive(w), 0);
        CHECK_EQ(look(w), 0);
    }
}

/* Something comes while the loop looks. */
static void hit(struct link *l, uint64_t at)
{
    CHECK_EQ(want(l, 1), -EAGAIN);
    peer_say(l, 1, at, 1);
    arrived(l, 1);
    CHECK_EQ(look(l->w), 1);
    expect(l, 1, at, 1);
}

/* ---- whether it looks ------------------------------------------------- */

LINK_TEST(spin_is_off_at_first, TCP, HIGH)
{
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
    CHECK_EQ(want(l, 1), -EAGAIN);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    uint64_t polls = stats(w).polls;
    CHECK_EQ(look(w), 0);
    CHECK_EQ(stats(w).polls, polls);
    CHECK_EQ(drive(w), 1);
}

LINK_TEST(spin_can_be_switched_off, TCP, HIGH)
{
    begin(w, LONG, false);
    drive(w);
    hit(l, 0);
    CHECK_OK(ap_spin_limit(0));
    uint64_t polls = stats(w).polls;
    CHECK_EQ(look(w), 0);
    CHECK_EQ(stats(w).polls, polls);
    CHECK_EQ(hits(w), 1);
}

WORLD_TEST(spin_limits)
{
    CHECK_EQ(ap_spin_limit(-1), -EINVAL);
    CHECK_EQ(ap_spin_limit(INT64_MAX), -EINVAL);
    begin(w, LONG, true);
    drive(w);
    quiet_turns(w, 1);
    CHECK_EQ(looks(w), 1);
}

WORLD_TEST(spin_ends_with_the_turn)
{
    begin(w, MS, true);
    CHECK_EQ(drive(w), 0);
    while (ap_now() < w->hub->spin.began + 8 * MS)
        sched_yield();
    uint64_t polls = stats(w).polls;
    CHECK_EQ(look(w), 0);
    CHECK_EQ(stats(w).polls, polls);
    CHECK_EQ(looks(w), 0);
    CHECK_EQ(w->hub->spin.doubt, 0);
    CHECK_OK(ap_spin_limit(LONG)); /* the same moment lies within the turn */
    CHECK_EQ(look(w), 0);
    CHECK_EQ(looks(w), 1);
}

/* After one that was in vain 1 chance is passed up, then 3, 7, ... 1023. */
WORLD_TEST(spin_backs_off)
{
    begin(w, LONG, true);
    int chances = 0;
    for (unsigned n = 1; n <= 10; n++) {
        while (looks(w) < n) {
            quiet_turns(w, 1);
            chances++;
        }
        CHECK_EQ(chances, (1 << n) - 1);
    }
    quiet_turns(w, 3 * 1024);
    CHECK_EQ(looks(w), 13);
    CHECK_EQ(hits(w), 0);
}

LINK_TEST(spin_comes_back, TCP, HIGH)
{
    begin(w, LONG, true);
    quiet_turns(w, 63);
    CHECK_EQ(looks(w), 6);
    quiet_turns(w, 63); /* passed up */
    drive(w);
    for (uint64_t i = 0; i < 6; i++)
        hit(l, i);
    CHECK_EQ(looks(w), 12);
    CHECK_EQ(hits(w), 6);
    quiet_turns(w, 3); /* as at first */
    CHECK_EQ(looks(w), 14);
}

WORLD_TEST(spin_alone_on_a_core_there_is_none)
{
    begin(w, LONG, false);
    drive(w);
    CHECK_EQ(look(w), -EAGAIN);
    cpu_set_t before, one;
    CHECK_OK(sched_getaffinity(0, sizeof before, &before));
    CPU_ZERO(&one);
    CPU_SET(sched_getcpu(), &one);
    CHECK_OK(sched_setaffinity(0, sizeof one, &one));
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
    drive(w);
    CHECK_EQ(look(w), 0);
    CHECK_OK(sched_setaffinity(0, sizeof before, &before));
}

/* ---- spinning --------------------------------------------------------- */

LINK_TEST(spin_is_bounded, TCP, HIGH)
{
    begin(w, MS, false);
    CHECK_EQ(want(l, 1), -EAGAIN);
    drive(w);
    CHECK_EQ(spin(w), 0);
    CHECK_EQ(stats(w).spins, 1);
    CHECK_EQ(hits(w), 0);
    CHECK_EQ(w->hub->spin.pause, 1);
}

static void *say(void *arg)
{
    struct link *l = arg;
    uint64_t polls = stats(l->w).polls;
    while (stats(l->w).polls < polls + 3)
        sched_yield();
    peer_say(l, 1, 0, 1);
    return NULL;
}

LINK_TEST(spin_finds_what_comes, STREAMS, HIGH)
{
    begin(w, LONG, false);
    CHECK_EQ(want(l, 1), -EAGAIN);
    drive(w);
    CHECK_EQ(look(w), -EAGAIN);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, say, l), 0);
    CHECK_EQ(spin(w), 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(mail_of_quietly(w, l->id), AP_MAIL_READ);
    CHECK(peek_events(ap_hub_fd(w->hub), POLLIN) == 0); /* nobody had to signal */
    expect(l, 1, 0, 1);
}

/* The same, but another thread makes the step. */
static void *say_and_step(void *arg)
{
    struct link *l = arg;
    pthread_mutex_lock(&l->w->poller->lease);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    CHECK_OK(ap_driver_step(l->w->poller, 0, BUDGET));
    pthread_mutex_unlock(&l->w->poller->lease);
    return NULL;
}

LINK_TEST(spin_finds_what_others_have_posted, STREAMS, HIGH)
{
    begin(w, LONG, false);
    CHECK_EQ(want(l, 1), -EAGAIN);
    drive(w);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, say_and_step, l), 0);
    CHECK_EQ(spin(w), 1);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    expect(l, 1, 0, 1);
}

/* The loop's thread had to wait before it could run Python again. */
LINK_TEST(spin_that_ends_late_was_in_vain, TCP, HIGH)
{
    ap_token tokens[16];
    begin(w, LONG, false);
    CHECK_EQ(want(l, 1), -EAGAIN);
    drive(w);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    CHECK_EQ(ap_hub_spin(w->hub, w->poller, tokens, 16), 1);
    usleep(1000);
    ap_hub_spun(w->hub, w->poller);
    CHECK_EQ(hits(w), 0);
    CHECK_EQ(w->hub->spin.doubt, 1);
    expect(l, 1, 0, 1);
}

static void *take_back(void *arg)
{
    struct world *w = arg;
    CHECK_OK(ap_poller_lend(w->poller, NULL));
    return NULL;
}

WORLD_TEST(spin_ends_with_the_loan)
{
    begin(w, LONG, false);
    drive(w);
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, take_back, w), 0);
    CHECK_EQ(spin(w), 0);
    CHECK_EQ(pthread_join(thread, NULL), 0);
    CHECK_EQ(look(w), -EPERM);
}

WORLD_TEST(spin_ends_when_a_step_fails)
{
    begin(w, LONG, false);
    drive(w);
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, ENOMEM, 2, 1, 0));
    CHECK_EQ(spin(w), 0);
    CHECK_EQ(ap_fault_hits(AP_CALL_EPOLL_WAIT), 1);
    CHECK_EQ(look(w), -EPERM);
}

WORLD_TEST(spin_look_that_fails)
{
    begin(w, LONG, true);
    drive(w);
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, ENOMEM, 0, 1, 0));
    CHECK_EQ(look(w), 0);
    CHECK_EQ(look(w), -EPERM);
}

/* ---- races ------------------------------------------------------------ */

struct client {
    struct link *l;
    int rounds;
};

/* Says a byte, and waits for one. */
static void *talk(void *arg)
{
    struct client *c = arg;
    for (int i = 0; i < c->rounds; i++) {
        uint8_t reply;
        peer_say(c->l, 1, (uint64_t)i, 1);
        struct pollfd ready = {.fd = c->l->peer, .events = POLLIN};
        CHECK_EQ(poll(&ready, 1, 30000), 1);
        CHECK_EQ(recv(c->l->peer, &reply, 1, 0), 1);
    }
    return NULL;
}

/* A loop that looks and spins, its guard, and a client in a thread of its own. */
LINK_TEST(spin_races_against_the_guard, STREAMS, HIGH)
{
    struct client c = {.l = l, .rounds = ROUNDS(20000)};
    begin(w, MS / 10, false);
    world_start(w);
    pthread_t thread;
    CHECK_EQ(want(l, 1), -EAGAIN);
    CHECK_EQ(pthread_create(&thread, NULL, talk, &c), 0);
    for (int i = 0, n = 0; i < c.rounds;) {
        if (n == 0) {
            struct pollfd at[] = {{.fd = ap_poller_fd(w->poller), .events = POLLIN},
                                  {.fd = ap_hub_fd(w->hub), .events = POLLIN}};
            CHECK(poll(at, 2, 30000) > 0);
            if (at[1].revents)
                collect(w);
            n = drive(w);
        }
        if (mail_of_quietly(w, l->id) & AP_MAIL_READ) {
            expect(l, 1, (uint64_t)i, 1);
            CHECK_EQ(ap_conn_read(l->conn, l->pos, 1, 0, 0, "r", 1), -EAGAIN);
            i++;
        }
        n = look(w);
        if (n == -EAGAIN)
            n = spin(w);
        CHECK_OK(n);
    }
    CHECK_EQ(pthread_join(thread, NULL), 0);
}
