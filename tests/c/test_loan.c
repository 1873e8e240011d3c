/* loan.c and guard.c: a loop that drives its poller, and the thread that guards it. */
#include "fixture.h"

#include "driver.h"
#include "guard.h"

static void borrow(struct world *w)
{
    CHECK_OK(ap_poller_lend(w->poller, w->hub));
}

static void give_back(struct world *w)
{
    CHECK_OK(ap_poller_lend(w->poller, NULL));
}

static bool readable(int fd)
{
    return peek_events(fd, POLLIN) != 0;
}

static bool hub_signalled(struct world *w)
{
    return readable(ap_hub_fd(w->hub));
}

static bool poller_calls(struct world *w)
{
    return readable(ap_poller_fd(w->poller));
}

/* What a loop does when the poller's descriptor is readable. */
static int drive(struct world *w)
{
    ap_token tokens[16];
    int n = ap_hub_drive(w->hub, w->poller, tokens, 16);
    for (int i = 0; i < n; i++)
        mail_at(w, tokens[i].id)->bits |= tokens[i].bits;
    if (n == 16)
        collect(w);
    return n;
}

static void drive_while_called(struct world *w)
{
    while (poller_calls(w))
        CHECK_OK(drive(w));
}

static void push(struct link *l, uint32_t bits, int64_t due)
{
    ap_slot_lock(&l->conn->slot);
    ap_inbox_push(&l->conn->slot, bits, due);
    ap_slot_unlock(&l->conn->slot);
}

static int64_t guarded_until(struct world *w)
{
    return atomic_load_explicit(&w->poller->guarded_until, memory_order_seq_cst);
}

static uint32_t with_output(struct world *w)
{
    return atomic_load_explicit(&w->poller->with_output, memory_order_seq_cst);
}

/* Lends a poller that has its thread, which guards from now on and has nothing planned. */
static void start_guard(struct world *w)
{
    settle(w);
    w->poller->sweep_at = AP_FOREVER;
    world_start(w);
    borrow(w);
    UNTIL(w, guarded_until(w) != 0);
    drive_while_called(w);
}

/* How often other threads of this process have gone to sleep. *asleep: all of them are. */
static uint64_t count_sleeps(bool *asleep)
{
    uint64_t sum = 0;
    *asleep = true;
    DIR *tasks = opendir("/proc/self/task");
    CHECK(tasks != NULL);
    for (struct dirent *d; (d = readdir(tasks)) != NULL;) {
        char path[300], line[200];
        if (d->d_name[0] == '.' || atoi(d->d_name) == getpid())
            continue;
        snprintf(path, sizeof path, "/proc/self/task/%s/status", d->d_name);
        FILE *status = fopen(path, "r");
        CHECK(status != NULL);
        unsigned long long n;
        while (fgets(line, sizeof line, status)) {
            if (strncmp(line, "State:", 6) == 0 && !strstr(line, "\tS"))
                *asleep = false;
            if (sscanf(line, "voluntary_ctxt_switches: %llu", &n) == 1)
                sum += n;
        }
        fclose(status);
    }
    closedir(tasks);
    return sum;
}

/* The same, once all of them are asleep and stay so. ThreadSanitizer has a thread that never does.
 */
static uint64_t sleeps_of_others(void)
{
#ifdef __SANITIZE_THREAD__
    return 0;
#endif
    bool asleep, still;
    uint64_t before, now = count_sleeps(&asleep);
    do {
        before = now;
        still = asleep;
        usleep(1000);
        now = count_sleeps(&asleep);
    } while (!asleep || !still || now != before);
    return now;
}

/* ---- the loan --------------------------------------------------------- */

LINK_TEST(loan_a_loop_that_drives_is_not_signalled, STREAMS, HIGH)
{
    CHECK_EQ(want(l, 10), -EAGAIN);
    borrow(w);
    drive_while_called(w);
    uint64_t wakeups = stats(w).wakeups;
    for (uint64_t i = 0; i < 20; i++) {
        CHECK(!poller_calls(w));
        peer_say(l, 1, i * 10, 10);
        arrived(l, 10);
        CHECK(poller_calls(w));
        CHECK_EQ(drive(w), 1);
        CHECK(!hub_signalled(w));
        CHECK_EQ(mail_of(w, l->id), AP_MAIL_READ);
        expect(l, 1, i * 10, 10);
        CHECK_EQ(want(l, 10), -EAGAIN);
    }
    CHECK_EQ(stats(w).wakeups, wakeups);
}

