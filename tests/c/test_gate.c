/* gate.c: no thread is inside of a library when the process forks. The library is one mutex. */
#include "fixture.h"
#include "gate.h"

static pthread_mutex_t library = PTHREAD_MUTEX_INITIALIZER;

static void is_free(void)
{
    CHECK_EQ(pthread_mutex_trylock(&library), 0);
    pthread_mutex_unlock(&library);
    ap_gate_enter();
    ap_gate_leave();
}

static void is_locked(void)
{
    CHECK_EQ(pthread_mutex_trylock(&library), EBUSY);
    CHECK_EQ(atomic_load(&ap_gate), 0); /* nobody is inside whom the child could wait for */
    ap_gate_enter();
    ap_gate_leave();
    ap_gate_shut();
    ap_gate_open();
}

static void in_child(void (*body)(void))
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        body();
        check_leave(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
}

enum { OUTSIDE, INSIDE, FORKED };

static uint32_t forks(void)
{
    return atomic_load(&ap_gate) / AP_GATE_FORK;
}

/* Leaves when it sees that somebody wants to fork. */
static void *compute(void *arg)
{
    _Atomic int *state = arg;
    ap_gate_enter();
    pthread_mutex_lock(&library);
    atomic_store(state, INSIDE);
    while (forks() == 0)
        sched_yield();
    for (int i = 0; i < 1000; i++)
        sched_yield();
    CHECK_EQ(atomic_load(state), INSIDE);
    pthread_mutex_unlock(&library);
    ap_gate_leave();
    ap_gate_enter(); /* waits for the fork */
    CHECK_EQ(atomic_load(state), FORKED);
    ap_gate_leave();
    return NULL;
}

static _Atomic int state;

static void note_fork(void)
{
    CHECK_EQ(forks(), 1);
    for (int i = 0; i < 1000; i++)
        sched_yield();
    atomic_store(&state, FORKED);
}

/* Handlers of the parent are called in the order of their registration: ours is first to let in. */
TEST(gate_a_fork_waits_for_those_inside)
{
    pthread_t thread;
    CHECK_EQ(pthread_atfork(NULL, note_fork, NULL), 0);
    CHECK_OK(ap_epoch_watch());
    CHECK_EQ(pthread_create(&thread, NULL, compute, &state), 0);
    while (atomic_load(&state) != INSIDE)
        sched_yield();
    in_child(is_free);
    pthread_join(thread, NULL);
    CHECK_EQ(atomic_load(&ap_gate), 0);
}

static _Atomic bool over;

static void *use_library(void *arg)
{
    _Atomic uint64_t *uses = arg;
    while (!atomic_load(&over)) {
        ap_gate_enter();
        pthread_mutex_lock(&library);
        pthread_mutex_unlock(&library);
        ap_gate_leave();
        atomic_fetch_add(uses, 1);
    }
    return NULL;
}

static void *fork_often(void *arg)
{
    (void)arg;
    RACE(round, 300)
    in_child(is_free);
    return NULL;
}

/* Two threads fork: that one of them is done does not open the gate for the other. */
TEST(gate_races_forks_against_those_who_enter)
{
    pthread_t users[2], forkers[2];
    _Atomic uint64_t uses = 0;
    CHECK_OK(ap_epoch_watch());
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(pthread_create(&users[i], NULL, use_library, &uses), 0);
        CHECK_EQ(pthread_create(&forkers[i], NULL, fork_often, NULL), 0);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(forkers[i], NULL);
    uint64_t so_far = atomic_load(&uses);
    while (atomic_load(&uses) == so_far) /* they are let in again */
        sched_yield();
    atomic_store(&over, true);
    for (int i = 0; i < 2; i++)
        pthread_join(users[i], NULL);
    CHECK_EQ(atomic_load(&ap_gate), 0);
}

/* What is inside never leaves, for it needs the thread that forks. */
TEST(gate_a_fork_does_not_wait_for_ever)
{
    CHECK_OK(ap_epoch_watch());
    ap_gate_enter();
    pthread_mutex_lock(&library);
    in_child(is_locked);
    pthread_mutex_unlock(&library);
    ap_gate_leave();
    CHECK_EQ(atomic_load(&ap_gate), 0);
    in_child(is_free);
}
