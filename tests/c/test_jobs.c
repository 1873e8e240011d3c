/* jobs.c: every push is followed by a call of the job, in turn, by one thread, until the stop. */
#include "fixture.h"
#include "jobs.h"

/* ---- slots with jobs -------------------------------------------------- */

/* What the job of a link does, and what the test knows of it. */
struct work {
    ap_slot *slot;
    void (*body)(struct work *k);
    uint64_t wanted, done; /* under the slot's mutex */
    _Atomic int calls;
    _Atomic bool running, let_go;
    _Atomic int turn; /* of the last call, beginning with 1 */
};

#define WORKS 256

static struct work *works[WORKS];
static _Atomic int turns;

static void job(ap_slot *slot)
{
    struct work *k = works[slot->index];
    CHECK(!atomic_exchange(&k->running, true));
    atomic_store(&k->turn, atomic_fetch_add(&turns, 1) + 1);
    atomic_fetch_add(&k->calls, 1);
    if (k->body)
        k->body(k);
    atomic_store(&k->running, false);
}

static ap_slot_ops operations;

/* Before anybody else knows the link. */
static struct work *employ(struct link *l, void (*body)(struct work *k))
{
    ap_slot *slot = &l->conn->slot;
    struct work *k = calloc(1, sizeof *k);
    CHECK(k != NULL && slot->index < WORKS);
    if (!operations.job) {
        operations = *slot->ops;
        operations.job = job;
    }
    slot->ops = &operations;
    k->slot = slot;
    k->body = body;
    works[slot->index] = k;
    return k;
}

static int push_as(struct work *k, bool begun)
{
    ap_slot_lock(k->slot);
    int rc = ap_jobs_push(k->slot, begun);
    ap_slot_unlock(k->slot);
    return rc;
}

static int push(struct work *k)
{
    return push_as(k, false);
}

static void wait_until(struct work *k)
{
    while (!atomic_load(&k->let_go))
        sched_yield();
}

