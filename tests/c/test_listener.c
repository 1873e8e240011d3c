/* listener.c: credits, episodes of starvation, and descriptors that nobody took. */
#include "fixture.h"

struct door {
    struct world *w;
    ap_account *account;
    ap_listener *listener;
    struct sockaddr_in address;
    int fd;
    int peers[160], knocks;
};

static void door_open_at(struct door *d, struct world *w, ap_account *account)
{
    *d = (struct door){.w = w, .account = account};
    d->fd = listen_tcp(256, &d->address);
    CHECK_OK(ap_listener_new(w->poller, w->hub, d->fd, account, &d->listener));
}

static struct door door_open(void)
{
    struct door d;
    ap_account *account;
    struct world *w = world_open();
    CHECK_OK(ap_account_new(&account));
    door_open_at(&d, w, account);
    return d;
}

/* Of one that shares its world and account with another. */
static void door_shut(struct door *d)
{
    ap_listener_release(d->listener);
    for (int i = 0; i < d->knocks; i++)
        close(d->peers[i]);
}

static void door_close(struct door *d)
{
    door_shut(d);
    ap_account_unref(d->account);
    world_close(d->w);
}

#define DOOR_TEST(name_)                    \
    static void name_##_at(struct door *d); \
    TEST(name_)                             \
    {                                       \
        struct door d = door_open();        \
        name_##_at(&d);                     \
        door_close(&d);                     \
    }                                       \
    static void name_##_at(struct door *d)

/* Connects, and waits until the kernel has it in the backlog. */
static void knock(struct door *d, int times)
{
    struct pollfd at = {.fd = d->fd, .events = POLLIN};
    for (int i = 0; i < times; i++) {
        d->peers[d->knocks++] = connect_tcp(&d->address);
        CHECK_EQ(poll(&at, 1, 10000), 1);
    }
}

static uint64_t accepts(struct door *d)
{
    return stats(d->w).accepts;
}

/* Takes what has been accepted, and closes it. */
static int take_and_close(struct door *d)
{
    ap_accepted got[8];
    int n, all = 0;
    while ((n = ap_listener_take(d->listener, got, 8)) > 0) {
        for (int i = 0; i < n; i++)
            ap_fd_close(got[i].fd);
        all += n;
    }
    CHECK_EQ(n, 0);
    return all;
}

/* ---- credits ---------------------------------------------------------- */

DOOR_TEST(listener_accepts_for_a_credit)
{
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT);
    ap_accepted got;
    CHECK_EQ(ap_listener_take(d->listener, &got, 1), 1);
    struct sockaddr_in mine;
    socklen_t size = sizeof mine;
    CHECK(getsockname(d->peers[0], (struct sockaddr *)&mine, &size) == 0);
    CHECK_EQ(got.family, AF_INET);
    CHECK_EQ(got.port, ntohs(mine.sin_port));
    CHECK_BYTES(got.address, &mine.sin_addr, 4);
    CHECK_EQ(ap_listener_take(d->listener, &got, 1), 0);
    ap_fd_close(got.fd);
}

DOOR_TEST(listener_takes_no_more_than_its_credits)
{
    knock(d, 10);
    settle(d->w);
    CHECK_EQ(accepts(d), 0);
    for (int i = 1; i <= 3; i++) {
        CHECK_OK(ap_account_add(d->account, 3));
        settle(d->w);
        CHECK_EQ(accepts(d), 3 * i);
        CHECK_EQ(take_and_close(d), 3);
    }
    CHECK_EQ(ap_account_take_back(d->account), 0);
    CHECK_OK(ap_account_add(d->account, 5));
    settle(d->w);
    CHECK_EQ(accepts(d), 10);
    for (int i = 0; i < 4; i++) /* four of five are left */
        CHECK_EQ(ap_account_take_back(d->account), 1);
    CHECK_EQ(ap_account_take_back(d->account), 0);
    CHECK_EQ(take_and_close(d), 1);
}