LINK_TEST(loan_whoever_else_steps_signals, STREAMS, HIGH)
{
    CHECK_EQ(want(l, 10), -EAGAIN);
    borrow(w);
    drive_while_called(w);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    step(w, 0);
    CHECK(hub_signalled(w));
    CHECK(!poller_calls(w));
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_READ);
}

/* More tokens than there is room for, of which an exception has left some behind. */
TEST(loan_takes_what_was_left_first)
{
    enum { N = 6 };
    struct world *w = world_open();
    struct link links[N];
    ap_token tokens[N];
    for (int i = 0; i < N; i++) {
        links[i] = link_open(w, AP_UNIX, HIGH);
        CHECK_EQ(want(&links[i], 1), -EAGAIN);
    }
    borrow(w);
    drive_while_called(w);
    for (int i = 0; i < N - 1; i++) {
        peer_say(&links[i], 1, 0, 1);
        CHECK_EQ(ap_hub_drive(w->hub, w->poller, tokens, i ? 0 : 1), i ? 0 : 1);
    }
    CHECK_EQ(tokens[0].id, links[0].id);
    peer_say(&links[N - 1], 1, 0, 1);
    CHECK_EQ(ap_hub_drive(w->hub, w->poller, tokens, N), N - 1);
    for (int i = 0; i < N - 1; i++)
        CHECK_EQ(tokens[i].id, links[i + 1].id);
    for (int i = 0; i < N; i++)
        link_close(&links[i]);
    world_close(w);
}

TEST(loan_is_to_one_hub)
{
    struct world *w = world_open();
    ap_hub *other;
    ap_token tokens[1];
    CHECK_OK(ap_hub_new(&other));
    CHECK_EQ(drive(w), -EPERM);
    borrow(w);
    CHECK_OK(drive(w));
    CHECK_EQ(ap_hub_drive(other, w->poller, tokens, 1), -EPERM);
    CHECK_OK(ap_poller_lend(w->poller, other));
    CHECK_OK(ap_hub_drive(other, w->poller, tokens, 1));
    CHECK_EQ(drive(w), -EPERM);
    give_back(w);
    CHECK_EQ(ap_hub_drive(other, w->poller, tokens, 1), -EPERM);
    ap_hub_unref(other);
    world_close(w);
}

/* What belongs to another hub is served as well, and signalled to that one. */
LINK_TEST(loan_serves_connections_of_other_hubs, STREAMS, HIGH)
{
    ap_hub *other;
    CHECK_OK(ap_hub_new(&other));
    CHECK_OK(ap_poller_lend(w->poller, other));
    CHECK_EQ(want(l, 10), -EAGAIN);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    CHECK_EQ(ap_hub_drive(other, w->poller, NULL, 0), 0);
    CHECK(hub_signalled(w));
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_READ);
    CHECK_OK(ap_hub_kill(other));
    ap_hub_unref(other);
}

/* The loop does not wait for another thread that steps. */
TEST(loan_another_may_step)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    CHECK_EQ(want(&l, 1), -EAGAIN);
    borrow(w);
    drive_while_called(w);
    push(&l, AP_BOX_WORK, AP_DUE_NOW);
    CHECK(pthread_mutex_trylock(&w->poller->lease) == 0);
    CHECK_EQ(drive(w), 0);
    CHECK(poller_calls(w)); /* again and again until it may */
    pthread_mutex_unlock(&w->poller->lease);
    drive_while_called(w);
    link_close(&l);
    world_close(w);
}

/* ---- resting ---------------------------------------------------------- */

/* Work brings the loop; what only has its time does not. */
LINK_TEST(loan_work_makes_the_descriptor_readable, STREAMS, HIGH)
{
    borrow(w);
    drive_while_called(w);
    push(l, AP_BOX_DEADLINE, ap_now());
    push(l, AP_BOX_SWEEP, ap_now() + MS);
    CHECK(!poller_calls(w));
    push(l, AP_BOX_WORK, AP_DUE_NOW);
    CHECK(poller_calls(w));
    drive_while_called(w);
    CHECK_EQ(atomic_load(&l->conn->slot.box_bits), 0);
}

