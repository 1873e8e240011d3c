/* timer.c against a naive model: a deadline per timer in an array. */
#include "fixture.h"

#define TICK ((int64_t)1 << 20)
#define TIMERS 300

struct entry {
    ap_timer timer;
    int64_t deadline; /* 0: not filed */
};

struct model {
    ap_wheel wheel;
    int64_t now;
    struct entry entries[TIMERS];
};

static struct model *model_new(int64_t now)
{
    struct model *m = calloc(1, sizeof *m);
    CHECK(m != NULL);
    m->now = now;
    ap_wheel_init(&m->wheel, now);
    return m;
}

static void model_file(struct model *m, size_t i, int64_t deadline)
{
    ap_wheel_file(&m->wheel, &m->entries[i].timer, deadline);
    m->entries[i].deadline = deadline;
}

static void model_unfile(struct model *m, size_t i)
{
    ap_wheel_unfile(&m->wheel, &m->entries[i].timer);
    m->entries[i].deadline = 0;
}

static int64_t model_earliest(const struct model *m)
{
    int64_t earliest = AP_FOREVER;
    for (size_t i = 0; i < TIMERS; i++) {
        if (m->entries[i].deadline && m->entries[i].deadline < earliest)
            earliest = m->entries[i].deadline;
    }
    return earliest;
}

static size_t model_filed(const struct model *m)
{
    size_t n = 0;
    for (size_t i = 0; i < TIMERS; i++)
        n += m->entries[i].deadline != 0;
    return n;
}

/* Nothing is early, and nothing that is more than a tick late is left. */
static size_t model_run(struct model *m, int64_t now)
{
    ap_timer *timer;
    size_t fired = 0;
    m->now = now;
    while ((timer = ap_wheel_expire(&m->wheel, now)) != NULL) {
        struct entry *e = AP_CONTAINER(timer, struct entry, timer);
        CHECK(!ap_timer_filed(timer));
        CHECK(e->deadline != 0);
        CHECK(e->deadline <= now);
        e->deadline = 0;
        fired++;
    }
    CHECK(model_earliest(m) > now - TICK);
    CHECK_EQ(m->wheel.filed, model_filed(m));
    return fired;
}

/* O27 */
TEST(timer_is_never_early_and_at_most_a_tick_late)
{
    struct model *m = model_new(12345678901);
    uint64_t seed = 42;
    for (int round = 0; round < ROUNDS(200000); round++) {
        size_t i = random_below(&seed, TIMERS);
        /* spans of every level: 2^20 to 2^50 ns */
        int64_t span = (int64_t)1 << (20 + random_below(&seed, 31));
        switch (random_below(&seed, 4)) {
        case 0: model_unfile(m, i); break;
        case 1: model_run(m, m->now + (int64_t)random_below(&seed, (uint64_t)span / 16 + 1)); break;
        default: model_file(m, i, m->now + (int64_t)random_below(&seed, (uint64_t)span)); break;
        }
    }
    model_run(m, m->now + ((int64_t)1 << 51));
    CHECK_EQ(m->wheel.filed, 0);
    free(m);
}

/* A driver sleeps until ap_wheel_next and looks: that must bring it to each deadline, with no look
 * in vain, and never late by more than a tick. */
TEST(timer_next_leads_to_every_deadline)
{
    struct model *m = model_new(987654321);
    uint64_t seed = 7;
    for (size_t i = 0; i < TIMERS; i++)
        model_file(m, i, m->now + 1 + (int64_t)random_below(&seed, (uint64_t)1 << (20 + i % 30)));
    while (model_filed(m)) {
        int64_t next = ap_wheel_next(&m->wheel), earliest = model_earliest(m);
        CHECK(next >= earliest && next < earliest + TICK);
        CHECK(model_run(m, next) > 0);
    }
    CHECK_EQ(ap_wheel_next(&m->wheel), AP_FOREVER);
    free(m);
}