/* Measured: three in the backlog, one accepted, and no further event. */
DOOR_TEST(listener_backlog_has_no_further_edge)
{
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 3);
    settle(d->w);
    CHECK_EQ(accepts(d), 1);
    uint64_t polls = stats(d->w).polls;
    CHECK_OK(ap_account_add(d->account, 1)); /* whoever adds credits accepts at once */
    CHECK_EQ(accepts(d), 2);
    CHECK_EQ(mail_of(d->w, ap_listener_id(d->listener)), AP_MAIL_ACCEPT);
    CHECK_OK(ap_account_add(d->account, 1));
    CHECK_EQ(accepts(d), 3);
    CHECK_EQ(stats(d->w).polls, polls);
    CHECK_EQ(take_and_close(d), 3);
}

/* More than a batch: the rest goes to the run list, without an event (O19). */
DOOR_TEST(listener_accepts_in_batches)
{
    enum { N = 150 };
    knock(d, N);
    settle(d->w);
    CHECK_OK(ap_account_add(d->account, N));
    CHECK_EQ(accepts(d), AP_ACCEPT_BATCH);
    uint64_t events = stats(d->w).events;
    ap_poller_step(d->w->poller, 0, 1);
    CHECK_EQ(accepts(d), 2 * AP_ACCEPT_BATCH);
    settle(d->w);
    CHECK_EQ(accepts(d), N);
    CHECK_EQ(stats(d->w).events, events);
    CHECK_EQ(take_and_close(d), N);
}

TEST(listener_credits_are_shared)
{
    struct door a = door_open(), b, c;
    door_open_at(&b, a.w, a.account);
    door_open_at(&c, a.w, a.account);
    struct door *doors[] = {&a, &b, &c};
    for (int i = 0; i < 9; i++)
        knock(doors[i % 3], 1);
    settle(a.w);
    for (int i = 1; i <= 9; i++) {
        CHECK_OK(ap_account_add(a.account, 1));
        settle(a.w);
        CHECK_EQ(accepts(&a), i);
    }
    for (int i = 0; i < 3; i++)
        CHECK_EQ(take_and_close(doors[i]), 3);
    door_shut(&b);
    door_shut(&c);
    door_close(&a);
}

/* In turn: a listener with a long backlog does not eat every credit. */
TEST(listener_credits_go_round)
{
    struct door a = door_open(), b;
    door_open_at(&b, a.w, a.account);
    knock(&a, 10);
    knock(&b, 10);
    settle(a.w);
    for (int i = 0; i < 6; i++)
        CHECK_OK(ap_account_add(a.account, 1));
    int of_a = take_and_close(&a), of_b = take_and_close(&b);
    CHECK_EQ(of_a + of_b, 6);
    CHECK(of_a > 0 && of_b > 0);
    door_shut(&b);
    door_close(&a);
}

/* Listeners on several pollers share one account as well (O19). */
TEST(listener_account_spans_pollers)
{
    struct door a = door_open();
    struct world *other = world_open();
    struct door b;
    door_open_at(&b, other, a.account);
    knock(&a, 2);
    knock(&b, 2);
    CHECK_OK(ap_account_add(a.account, 4));
    settle(a.w);
    settle(other);
    CHECK_EQ(take_and_close(&a), 2);
    CHECK_EQ(take_and_close(&b), 2);
    door_shut(&b);
    world_close(other);
    door_close(&a);
}

/* ---- starvation ------------------------------------------------------- */

static void starve(struct door *d, int error, int episode)
{
    uint64_t id = ap_listener_id(d->listener);
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, error, 0, -1, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    int64_t begin = ap_now();
    uint64_t polls = stats(d->w).polls;
    await(d->w, id, AP_MAIL_STARVED);
    CHECK_EQ(mail_at(d->w, id)->error, error);
    while (ap_now() - begin < 3 * AP_ACCEPT_PAUSE / 2) /* into the second pause */
        step(d->w, 20);
    CHECK_EQ(mail_of(d->w, id), 0);         /* told once an episode */
    CHECK(stats(d->w).polls - polls < 100); /* L35: no spin */
    ap_fault_clear();
    int64_t recovered = ap_now();
    await(d->w, id, AP_MAIL_ACCEPT);
    CHECK(ap_now() - recovered < 100 * AP_ACCEPT_PAUSE);
    CHECK_EQ(take_and_close(d), 1);
    CHECK_EQ(accepts(d), episode);
}

/* L35, O5: every episode pauses and recovers, not only the first. */
DOOR_TEST(listener_starves_and_recovers)
{
    starve(d, EMFILE, 1);
    starve(d, EMFILE, 2);
    starve(d, ENOMEM, 3);
}