/* A step does not read more for all connections than the cache holds until handlers come to it. */
LINKS_TEST(loan_a_step_reads_so_much, TCP, HIGH, 8)
{
    enum { SIZE = 64 * 1024 };
    for (int i = 0; i < 8; i++) {
        peer_say(&l[i], 1, 0, SIZE);
        arrived(&l[i], SIZE);
    }
    borrow(w);
    CHECK_OK(drive(w));
    CHECK_EQ(stats(w).bytes_received, AP_RUN_BYTES);
    CHECK(poller_calls(w));
    drive_while_called(w);
    CHECK_EQ(stats(w).bytes_received, 8 * SIZE);
    for (int i = 0; i < 8; i++)
        expect(&l[i], 1, 0, SIZE);
}

/* What such a step has not come to has arrived all the same. */
LINKS_TEST(loan_input_that_a_step_leaves_is_activity, TCP, HIGH, 8)
{
    enum { SIZE = 64 * 1024 };
    borrow(w);
    for (int i = 0; i < 8; i++) {
        CHECK_OK(ap_conn_set_idle(l[i].conn, MS));
        peer_say(&l[i], 1, 0, SIZE);
        arrived(&l[i], SIZE);
    }
    usleep(30 * 1000);
    CHECK_OK(drive(w));
    CHECK_EQ(stats(w).bytes_received, AP_RUN_BYTES);
    for (int i = 0; i < 8; i++)
        CHECK_EQ(l[i].conn->read_end, 0);
    drive_while_called(w);
    CHECK_EQ(stats(w).bytes_received, 8 * SIZE);
    for (int i = 0; i < 8; i++) /* nothing is left to do: they are idle now */
        UNTIL(w, l[i].conn->read_end == AP_EIDLE);
}

/* Nor does one call of epoll tell of all that is ready, if that is more than 256. */
LINKS_TEST(loan_input_that_epoll_has_yet_to_tell_is_activity, TCP, HIGH, 300)
{
    borrow(w);
    drive_while_called(w);
    for (int i = 0; i < 300; i++)
        CHECK_OK(ap_conn_set_idle(l[i].conn, MS));
    for (int i = 0; i < 300; i++) {
        peer_say(&l[i], 1, 0, 1);
        arrived(&l[i], 1);
    }
    usleep(30 * 1000);
    CHECK_OK(drive(w));
    CHECK(stats(w).bytes_received < 300);
    for (int i = 0; i < 300; i++)
        CHECK_EQ(l[i].conn->read_end, 0);
    drive_while_called(w);
    CHECK_EQ(stats(w).bytes_received, 300);
    for (int i = 0; i < 300; i++)
        UNTIL(w, l[i].conn->read_end == AP_EIDLE);
}