#define AWAIT(condition)                                          \
    for (int64_t end_ = ap_now() + PATIENCE; !(condition);) {     \
        sched_yield();                                            \
        if (ap_now() > end_)                                      \
            CHECK_FAIL("AWAIT(%s): it did not come", #condition); \
    }

/* Begins a job that lasts until let_go. */
static void block(struct work *k)
{
    CHECK_OK(push(k));
    AWAIT(atomic_load(&k->running));
}

static bool has_thread(ap_poller *poller)
{
    pthread_mutex_lock(&poller->jobs.mutex);
    bool has = poller->jobs.has_thread;
    pthread_mutex_unlock(&poller->jobs.mutex);
    return has;
}

static int refs(struct work *k)
{
    return atomic_load(&k->slot->refs);
}

/* ---- turns ------------------------------------------------------------ */

LINKS_TEST(jobs_have_turns, UNIX, HIGH, 5)
{
    struct work *k[5];
    for (int i = 0; i < 5; i++)
        k[i] = employ(&l[i], i == 0 ? wait_until : NULL);
    CHECK(!has_thread(w->poller)); /* nobody has needed one */
    block(k[0]);
    for (int again = 0; again < 3; again++) {
        for (int i = 4; i > 0; i--)
            CHECK_OK(push(k[i]));
    }
    for (int i = 1; i < 5; i++)
        CHECK_EQ(refs(k[i]), 3);
    atomic_store(&k[0]->let_go, true);
    for (int i = 1; i < 5; i++) {
        AWAIT(refs(k[i]) == 2);
        CHECK_EQ(atomic_load(&k[i]->calls), 1);
        CHECK_EQ(atomic_load(&k[i]->turn), 6 - i);
    }
    CHECK_EQ(refs(k[0]), 2);
    for (int i = 0; i < 5; i++)
        free(k[i]);
}

LINKS_TEST(jobs_that_have_begun_come_first, UNIX, HIGH, 7)
{
    static const int order[] = {2, 3, 5, 1, 4, 6}; /* 2, 3 and 5 have begun */
    struct work *k[7];
    for (int i = 0; i < 7; i++)
        k[i] = employ(&l[i], i == 0 ? wait_until : NULL);
    block(k[0]);
    for (int i = 1; i < 7; i++)
        CHECK_OK(push_as(k[i], i == 2 || i == 3 || i == 5));
    CHECK_OK(push_as(k[1], true)); /* it is in the queue already */
    atomic_store(&k[0]->let_go, true);
    for (int i = 0; i < 6; i++) {
        struct work *one = k[order[i]];
        AWAIT(refs(one) == 2);
        CHECK_EQ(atomic_load(&one->turn), i + 2);
    }
    CHECK_OK(push_as(k[1], true)); /* and into an empty one */
    AWAIT(refs(k[1]) == 2);
    CHECK_EQ(atomic_load(&k[1]->calls), 2);
    for (int i = 0; i < 7; i++)
        free(k[i]);
}

LINK_TEST(jobs_pushed_while_they_run_run_once_more, UNIX, HIGH)
{
    struct work *k = employ(l, wait_until);
    block(k);
    for (int i = 0; i < 3; i++)
        CHECK_OK(push(k));
    CHECK_EQ(refs(k), 4);
    CHECK_EQ(atomic_load(&k->calls), 1);
    atomic_store(&k->let_go, true);
    AWAIT(refs(k) == 2);
    CHECK_EQ(atomic_load(&k->calls), 2);
    free(k);
}

static void push_again(struct work *k)
{
    wait_until(k);
    if (atomic_load(&k->calls) < 10)
        CHECK_OK(push(k));
}

/* A slot that has work left goes behind the others. */
LINKS_TEST(jobs_may_push_themselves, UNIX, HIGH, 2)
{
    struct work *a = employ(&l[0], push_again), *b = employ(&l[1], push_again);
    block(a);
    CHECK_OK(push(b));
    atomic_store(&b->let_go, true);
    atomic_store(&a->let_go, true);
    AWAIT(refs(a) == 2 && refs(b) == 2);
    CHECK_EQ(atomic_load(&a->calls), 10);
    CHECK_EQ(atomic_load(&b->calls), 10);
    CHECK_EQ(atomic_load(&a->turn), 19);
    CHECK_EQ(atomic_load(&b->turn), 20);
    free(a);
    free(b);
}

/* As a handshake: looks under the mutex, computes without it, and notes what has come of it. */
static void compute(struct work *k)
{
    ap_slot_lock(k->slot);
    uint64_t wanted = k->wanted;
    ap_slot_unlock(k->slot);
    for (volatile uint64_t i = wanted % 500; i > 0; i--)
        ;
    ap_slot_lock(k->slot);
    CHECK(wanted >= k->done);
    k->done = wanted;
    ap_slot_unlock(k->slot);
}

static bool is_done(struct work *k)
{
    ap_slot_lock(k->slot);
    bool done = k->done == k->wanted;
    ap_slot_unlock(k->slot);
    return done;
}

struct pusher {
    struct work **k;
    int count;
    uint64_t seed;
    int refused;
};

static int push_one(struct work *k)
{
    ap_slot_lock(k->slot);
    k->wanted++;
    int rc = ap_jobs_push(k->slot, false);
    ap_slot_unlock(k->slot);
    return rc;
}

/* Now and then it waits, so that the thread finds the queue empty and falls asleep. */
static void *push_many(void *arg)
{
    struct pusher *p = arg;
    RACE(round, 30000)
    {
        struct work *k = p->k[random_below(&p->seed, (uint64_t)p->count)];
        CHECK_OK(push_one(k));
        if (random_below(&p->seed, 20) == 0)
            AWAIT(is_done(k));
    }
    return NULL;
}

LINKS_TEST(jobs_litmus_no_push_is_lost, UNIX, HIGH, 3)
{
    struct work *k[3];
    pthread_t threads[3];
    struct pusher p[3];
    for (int i = 0; i < 3; i++)
        k[i] = employ(&l[i], compute);
    for (int i = 0; i < 3; i++) {
        p[i] = (struct pusher){.k = k, .count = 3, .seed = (uint64_t)i + 1};
        CHECK_EQ(pthread_create(&threads[i], NULL, push_many, &p[i]), 0);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 3; i++)
        AWAIT(is_done(k[i]) && refs(k[i]) == 2);
    for (int i = 0; i < 3; i++)
        free(k[i]);
}

/* ---- the thread ------------------------------------------------------- */

/* The caller is told, nothing is queued, and the next push tries again. */
LINK_TEST(jobs_without_a_thread, UNIX, HIGH)
{
    struct work *k = employ(l, NULL);
    int32_t before = atomic_load(&w->poller->refs);
    ap_fault_set(AP_CALL_THREAD, EAGAIN, 0, 2, 0);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(push(k), -EAGAIN);
        CHECK_EQ(refs(k), 2);
        CHECK_EQ(atomic_load(&w->poller->refs), before);
        CHECK(!has_thread(w->poller));
    }
    CHECK_OK(push(k));
    AWAIT(refs(k) == 2);
    CHECK_EQ(atomic_load(&k->calls), 1);
    ap_fault_clear();
    free(k);
}