DOOR_TEST(listener_pause_is_kept)
{
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, ENFILE, 0, 1, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    int64_t begin = ap_now();
    await(d->w, ap_listener_id(d->listener), AP_MAIL_STARVED);
    CHECK_OK(ap_account_add(d->account, 5)); /* credits do not end it */
    CHECK_EQ(accepts(d), 0);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT);
    CHECK(ap_now() - begin >= AP_ACCEPT_PAUSE);
    ap_fault_clear();
    CHECK_EQ(take_and_close(d), 1);
}

/* No memory for the queue is starvation too. */
DOOR_TEST(listener_without_memory)
{
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, 1, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_STARVED);
    ap_fault_clear();
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT);
    CHECK_EQ(take_and_close(d), 1);
}

/* ---- other errors ----------------------------------------------------- */

/* A connection that died in the backlog is not the listener's error (O5). */
DOOR_TEST(listener_ignores_errors_of_connections)
{
    static const int errors[] = {ECONNABORTED, EPROTO, ENETDOWN,  EHOSTUNREACH,
                                 ETIMEDOUT,    EPERM,  ECONNRESET};
    for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
        CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, errors[i], 0, 5, 0));
        CHECK_OK(ap_account_add(d->account, 1));
        knock(d, 1);
        uint32_t got = await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT | AP_MAIL_STARVED);
        CHECK_EQ(got, AP_MAIL_ACCEPT);
        CHECK_EQ(take_and_close(d), 1);
    }
    ap_fault_clear();
    CHECK_EQ(ap_account_take_back(d->account), 0); /* their credits were not lost, nor doubled */
}

DOOR_TEST(listener_interruptions)
{
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, EINTR, 0, 50, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT);
    ap_fault_clear();
    CHECK_EQ(take_and_close(d), 1);
}

DOOR_TEST(listener_reports_other_errors_once)
{
    ap_accepted got;
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, EINVAL, 0, 1, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT);
    ap_fault_clear();
    settle(d->w);
    CHECK_EQ(accepts(d), 0); /* it rests until the error was taken ... */
    CHECK_EQ(ap_listener_take(d->listener, &got, 1), -EINVAL);
    settle(d->w);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT); /* ... and goes on by itself */
    CHECK_EQ(take_and_close(d), 1);
    CHECK_EQ(ap_account_take_back(d->account), 0);
}

/* What was accepted before an error is handed over before it. */
DOOR_TEST(listener_error_comes_after_what_was_accepted)
{
    ap_accepted got;
    knock(d, 3);
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, EINVAL, 2, 1, 0));
    CHECK_OK(ap_account_add(d->account, 3));
    settle(d->w);
    ap_fault_clear();
    for (int i = 0; i < 2; i++) {
        CHECK_EQ(ap_listener_take(d->listener, &got, 1), 1);
        ap_fd_close(got.fd);
    }
    CHECK_EQ(ap_listener_take(d->listener, &got, 1), -EINVAL);
}

/* Nothing but errors that are ignored is no reason to spin. */
DOOR_TEST(listener_does_not_spin_on_ignored_errors)
{
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, EPERM, 0, -1, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    settle(d->w);
    uint64_t polls = stats(d->w).polls;
    for (int64_t end = ap_now() + AP_ACCEPT_PAUSE / 2; ap_now() < end;)
        step(d->w, 10);
    CHECK(stats(d->w).polls - polls < 50);
    ap_fault_clear();
    await(d->w, ap_listener_id(d->listener), AP_MAIL_ACCEPT);
    CHECK_EQ(take_and_close(d), 1);
}

/* The credits of those that nobody took come back, and serve the other listeners at once. */
TEST(listener_close_gives_credits_back)
{
    struct door a = door_open(), b;
    door_open_at(&b, a.w, a.account);
    knock(&a, 2);
    CHECK_OK(ap_account_add(a.account, 2));
    settle(a.w);
    CHECK_EQ(accepts(&a), 2);
    knock(&b, 2);
    settle(a.w);
    CHECK_EQ(accepts(&a), 2);
    CHECK_OK(ap_listener_close(a.listener, 0));
    CHECK_EQ(take_and_close(&b), 2);
    door_shut(&b);
    door_close(&a);
}