/* What one step leaves, the next one does: 256 KiB each. */
LINK_TEST(loan_work_that_is_left_brings_the_loop_again, UNIX, 64 * MB)
{
    int size = 4 * 1024 * 1024;
    setsockopt(l->peer, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
    size_t n = peer_push(l, 1, 0, 2 * MB);
    if (n < 3 * AP_BOUND)
        SKIP("no right to a large socket buffer");
    CHECK_EQ(want(l, n), -EAGAIN);
    borrow(w);
    int drives = 0;
    for (; mail_of_quietly(w, l->id) == 0; drives++) {
        CHECK(poller_calls(w));
        CHECK_OK(drive(w));
    }
    CHECK(drives >= 3);
    drive_while_called(w);
    expect(l, 1, 0, n);
}

/* ---- what must not wait for the loop ---------------------------------- */

/* The loop does not come: it only reads its mailbox. */
LINK_TEST(guard_deadlines, STREAMS, HIGH)
{
    start_guard(w);
    for (int i = 0; i < 3; i++) {
        int64_t deadline = ap_now() + 2 * MS;
        if (want_until(l, 1, deadline) == AP_ELATE) /* this machine is slow */
            continue;
        CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
        CHECK(ap_now() >= deadline);
        CHECK_EQ(want_until(l, 1, deadline), AP_ELATE);
    }
}

/* The guard sleeps longer than that, and is woken. */
LINKS_TEST(guard_is_woken_for_what_is_due_earlier, UNIX, HIGH, 2)
{
    start_guard(w);
    CHECK_EQ(guarded_until(w), AP_FOREVER);
    CHECK_EQ(want_until(&l[0], 1, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    UNTIL(w, guarded_until(w) != 0 && guarded_until(w) != AP_FOREVER);
    int64_t until = guarded_until(w);
    CHECK_EQ(want_until(&l[1], 1, ap_now() + 7200 * 1000 * MS), -EAGAIN); /* later */
    CHECK_EQ(guarded_until(w), until);
    CHECK_EQ(want_until(&l[1], 1, ap_now() + (until - ap_now()) / 2), -EAGAIN);
    UNTIL(w, guarded_until(w) != 0 && guarded_until(w) < until);
    CHECK(!poller_calls(w));
}

/* Data wins a tie, even if nobody has looked at it until then. */
LINK_TEST(guard_reads_what_came_in_time, STREAMS, HIGH)
{
    start_guard(w);
    CHECK_EQ(want_until(l, 10, ap_now() + 50 * MS), -EAGAIN);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    expect(l, 1, 0, 10);
}

LINK_TEST(guard_idle_timeouts, STREAMS, HIGH)
{
    start_guard(w);
    CHECK_OK(ap_conn_set_idle(l->conn, MS));
    peer_expect_eof(l);
    CHECK_EQ(await(w, l->id, AP_MAIL_IDLE), AP_MAIL_IDLE);
}

/* What came in time counts for the idle timeout, even if the loop has not read it. */
LINK_TEST(guard_input_is_activity, STREAMS, HIGH)
{
    start_guard(w);
    CHECK_OK(ap_conn_set_idle(l->conn, 200 * MS));
    for (uint64_t i = 0; i < 10; i++) {
        int64_t from = ap_now();
        peer_say(l, 1, i, 1);
        usleep(60 * 1000);
        if (ap_now() - from > 150 * MS) /* this machine is slow */
            return;
        CHECK(!(ap_conn_status(l->conn) & AP_IS_IDLE_END));
    }
}

LINK_TEST(guard_output_that_stalls, STREAMS, HIGH)
{
    uint8_t *data = much();
    start_guard(w);
    CHECK(ap_conn_write(l->conn, (char *)data, MUCH) > 0);
    CHECK_EQ(with_output(w), 1);
    peer_expect(l, 1, 0, MUCH);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
    CHECK_EQ(with_output(w), 0);
    UNTIL(w, guarded_until(w) > ap_now() + AP_GRACE); /* and then it sleeps again */
}

/* Queued while the thread drove: the guard finds it. */
LINK_TEST(guard_output_from_before_the_loan, STREAMS, HIGH)
{
    world_start(w);
    stall(l, much());
    borrow(w);
    peer_expect(l, 1, 0, MUCH);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
}

/* Handed over to the thread, which has not got to it when the loan begins. */
LINK_TEST(guard_output_handed_over_before_the_loan, TCP, HIGH)
{
    CHECK_EQ(want(l, 1), -EAGAIN);
    start_guard(w);
    atomic_store(&w->poller->borrower, NULL); /* unnoticed: both descriptors are written later */
    w->hub->batch = 100;
    CHECK_EQ(ap_conn_read(l->conn, l->pos, 1, 0, 0, "reply", 5), -EAGAIN);
    CHECK_EQ(ap_conn_queued(l->conn), 5);
    CHECK_EQ(with_output(w), 0);
    borrow(w);
    char reply[5];
    struct pollfd at = {.fd = l->peer, .events = POLLIN};
    CHECK_EQ(poll(&at, 1, (int)(PATIENCE / MS)), 1);
    CHECK_EQ(recv(l->peer, reply, 5, 0), 5);
    CHECK(memcmp(reply, "reply", 5) == 0);
}

/* While the loop comes, it does the work, and not the guard. */
LINK_TEST(guard_leaves_it_to_a_loop_that_comes, STREAMS, HIGH)
{
    uint8_t chunk[64 * 1024];
    start_guard(w);
    CHECK(ap_conn_write(l->conn, (char *)much(), MUCH) > 0);
    for (size_t done = 0; done < MUCH;) {
        ssize_t got = recv(l->peer, chunk, sizeof chunk, MSG_DONTWAIT);
        if (got > 0)
            pattern_check(chunk, 1, done, (size_t)got);
        done += got > 0 ? (size_t)got : 0;
        drive_while_called(w);
    }
    while (mail_of_quietly(w, l->id) == 0)
        CHECK_OK(drive(w));
    if (!SANITIZED) /* where the loop needs longer than the grace, the guard may have been there */
        CHECK(stats(w).wakeups <= 2);
}

/* A peer that does not read costs nothing: not a wake-up, of anybody. */
LINK_TEST(guard_sleeps_while_nothing_moves, STREAMS, HIGH)
{
    start_guard(w);
    CHECK(ap_conn_write(l->conn, (char *)much(), MUCH) > 0);
    UNTIL(w, (drive_while_called(w), guarded_until(w) > ap_now() + 3000 * MS));
    ap_poller_stats before = stats(w);
    uint64_t sleeps = sleeps_of_others();
    usleep(200 * 1000);
    if (guarded_until(w) > ap_now()) {
        CHECK_EQ(stats(w).polls, before.polls);
        CHECK_EQ(sleeps_of_others(), sleeps);
    }
    CHECK(!poller_calls(w));
    CHECK_EQ(with_output(w), 1);
}

/* Nor do silent connections, not even with deadlines far away. */
LINKS_TEST(guard_sleeps_while_all_are_silent, UNIX, HIGH, 50)
{
    start_guard(w);
    for (int i = 0; i < 50; i++)
        CHECK_EQ(want_until(&l[i], 1, ap_now() + 3600 * 1000 * MS), -EAGAIN);
    UNTIL(w, (drive_while_called(w), guarded_until(w) > ap_now() + 3000 * MS));
    uint64_t polls = stats(w).polls, sleeps = sleeps_of_others();
    usleep(200 * 1000);
    CHECK_EQ(stats(w).polls, polls);
    CHECK_EQ(sleeps_of_others(), sleeps);
}

static void converse(struct link *l, uint64_t i)
{
    peer_say(l, 1, i, 1);
    drive_while_called(l->w);
    expect(l, 1, i, 1);
    CHECK_EQ(want(l, 1), -EAGAIN); /* its empty block is to be taken back in a second */
}

/* A request to a loop that has time wakes nobody else, until the guard's time comes. */
LINK_TEST(guard_does_not_wake_for_requests, UNIX, HIGH)
{
    uint64_t i = 0, sleeps;
    int64_t until;
    start_guard(w);
    CHECK_EQ(want(l, 1), -EAGAIN);
    UNTIL(w, (converse(l, i++), sleeps = sleeps_of_others(), until = guarded_until(w),
              until > ap_now() + 100 * MS && until != AP_FOREVER));
    for (uint64_t end = i + 1000; i < end && ap_now() < until - 10 * MS; i++)
        converse(l, i);
    uint64_t more = sleeps_of_others() - sleeps;
    if (ap_now() < until) /* otherwise this thread had to wait, and the guard's time has come */
        CHECK_EQ(more, 0);
}

/* To look for free memory is worth a wake-up only if there is some. */
LINK_TEST(guard_does_not_sweep_what_is_small, UNIX, HIGH)
{
    borrow(w);
    CHECK_EQ(want(l, 1), -EAGAIN);
    peer_say(l, 1, 0, 1);
    drive_while_called(w);
    CHECK(stats(w).bytes_in_use > 0);
    CHECK_EQ(w->poller->sweep_at, AP_FOREVER);
    expect(l, 1, 0, 1);
    CHECK_EQ(want(l, 100 * KB), -EAGAIN);
    peer_say(l, 1, 1, 100 * KB);
    drive_while_called(w);
    CHECK(w->poller->sweep_at != AP_FOREVER);
    expect(l, 1, 1, 100 * KB);
}

/* ---- what is asked for without yielding to the loop ------------------- */

LINK_TEST(loan_queries_are_up_to_date, STREAMS, HIGH)
{
    borrow(w);
    drive_while_called(w);
    peer_say(l, 1, 0, 10);
    arrived(l, 10);
    CHECK_EQ(buffered(l), 10);
    peer_say(l, 1, 10, 10);
    arrived(l, 10);
    CHECK_EQ(link_stats(l).bytes_received, 20);
    peer_close(l);
    arrived_event(l, POLLRDHUP);
    CHECK(ap_conn_status(l->conn) & AP_IS_EOF);
}

/* However much has come for others. */
LINKS_TEST(loan_queries_are_up_to_date_among_others, TCP, HIGH, 8)
{
    enum { SIZE = 64 * 1024 };
    borrow(w);
    drive_while_called(w);
    for (int i = 0; i < 8; i++) {
        peer_say(&l[i], 1, 0, SIZE);
        arrived(&l[i], SIZE);
    }
    CHECK_EQ(buffered(&l[7]), SIZE);
}

LINK_TEST(loan_reading_without_waiting, STREAMS, HIGH)
{
    CHECK_EQ(want(l, 1), -EAGAIN);
    borrow(w);
    drive_while_called(w);
    CHECK_EQ(ap_conn_read(l->conn, l->pos, 10, AP_NOWAIT, 0, NULL, 0), -EAGAIN);
    peer_say(l, 1, 0, 9);
    arrived(l, 9);
    CHECK_EQ(ap_conn_find(l->conn, l->pos, "\n", 1, 100, AP_NOWAIT, 0, NULL, 0), -EAGAIN);
    CHECK_EQ(unread_in_kernel(l->fd), 0);
    peer_say(l, 1, 9, 1);
    arrived(l, 1);
    CHECK(ap_conn_read(l->conn, l->pos, 10, AP_NOWAIT, 0, NULL, 0) > 0);
    link_fetch(l);
    expect(l, 1, 0, 10);
    drive_while_called(w); /* the event comes all the same, and finds nothing */
    peer_say(l, 1, 10, 5);
    expect(l, 1, 10, 5);
}

/* Nobody shares the work: copies for another thread would be in vain. */
LINK_TEST(loan_the_loop_sends_itself, TCP, HIGH)
{
    w->hub->batch = 100;
    borrow(w);
    drive_while_called(w);
    CHECK_EQ(ap_conn_read(l->conn, l->pos, 1, 0, 0, "reply", 5), -EAGAIN);
    CHECK_EQ(ap_conn_queued(l->conn), 0);
    CHECK(!poller_calls(w));
    CHECK_EQ(with_output(w), 0);
}

/* ---- counting output -------------------------------------------------- */

LINKS_TEST(loan_counts_connections_with_output, STREAMS, HIGH, 4)
{
    for (int i = 0; i < 4; i++) {
        stall(&l[i], much());
        CHECK_EQ(with_output(w), i + 1);
    }
    CHECK(ap_conn_hold(l[0].conn) > 0); /* replaced by nothing */
    CHECK_EQ(ap_conn_requeue(l[0].conn, NULL, 0), 0);
    CHECK_EQ(with_output(w), 3);
    ap_piece piece = {.data = much(), .size = MUCH};
    CHECK_EQ(ap_conn_hold(l[1].conn), ap_conn_queued(l[1].conn));
    CHECK(ap_conn_requeue(l[1].conn, &piece, 1) > 0);
    CHECK_EQ(with_output(w), 3);
    link_close(&l[1]);
    CHECK_EQ(with_output(w), 2);
    peer_reset(&l[2]); /* on UNIX sockets a close */
    UNTIL(w, with_output(w) == 1);
    peer_expect(&l[3], 1, 0, MUCH);
    UNTIL(w, with_output(w) == 0);
}

/* ---- ends ------------------------------------------------------------- */

/* Nobody drives, and yet it ends with its last connection. */
TEST(guard_ends_a_poller_that_drains)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    start_guard(w);
    CHECK_OK(ap_poller_drain(w->poller, 1));
    UNTIL(w, guarded_until(w) != 0);
    CHECK_EQ(ap_poller_state(w->poller), 1);
    link_close(&l);
    UNTIL(w, ap_poller_state(w->poller) == AP_EPOLLER - ECANCELED);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_OK(ap_poller_stop(w->poller));
    CHECK_EQ(stats(w).slots, 0);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    free(w);
}

LINK_TEST(loan_ends_with_the_thread, TCP, HIGH)
{
    start_guard(w);
    CHECK_EQ(want(l, 1), -EAGAIN);
    world_stop(w);
    CHECK_EQ(drive(w), -EPERM);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    uint64_t polls = stats(w).polls;
    CHECK_EQ(ap_conn_status(l->conn), 0);
    CHECK_EQ(stats(w).polls, polls); /* nothing moves any more */
}

LINK_TEST(loan_ends_and_the_thread_drives, STREAMS, HIGH)
{
    start_guard(w);
    for (uint64_t i = 0; i < 50; i++) {
        CHECK_EQ(want(l, 10), -EAGAIN);
        give_back(w);
        peer_say(l, 1, i * 10, 10);
        CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
        expect(l, 1, i * 10, 10);
        borrow(w);
    }
}

/* ---- faults ----------------------------------------------------------- */

/* The thread waits for better times, which the loop cannot. */
LINK_TEST(loan_ends_when_a_step_fails, TCP, HIGH)
{
    start_guard(w);
    CHECK_EQ(want(l, 1), -EAGAIN);
    peer_say(l, 1, 0, 1);
    arrived(l, 1);
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, ENOMEM, 0, 3, 0));
    CHECK(ap_hub_drives(w->hub, w->poller));
    CHECK_OK(drive(w));
    CHECK(!ap_hub_drives(w->hub, w->poller));
    CHECK_EQ(drive(w), -EPERM);
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
    CHECK_EQ(ap_fault_hits(AP_CALL_EPOLL_WAIT), 3);
    ap_fault_clear();
    borrow(w);
    UNTIL(w, guarded_until(w) != 0);
    CHECK_OK(drive(w));
}