static void look_at_signals(struct work *k)
{
    sigset_t blocked;
    (void)k;
    CHECK_EQ(pthread_sigmask(SIG_BLOCK, NULL, &blocked), 0);
    CHECK(sigismember(&blocked, SIGINT) && sigismember(&blocked, SIGTERM));
    CHECK(sigismember(&blocked, SIGCHLD) && sigismember(&blocked, SIGUSR1));
}

LINK_TEST(jobs_take_no_signals, UNIX, HIGH)
{
    struct work *k = employ(l, look_at_signals);
    CHECK_OK(push(k));
    AWAIT(refs(k) == 2);
    free(k);
}

/* ---- closing ---------------------------------------------------------- */

static void find_it_closed(struct work *k)
{
    wait_until(k);
    CHECK_EQ(ap_slot_enter(k->slot), -EBADF);
}

/* The last reference to both goes in the jobs' thread. */
LINKS_TEST(jobs_of_closed_slots, STREAMS, HIGH, 2)
{
    struct work *running = employ(&l[0], find_it_closed), *queued = employ(&l[1], find_it_closed);
    atomic_store(&queued->let_go, true);
    block(running);
    CHECK_OK(push(queued));
    link_close(&l[0]);
    link_close(&l[1]);
    settle(w);
    CHECK_EQ(refs(running), 1);
    CHECK_EQ(refs(queued), 1);
    CHECK_EQ(stats(w).slots, 2);
    atomic_store(&running->let_go, true);
    UNTIL(w, stats(w).slots == 0);
    CHECK_EQ(atomic_load(&queued->calls), 1);
    CHECK_OK(ap_poller_stop(w->poller));
    free(running);
    free(queued);
}

/* ---- the end of the poller -------------------------------------------- */

static void *stop(void *arg)
{
    CHECK_OK(ap_poller_stop(arg));
    return NULL;
}

static bool is_stopped(ap_poller *poller)
{
    pthread_mutex_lock(&poller->jobs.mutex);
    bool stopped = poller->jobs.stopped;
    pthread_mutex_unlock(&poller->jobs.mutex);
    return stopped;
}

static void push_in_vain(struct work *k)
{
    wait_until(k);
    CHECK_EQ(push(k), -ECANCELED);
}

static void stop_and_restart(struct world *w, struct work **k)
{
    pthread_t thread;
    int before = atomic_load(&k[0]->calls);
    atomic_store(&k[0]->let_go, false);
    block(k[0]);
    CHECK_OK(push(k[1]));
    CHECK_OK(push(k[2]));
    CHECK_EQ(pthread_create(&thread, NULL, stop, w->poller), 0);
    AWAIT(is_stopped(w->poller));
    CHECK_EQ(push(k[1]), -ECANCELED);
    CHECK_OK(ap_poller_stop(w->poller)); /* another joins */
    CHECK(atomic_load(&k[0]->running));
    atomic_store(&k[0]->let_go, true);
    pthread_join(thread, NULL);
    CHECK(!atomic_load(&k[0]->running));
    CHECK_EQ(atomic_load(&k[0]->calls), before + 1);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(refs(k[i]), 2);
        CHECK_EQ(push(k[i]), -ECANCELED);
        CHECK_EQ(atomic_load(&k[i]->calls), i == 0 ? before + 1 : before);
    }
    CHECK(!has_thread(w->poller));
    world_start(w);
    for (int i = 1; i < 3; i++) {
        CHECK_OK(push(k[i]));
        AWAIT(refs(k[i]) == 2);
        CHECK_EQ(atomic_load(&k[i]->calls), before + 1);
    }
}