TEST(listener_new_unwinds)
{
    struct world *w = world_open();
    struct sockaddr_in address;
    int fd = listen_tcp(1, &address);
    ap_account *account;
    ap_listener *listener;
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, 1, 0));
    CHECK_EQ(ap_account_new(&account), -ENOMEM);
    CHECK_OK(ap_account_new(&account));
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_CTL, ENOSPC, 0, 1, 0));
    CHECK_EQ(ap_listener_new(w->poller, w->hub, fd, account, &listener), -ENOSPC);
    ap_fault_clear();
    CHECK(fcntl(fd, F_GETFD) >= 0); /* still the caller's */
    CHECK(account->listeners == NULL);
    settle(w);
    CHECK_EQ(stats(w).slots, 0);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_EQ(ap_listener_new(w->poller, w->hub, fd, account, &listener), -EBADF);
    settle(w);
    close(fd);
    ap_account_unref(account);
    world_close(w);
}

/* ---- the end ---------------------------------------------------------- */

/* What was accepted and not taken is closed with the listener: the harness counts descriptors,
 * and the peers see it. */
static void end_with_untaken(struct door *d, bool kill)
{
    char byte;
    CHECK_OK(ap_account_add(d->account, 5));
    for (int i = 0; i < 5; i++) {
        knock(d, 1);
        settle(d->w);
    }
    CHECK_EQ(accepts(d), 5);
    ap_accepted got;
    CHECK_EQ(ap_listener_take(d->listener, &got, 1), 1);
    if (kill)
        CHECK_OK(ap_hub_kill(d->w->hub));
    else
        CHECK_OK(ap_listener_close(d->listener, 0));
    CHECK_EQ(ap_listener_take(d->listener, &got, 1), -EBADF);
    CHECK_EQ(ap_listener_close(d->listener, 0), -EBADF);
    CHECK_EQ(ap_listener_fd(d->listener, 0), -EBADF);
    CHECK_OK(ap_account_add(d->account, 1)); /* nobody is there */
    for (int i = 1; i < 5; i++) {
        struct pollfd at = {.fd = d->peers[i], .events = POLLIN};
        CHECK_EQ(poll(&at, 1, 10000), 1);
        CHECK_EQ(recv(d->peers[i], &byte, 1, 0), 0);
    }
    ap_fd_close(got.fd);
}

DOOR_TEST(listener_close_closes_what_was_not_taken)
{
    end_with_untaken(d, false);
}

DOOR_TEST(listener_hub_kill_closes_what_was_not_taken)
{
    end_with_untaken(d, true);
}

DOOR_TEST(listener_close_while_paused)
{
    CHECK_OK(ap_fault_set(AP_CALL_ACCEPT, EMFILE, 0, -1, 0));
    CHECK_OK(ap_account_add(d->account, 1));
    knock(d, 1);
    await(d->w, ap_listener_id(d->listener), AP_MAIL_STARVED);
    CHECK_OK(ap_listener_close(d->listener, 0));
    settle(d->w);
    CHECK_EQ(d->w->poller->wheel.filed, 0);
    ap_fault_clear();
}

DOOR_TEST(listener_descriptor_can_be_kept)
{
    knock(d, 1);
    CHECK_EQ(ap_listener_fd(d->listener, 1), d->fd);
    CHECK_EQ(ap_listener_close(d->listener, 1), d->fd);
    int fd = accept4(d->fd, NULL, NULL, SOCK_CLOEXEC);
    CHECK(fd >= 0);
    close(fd);
    close(d->fd);
}

/* A UNIX listener has no address to tell. */
TEST(listener_of_unix_sockets)
{
    struct world *w = world_open();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "anypoll-test-%d", getpid());
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 8) == 0);
    struct door d = {.w = w, .fd = fd};
    CHECK_OK(ap_account_new(&d.account));
    CHECK_OK(ap_listener_new(w->poller, w->hub, fd, d.account, &d.listener));
    CHECK_OK(ap_account_add(d.account, 1));
    int peer = d.peers[d.knocks++] = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connect(peer, (struct sockaddr *)&address, sizeof address) == 0);
    await(w, ap_listener_id(d.listener), AP_MAIL_ACCEPT);
    ap_accepted got;
    CHECK_EQ(ap_listener_take(d.listener, &got, 1), 1);
    CHECK_EQ(got.family, AF_UNIX);
    ap_fd_close(got.fd);
    door_close(&d);
}