TEST(loan_of_a_poller_that_fails)
{
    struct world *w = world_open();
    struct link l = link_open(w, AP_TCP, HIGH);
    CHECK_EQ(want(&l, 1), -EAGAIN);
    start_guard(w);
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, EBADF, 0, 1, 0));
    CHECK_OK(drive(w));
    ap_fault_clear();
    CHECK_EQ(mail_of(w, l.id), AP_MAIL_READ | AP_MAIL_FAILED);
    CHECK(poller_calls(w)); /* so that the loop comes, and lets go of the descriptor */
    CHECK_EQ(drive(w), -EPERM);
    CHECK_EQ(ap_poller_lend(w->poller, w->hub), AP_EPOLLER - EBADF);
    CHECK_EQ(want(&l, 1), AP_EPOLLER - EBADF);
    link_close(&l);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_OK(ap_poller_stop(w->poller));
    CHECK_EQ(stats(w).slots, 0);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    free(w);
}

/* A guard that cannot sleep looks from time to time. */
LINK_TEST(guard_that_cannot_sleep, TCP, HIGH)
{
    settle(w);
    world_start(w);
    CHECK_OK(ap_fault_set(AP_CALL_SLEEP, ENOMEM, 0, -1, 0));
    borrow(w);
    UNTIL(w, ap_fault_hits(AP_CALL_SLEEP) > 3);
    int hits = ap_fault_hits(AP_CALL_SLEEP);
    int64_t from = ap_now();
    usleep(50 * 1000);
    CHECK(ap_fault_hits(AP_CALL_SLEEP) - hits <= (ap_now() - from) / MS + 1);
    CHECK_EQ(want_until(l, 1, ap_now() + 100 * MS), -EAGAIN);
    ap_fault_clear();
    CHECK_EQ(await(w, l->id, AP_MAIL_READ), AP_MAIL_READ);
}