/* If others are unfiled meanwhile, there may be a look in vain for each. */
TEST(timer_next_after_unfiling)
{
    struct model *m = model_new(987654321);
    uint64_t seed = 11;
    for (size_t i = 0; i < TIMERS; i++)
        model_file(m, i, m->now + 1 + (int64_t)random_below(&seed, (uint64_t)1 << (20 + i % 30)));
    for (size_t i = 0; i < TIMERS; i += 2)
        model_unfile(m, i);
    size_t looks = 0;
    while (model_filed(m)) {
        int64_t next = ap_wheel_next(&m->wheel);
        CHECK(next < model_earliest(m) + TICK);
        CHECK(next > m->now - TICK);
        model_run(m, next > m->now ? next : m->now);
        CHECK(++looks <= TIMERS);
    }
    free(m);
}

/* The first and the last tick of a level, and the ones beside them. */
TEST(timer_levels_meet_without_a_gap)
{
    for (int level = 0; level < 5; level++) {
        for (int64_t off = -2; off <= 2; off++) {
            int64_t ticks = ((int64_t)1 << (6 * (level + 1))) + off;
            struct model *m = model_new(77 * TICK + 13);
            int64_t deadline = ticks * TICK;
            model_file(m, 0, deadline);
            if (deadline > m->now) {
                CHECK_EQ(model_run(m, deadline - 1), 0);
                CHECK_EQ(model_run(m, deadline + TICK), 1);
            }
            free(m);
        }
    }
}

TEST(timer_in_the_past_is_due_with_the_next_tick)
{
    struct model *m = model_new(5 * TICK);
    model_file(m, 0, 1);
    model_file(m, 1, 5 * TICK);
    CHECK_EQ(model_run(m, 6 * TICK), 2);
    free(m);
}

TEST(timer_refiled_counts_once)
{
    struct model *m = model_new(5 * TICK);
    model_file(m, 0, 10 * TICK);
    model_file(m, 0, 5000 * TICK);
    CHECK_EQ(m->wheel.filed, 1);
    CHECK_EQ(model_run(m, 100 * TICK), 0);
    model_file(m, 0, 101 * TICK);
    CHECK_EQ(model_run(m, 102 * TICK), 1);
    model_unfile(m, 0); /* not filed: nothing happens */
    CHECK_EQ(m->wheel.filed, 0);
    free(m);
}

TEST(timer_leaves_during_expiry)
{
    struct model *m = model_new(TICK);
    for (size_t i = 0; i < 10; i++)
        model_file(m, i, 3 * TICK);
    CHECK(ap_wheel_expire(&m->wheel, 4 * TICK) == &m->entries[0].timer);
    m->entries[0].deadline = 0;
    model_unfile(m, 1);
    model_unfile(m, 9);
    CHECK_EQ(model_run(m, 4 * TICK), 7);
    free(m);
}

/* What no level reaches is looked at when its turn comes, and must neither fire early, nor be
 * lost, nor keep the driver from sleeping. */
TEST(timer_far_future)
{
    struct model *m = model_new(TICK);
    model_file(m, 0, AP_FOREVER - 1);
    model_file(m, 1, AP_FOREVER / 2);
    CHECK(ap_wheel_next(&m->wheel) > (int64_t)1 << 50);
    CHECK_EQ(model_run(m, (int64_t)3600 * 1000 * MS), 0);
    CHECK(ap_wheel_next(&m->wheel) > (int64_t)1 << 50);
    CHECK_EQ(m->wheel.filed, 2);
    free(m);
}

/* CLOCK_MONOTONIC counts from boot: 2^56 ns are 834 days of uptime. A timer filed before such a
 * round number and due behind it must come, and come once. */
TEST(timer_crosses_every_power_of_two_of_the_clock)
{
    for (int bit = 21; bit < 62; bit++) {
        int64_t edge = (int64_t)1 << bit;
        struct model *m = model_new(edge - 10 * TICK > 0 ? edge - 10 * TICK : 1);
        int64_t deadline = edge + 10 * TICK;
        model_file(m, 0, deadline);
        for (int looks = 0; m->entries[0].deadline; looks++) {
            CHECK(looks < 100);
            int64_t next = ap_wheel_next(&m->wheel);
            m->now = next > m->now ? next : m->now;
            ap_timer *timer = ap_wheel_expire(&m->wheel, m->now);
            if (timer && m->now < deadline)
                model_file(m, 0, deadline); /* looked at early, as a driver would */
            else if (timer)
                m->entries[0].deadline = 0;
        }
        CHECK(m->now >= deadline && m->now <= deadline + TICK);
        free(m);
    }
}