/* Of a poller that has a thread of its own, and of one that has not. */
LINKS_TEST(jobs_stopped_and_restarted, UNIX, HIGH, 3)
{
    struct work *k[3];
    for (int i = 0; i < 3; i++)
        k[i] = employ(&l[i], i == 0 ? push_in_vain : NULL);
    for (int again = 0; again < 3; again++)
        stop_and_restart(w, k);
    world_stop(w);
    for (int i = 0; i < 3; i++)
        free(k[i]);
}

/* The thread, which sleeps, keeps the poller: until it is stopped, and no longer. */
TEST(jobs_keep_their_poller)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    struct work *k = employ(&l, NULL);
    CHECK_OK(push(k));
    AWAIT(refs(k) == 2);
    CHECK_EQ(atomic_load(&w->poller->refs), 3); /* creator, slot, thread */
    CHECK_OK(ap_poller_stop(w->poller));
    CHECK_EQ(atomic_load(&w->poller->refs), 2);
    link_close(&l);
    world_close(w);
    free(k);
}

static void find_it_broken(struct work *k)
{
    wait_until(k);
    CHECK_OK(ap_slot_enter(k->slot));
    CHECK(k->slot->orphaned);
    ap_slot_unlock(k->slot);
}

/* Jobs are called still, and stopping is as always. */
TEST(jobs_of_a_poller_that_fails)
{
    struct world *w = world_open();
    struct link running = link_open(w, AP_TCP, HIGH), later = link_open(w, AP_UNIX, HIGH);
    struct work *a = employ(&running, find_it_broken), *b = employ(&later, find_it_broken);
    atomic_store(&b->let_go, true);
    block(a);
    CHECK_OK(push(b));
    ap_fault_set(AP_CALL_EPOLL_WAIT, EBADF, 0, 1, 0);
    CHECK_EQ(ap_poller_step(w->poller, 0, BUDGET), -EBADF);
    ap_fault_clear();
    CHECK_EQ(ap_poller_state(w->poller), AP_EPOLLER - EBADF);
    collect(w); /* the mailbox has references */
    atomic_store(&a->let_go, true);
    AWAIT(atomic_load(&b->calls) == 1 && refs(b) == 2);
    CHECK_OK(push(a));
    AWAIT(atomic_load(&a->calls) == 2 && refs(a) == 2);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_OK(ap_poller_stop(w->poller));
    CHECK(!has_thread(w->poller));
    link_close(&running);
    link_close(&later);
    CHECK_EQ(stats(w).slots, 0);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    free(w);
    free(a);
    free(b);
}

/* It may end while a job runs for a slot that has been closed. */
TEST(jobs_of_a_poller_that_is_drained)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    struct work *k = employ(&l, find_it_closed);
    block(k);
    CHECK_OK(ap_poller_drain(w->poller, 1));
    link_close(&l);
    CHECK_OK(ap_poller_step(w->poller, 0, BUDGET));
    CHECK_EQ(ap_poller_state(w->poller), AP_EPOLLER - ECANCELED);
    CHECK_EQ(stats(w).slots, 1);
    atomic_store(&k->let_go, true);
    CHECK_OK(ap_poller_stop(w->poller));
    CHECK_EQ(stats(w).slots, 0);
    CHECK_OK(ap_hub_kill(w->hub));
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    free(w);
    free(k);
}

static void nothing_matters(struct work *k)
{
    if (ap_slot_enter(k->slot) == 0)
        ap_slot_unlock(k->slot);
}