/* ---- races ------------------------------------------------------------ */

/* Litmus: a loop is never at rest beyond work that was pushed, nor the guard asleep beyond a
 * deadline, or with output that it does not know of. The pushes are aimed at the moments at which
 * they fall asleep. One that is missed is a round that hangs. */
struct loop {
    struct world *w;
    struct link *l;
    int links;
    _Atomic bool over;
    uint64_t loans; /* the loop's thread only */
};

static void *rest_and_drive(void *arg)
{
    struct loop *loop = arg;
    while (!atomic_load(&loop->over)) {
        struct pollfd at = {.fd = ap_poller_fd(loop->w->poller), .events = POLLIN};
        CHECK_EQ(poll(&at, 1, -1), 1);
        CHECK_OK(ap_hub_drive(loop->w->hub, loop->w->poller, NULL, 0));
    }
    return NULL;
}

static void wait_box_empty(struct link *l, int64_t round)
{
    int64_t end = 0; /* the clock is not asked at first */
    for (int looks = 0; atomic_load(&l->conn->slot.box_bits) != 0; looks++) {
        if (looks == 100000)
            end = ap_now() + PATIENCE;
        if (looks > 100000 && ap_now() > end)
            CHECK_FAIL("round %lld: the push was missed", (long long)round);
    }
}

LINK_TEST(loan_litmus_no_work_is_missed, UNIX, HIGH)
{
    struct loop loop = {.w = w, .l = l};
    pthread_t thread;
    uint64_t seed = 3;
    start_guard(w);
    CHECK(pthread_create(&thread, NULL, rest_and_drive, &loop) == 0);
    RACE(round, 400000)
    {
        for (volatile uint64_t i = random_below(&seed, 3000); i > 0; i--)
            ;
        push(l, AP_BOX_WORK, AP_DUE_NOW);
        wait_box_empty(l, round);
    }
    atomic_store(&loop.over, true);
    ap_sys_signal(w->poller->efd);
    pthread_join(thread, NULL);
}

LINK_TEST(guard_litmus_no_deadline_is_missed, UNIX, HIGH)
{
    uint64_t seed = 5;
    start_guard(w);
    RACE(round, 100000)
    {
        for (volatile uint64_t i = random_below(&seed, 3000); i > 0; i--)
            ;
        push(l, AP_BOX_DEADLINE, 1); /* the slot has none: it only looks */
        wait_box_empty(l, round);
    }
}

LINK_TEST(guard_litmus_no_output_is_missed, UNIX, HIGH)
{
    uint64_t seed = 7;
    start_guard(w);
    int64_t grace = AP_GRACE;
    RACE(round, 200)
    {
        uint64_t polls = stats(w).polls;
        for (volatile uint64_t i = random_below(&seed, 30000); i > 0; i--)
            ;
        ap_slot_lock(&l->conn->slot);
        ap_guard_output(w->poller, true);
        ap_inbox_push(&l->conn->slot, AP_BOX_WORK, AP_DUE_NOW);
        ap_slot_unlock(&l->conn->slot);
        UNTIL(w, stats(w).polls > polls); /* the guard takes over */
        ap_guard_output(w->poller, false);
        if (random_below(&seed, 2))
            usleep((unsigned)random_below(&seed, (uint64_t)(2 * grace / 1000)));
    }
}