static void *push_some(void *arg)
{
    struct pusher *p = arg;
    for (int i = 0; i < 30; i++) {
        int rc = push_one(p->k[random_below(&p->seed, (uint64_t)p->count)]);
        CHECK(rc == 0 || rc == -ECANCELED);
        p->refused += rc < 0;
    }
    return NULL;
}

static void end_some_time(struct world *w, uint64_t seed)
{
    pthread_t thread;
    for (volatile uint64_t i = random_below(&seed, 30000); i > 0; i--)
        ;
    if (seed % 2)
        CHECK_OK(ap_hub_kill(w->hub));
    CHECK_EQ(pthread_create(&thread, NULL, stop, w->poller), 0);
    CHECK_OK(ap_poller_stop(w->poller));
    pthread_join(thread, NULL);
    CHECK(!has_thread(w->poller));
    CHECK(w->poller->jobs.head == NULL);
}

/* Two stop a poller at any moment, and its slots are closed: nothing is left. */
TEST(jobs_races_pushing_against_stopping)
{
    RACE(round, 1000)
    {
        struct world *w = world_open();
        struct link l[3];
        struct work *k[3];
        pthread_t threads[2];
        struct pusher p[2];
        for (int i = 0; i < 3; i++) {
            l[i] = link_open(w, AP_UNIX, HIGH);
            k[i] = employ(&l[i], nothing_matters);
        }
        world_start(w);
        for (int i = 0; i < 2; i++) {
            p[i] = (struct pusher){.k = k, .count = 3, .seed = (uint64_t)(2 * round + i + 1)};
            CHECK_EQ(pthread_create(&threads[i], NULL, push_some, &p[i]), 0);
        }
        end_some_time(w, (uint64_t)round + 1000);
        for (int i = 0; i < 2; i++)
            pthread_join(threads[i], NULL);
        for (int i = 0; i < 3; i++) {
            CHECK_EQ(push(k[i]), -ECANCELED);
            link_close(&l[i]);
        }
        w->threaded = false;
        world_close(w);
        for (int i = 0; i < 3; i++)
            free(k[i]);
    }
}

/* ---- fork ------------------------------------------------------------- */

struct family {
    struct world *w;
    struct link *l;
    struct work *k;
};

static void touch(struct family *f)
{
    int32_t before = refs(f->k);
    CHECK_EQ(ap_poller_stop(f->w->poller), -ECHILD);
    CHECK_EQ(ap_conn_close(f->l->conn, 0, 0), -ECHILD);
    ap_conn_release(f->l->conn);
    CHECK_EQ(refs(f->k), before);
    CHECK_OK(ap_fork_child());
}

static void start_afresh(void)
{
#ifdef __SANITIZE_THREAD__
    return; /* it allows no threads in a child */
#endif
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    struct work *k = employ(&l, NULL);
    CHECK_OK(push(k));
    AWAIT(refs(k) == 2);
    CHECK_EQ(atomic_load(&k->calls), 1);
    link_close(&l);
    world_close(w);
    free(k);
}

static void fork_now(struct family *f)
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        touch(f);
        start_afresh();
        check_leave(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
}

static void hold_it(struct work *k)
{
    ap_slot_lock(k->slot);
    wait_until(k);
    ap_slot_unlock(k->slot);
}

/* While one runs, and holds its slot, and another is queued; and with the queue's mutex held. */
LINKS_TEST(jobs_and_fork, UNIX, HIGH, 2)
{
    struct work *running = employ(&l[0], hold_it), *queued = employ(&l[1], NULL);
    block(running);
    CHECK_OK(push(queued));
    fork_now(&(struct family){.w = w, .l = &l[0], .k = running});
    pthread_mutex_lock(&w->poller->jobs.mutex);
    fork_now(&(struct family){.w = w, .l = &l[1], .k = queued});
    pthread_mutex_unlock(&w->poller->jobs.mutex);
    CHECK_EQ(atomic_load(&queued->calls), 0);
    atomic_store(&running->let_go, true);
    AWAIT(refs(queued) == 2);
    CHECK_EQ(atomic_load(&queued->calls), 1);
    free(running);
    free(queued);
}