/* Everything at once: a loop that echoes, borrows, and sometimes does not come for a while; another
 * thread that ends the loan; peers that send and wait for the answer. */
static void echo(struct link *l)
{
    int64_t result;
    while ((result = want_until(l, 8, ap_now() + 3600 * 1000 * MS)) == 0) {
        CHECK_EQ(ap_conn_write(l->conn, (const char *)link_at(l), 8), 0);
        l->pos += 8;
    }
    CHECK(result == -EAGAIN || result == AP_EEOF);
}

static bool take_and_echo(struct loop *loop, bool drives)
{
    ap_token tokens[4];
    int n = drives ? ap_hub_drive(loop->w->hub, loop->w->poller, tokens, 4)
                   : ap_hub_take(loop->w->hub, tokens, 4);
    if (n == -EPERM)
        return false;
    for (;;) {
        CHECK_OK(n);
        for (int i = 0; i < n; i++) {
            for (int k = 0; k < loop->links; k++) {
                if (loop->l[k].id == tokens[i].id && (tokens[i].bits & AP_MAIL_READ))
                    echo(&loop->l[k]);
            }
        }
        if (n < 4)
            return true;
        n = ap_hub_take(loop->w->hub, tokens, 4);
    }
}

static void *run_loop(void *arg)
{
    struct loop *loop = arg;
    struct world *w = loop->w;
    uint64_t seed = 11;
    bool watches = false;
    for (int k = 0; k < loop->links; k++)
        echo(&loop->l[k]);
    while (!atomic_load(&loop->over)) {
        if (!watches && random_below(&seed, 4) == 0) {
            borrow(w);
            watches = true;
            loop->loans++;
        }
        struct pollfd at[] = {{.fd = ap_hub_fd(w->hub), .events = POLLIN},
                              {.fd = watches ? ap_poller_fd(w->poller) : -1, .events = POLLIN}};
        poll(at, 2, 1000);
        if (at[1].revents)
            watches = take_and_echo(loop, true);
        if (at[0].revents)
            take_and_echo(loop, false);
        if (random_below(&seed, 2000) == 0)
            usleep(7000); /* busy */
    }
    return NULL;
}

static void *end_loans(void *arg)
{
    struct loop *loop = arg;
    uint64_t seed = 13;
    while (!atomic_load(&loop->over)) {
        for (volatile uint64_t i = random_below(&seed, 20000); i > 0; i--)
            ;
        give_back(loop->w);
        CHECK_OK(ap_conn_status(loop->l[0].conn)); /* catches up from here */
    }
    return NULL;
}

LINKS_TEST(loan_race_of_changing_drivers, STREAMS, HIGH, 4)
{
    struct loop loop = {.w = w, .l = l, .links = 4};
    pthread_t thread, changer;
    uint64_t seed = 17;
    settle(w);
    world_start(w);
    CHECK(pthread_create(&thread, NULL, run_loop, &loop) == 0);
    CHECK(pthread_create(&changer, NULL, end_loans, &loop) == 0);
    RACE(round, 300000)
    {
        struct link *one = &l[random_below(&seed, 4)];
        char answer[8];
        CHECK_EQ(send(one->peer, &round, 8, MSG_NOSIGNAL), 8);
        struct pollfd at = {.fd = one->peer, .events = POLLIN};
        CHECK_EQ(poll(&at, 1, (int)(PATIENCE / MS)), 1); /* else a wake-up was lost */
        CHECK_EQ(recv(one->peer, answer, 8, MSG_WAITALL), 8);
        CHECK(memcmp(answer, &round, 8) == 0);
    }
    atomic_store(&loop.over, true);
    pthread_join(changer, NULL);
    pthread_join(thread, NULL);
    give_back(w);
    CHECK(loop.loans > 0);
}
