/* fork.c: the child touches nothing that it inherited, and can start afresh. */
#include "verbs.h"

/* Runs body(arg) in a child, with checks; the parent takes its result. */
static void in_child(void (*body)(void *), void *arg)
{
    fflush(NULL);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        body(arg);
        check_leave(0);
    }
    int status;
    CHECK_EQ(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    CHECK_EQ(WEXITSTATUS(status), 0);
}

struct family {
    struct world *w;
    struct link l;
    ap_account *account;
    ap_listener *listener;
    int listening;
    struct sockaddr_in address;
};

static struct family family_open(void)
{
    struct family f = {.w = world_open()};
    f.l = link_open(f.w, AP_TCP, HIGH);
    CHECK_OK(ap_account_new(&f.account));
    f.listening = listen_tcp(8, &f.address);
    CHECK_OK(ap_listener_new(f.w->poller, f.w->hub, f.listening, f.account, &f.listener));
    peer_say(&f.l, 1, 0, 100);
    expect(&f.l, 1, 0, 50);
    return f;
}

static void family_close(struct family *f)
{
    ap_listener_release(f->listener);
    ap_account_unref(f->account);
    link_close(&f->l);
    world_close(f->w);
}

/* The parent's connection goes on as if nothing had been. */
static void parent_goes_on(struct family *f)
{
    struct link *l = &f->l;
    expect(l, 1, 50, 50);
    CHECK_EQ(want(l, 100), -EAGAIN);
    settle(f->w);
    peer_say(l, 1, 100, 100);
    await(f->w, l->id, AP_MAIL_READ);
    expect(l, 1, 100, 100);
    CHECK_EQ(ap_conn_write(l->conn, "abc", 3), 0);
    CHECK_OK(ap_account_add(f->account, 1));
    int peer = connect_tcp(&f->address);
    await(f->w, ap_listener_id(f->listener), AP_MAIL_ACCEPT);
    ap_accepted got;
    CHECK_EQ(ap_listener_take(f->listener, &got, 1), 1);
    ap_fd_close(got.fd);
    close(peer);
}

/* The child does as it likes with a family of its parent's, which goes on. */
static void fork_family(void (*child)(void *))
{
    struct family f = family_open();
    in_child(child, &f);
    parent_goes_on(&f);
    family_close(&f);
}

/* ---- every entry ------------------------------------------------------ */

static void poller_refuses(struct family *f)
{
    ap_poller *p = f->w->poller;
    ap_poller_stats s;
    CHECK_EQ(ap_poller_start(p), -ECHILD);
    CHECK_EQ(ap_poller_step(p, 0, 1), -ECHILD);
    CHECK_EQ(ap_poller_stop(p), -ECHILD);
    CHECK_EQ(ap_poller_nudge(p), -ECHILD);
    CHECK_EQ(ap_poller_statistics(p, &s), -ECHILD);
    CHECK_EQ(ap_poller_drain(p, 1), -ECHILD);
    CHECK_EQ(ap_poller_state(p), -ECHILD);
    int32_t refs = atomic_load(&p->refs);
    ap_poller_unref(p);
    CHECK_EQ(atomic_load(&p->refs), refs);
}

static void hub_refuses(struct family *f)
{
    ap_hub *h = f->w->hub;
    ap_token token;
    ap_poller_stats s;
    CHECK_EQ(ap_hub_fd(h), -ECHILD);
    CHECK_EQ(ap_hub_trim(h), -ECHILD);
    CHECK_EQ(ap_hub_statistics(h, &s), -ECHILD);
    CHECK_EQ(ap_hub_take(h, &token, 1), -ECHILD);
    CHECK_EQ(ap_hub_kill(h), -ECHILD);
    int32_t refs = atomic_load(&h->refs);
    ap_hub_unref(h);
    CHECK_EQ(atomic_load(&h->refs), refs);
}

static void conn_refuses(struct family *f)
{
    ap_conn *c = f->l.conn;
    ap_conn_stats s;
    ap_view view;
    char byte;
    int result = 0;
    verbs_all_fail(c, -ECHILD);
    CHECK_EQ(ap_conn_id(c), f->l.id);
    CHECK_EQ(ap_conn_rest(c, &byte, 1), -ECHILD);
    CHECK_EQ(ap_conn_fd(c, 1), -ECHILD);
    CHECK_EQ(ap_conn_want(c, 0, 1), -ECHILD);
    CHECK_EQ(ap_conn_request(c, 0, 1, NULL, 0), -ECHILD);
    CHECK_EQ(ap_conn_set_window(c, 1), -ECHILD);
    CHECK_EQ(ap_conn_set_block(c, AP_BLOCK_MIN), -ECHILD);
    CHECK_EQ(ap_conn_arrived(c, 0), -ECHILD);
    CHECK_EQ(ap_conn_put_back(c, "x", 1), -ECHILD);
    CHECK_EQ(ap_conn_queued(c), -ECHILD);
    CHECK_EQ(ap_conn_awaited(c), -ECHILD);
    CHECK_EQ(ap_conn_give_up(c), -ECHILD);
    CHECK_EQ(ap_conn_watch_peer(c), -ECHILD);
    CHECK_EQ(ap_conn_report(c, 0), -ECHILD);
    CHECK_EQ(ap_conn_take_fds(c, 0, &byte, 1, &result, &result), -ECHILD);
    c->type = AP_SEQPACKET; /* the child's copy of it */
    CHECK_EQ(ap_conn_send_fds(c, "x", 1, NULL, 0), -ECHILD);
    CHECK_EQ(ap_conn_receive(c, 1, 0, &view, &result, &result), -ECHILD);
    CHECK_EQ(ap_conn_status(c) & AP_IS_CLOSED, AP_IS_CLOSED);
    CHECK_EQ(ap_conn_statistics(c, 0, &s), -ECHILD);
    uint32_t refs = atomic_load(&f->l.block->refs);
    ap_block_unref(f->l.block); /* leaks, in the child only */
    CHECK_EQ(atomic_load(&f->l.block->refs), refs);
    int32_t slot_refs = atomic_load(&c->slot.refs);
    ap_conn_release(c);
    CHECK_EQ(atomic_load(&c->slot.refs), slot_refs);
}

static void listener_refuses(struct family *f)
{
    ap_accepted got;
    ap_listener *made;
    ap_conn *conn;
    CHECK_EQ(ap_account_add(f->account, 1), -ECHILD);
    CHECK_EQ(ap_account_take_back(f->account), -ECHILD);
    CHECK_EQ(ap_listener_take(f->listener, &got, 1), -ECHILD);
    CHECK_EQ(ap_listener_fd(f->listener, 0), -ECHILD);
    CHECK_EQ(ap_listener_close(f->listener, 0), -ECHILD);
    int32_t refs = atomic_load(&f->account->refs);
    int32_t slot_refs = atomic_load(&f->listener->slot.refs);
    ap_listener_release(f->listener);
    ap_account_unref(f->account);
    CHECK_EQ(atomic_load(&f->account->refs), refs);
    CHECK_EQ(atomic_load(&f->listener->slot.refs), slot_refs);
    CHECK_EQ(ap_listener_new(f->w->poller, f->w->hub, 0, f->account, &made), -ECHILD);
    CHECK_EQ(ap_conn_new(f->w->poller, f->w->hub, 0, AP_TCP, HIGH, &conn), -ECHILD);
}

/* The account's mutex may be held for ever, whoever the listener's poller and hub belong to. */
static void account_refuses(struct family *f)
{
    struct world *w = world_open();
    ap_listener *made;
    CHECK_EQ(ap_listener_new(w->poller, w->hub, f->listening, f->account, &made), -ECHILD);
    world_close(w);
}

static void touch_everything(void *arg)
{
    struct family *f = arg;
    conn_refuses(f);
    listener_refuses(f);
    account_refuses(f);
    hub_refuses(f);
    poller_refuses(f);
}

/* Measured: an EPOLL_CTL_DEL of the child silenced the parent's connection. */
TEST(fork_child_touches_nothing)
{
    fork_family(touch_everything);
}

/* A poller's thread, and a mutex that somebody held at the moment of the fork. */
TEST(fork_child_takes_no_inherited_lock)
{
    struct family f = family_open();
    pthread_mutex_lock(&f.account->mutex);
    pthread_mutex_lock(&f.w->poller->lease);
    ap_slot_lock(&f.l.conn->slot);
    pthread_mutex_lock(&f.w->hub->mutex);
    in_child(touch_everything, &f);
    pthread_mutex_unlock(&f.w->hub->mutex);
    ap_slot_unlock(&f.l.conn->slot);
    pthread_mutex_unlock(&f.w->poller->lease);
    pthread_mutex_unlock(&f.account->mutex);
    parent_goes_on(&f);
    family_close(&f);
}

/* ---- descriptors ------------------------------------------------------ */

static bool is_open(int fd)
{
    return fcntl(fd, F_GETFD) >= 0;
}

static void close_inherited(void *arg)
{
    struct family *f = arg;
    int mine[] = {f->w->poller->epfd, f->w->poller->efd, f->w->hub->efd, f->l.fd, f->listening};
    CHECK_OK(ap_fork_child());
    for (size_t i = 0; i < AP_ARRAY_SIZE(mine); i++)
        CHECK(!is_open(mine[i]));
    CHECK(is_open(f->l.peer)); /* only what the core owned */
    CHECK(is_open(2));
    CHECK_OK(ap_fork_child());
    CHECK(is_open(f->l.peer));
    touch_everything(f);
}

TEST(fork_child_closes_what_the_core_owned)
{
    fork_family(close_inherited);
}

struct accepted_fds {
    struct family f;
    int untaken, taken, kept, disowned;
};

static void close_accepted(void *arg)
{
    struct accepted_fds *a = arg;
    CHECK_OK(ap_fork_child());
    CHECK(!is_open(a->untaken));
    CHECK(!is_open(a->taken)); /* taken, and not opened yet: still the core's */
    CHECK(is_open(a->kept));
    CHECK(is_open(a->disowned));
    CHECK_EQ(ap_fd_close(a->taken), -EBADF); /* the number may be somebody else's now */
    CHECK_EQ(ap_fd_close(a->kept), -EBADF);
    CHECK(is_open(a->kept));
}

/* Also those that were accepted and not yet taken or opened; not those that were given away. */
TEST(fork_child_closes_what_was_accepted)
{
    struct accepted_fds a = {.f = family_open()};
    struct family *f = &a.f;
    int peers[2];
    CHECK_OK(ap_account_add(f->account, 2));
    for (int i = 0; i < 2; i++)
        peers[i] = connect_tcp(&f->address);
    UNTIL(f->w, stats(f->w).accepts == 2);
    ap_accepted got;
    CHECK_EQ(ap_listener_take(f->listener, &got, 1), 1);
    a.taken = got.fd;
    a.untaken = f->listener->queue[f->listener->first].fd;

    struct link kept = link_open(f->w, AP_UNIX, HIGH), disowned = link_open(f->w, AP_UNIX, HIGH);
    a.kept = ap_conn_close(kept.conn, 0, 1);
    a.disowned = ap_conn_fd(disowned.conn, 1);
    in_child(close_accepted, &a);

    ap_fd_close(a.taken);
    CHECK(!is_open(a.taken));
    close(a.kept);
    link_close(&kept);
    link_close(&disowned);
    close(a.disowned); /* the caller's business */
    close(peers[0]);
    close(peers[1]);
    family_close(f);
}

/* A number that the core has closed may be anybody's in the child. */
static void spare_reused(void *arg)
{
    int *fd = arg;
    CHECK_OK(ap_fork_child());
    CHECK(is_open(*fd));
}

LINK_TEST(fork_child_spares_reused_numbers, UNIX, HIGH)
{
    int fd = l->fd;
    link_close(l);
    int mine = open("/dev/null", O_RDONLY | O_CLOEXEC);
    CHECK_EQ(mine, fd);
    in_child(spare_reused, &mine);
    close(mine);
}

/* ---- starting afresh -------------------------------------------------- */

static void start_afresh(void *arg)
{
    struct family *f = arg;
    CHECK_OK(ap_fork_child());
    struct world *w = world_open();
    for (int i = 0; i < 100; i++) { /* more than a chunk of slots */
        struct link l = link_open(w, AP_TCP, HIGH);
        CHECK((uint32_t)l.id != (uint32_t)f->l.id);
        peer_say(&l, 1, 0, 1000);
        expect(&l, 1, 0, 1000);
        CHECK_EQ(ap_conn_write(l.conn, "abc", 3), 0);
        link_close(&l);
    }
    world_close(w);
}

TEST(fork_child_starts_afresh)
{
    fork_family(start_afresh);
}

static void avoid_the_slot(void *arg)
{
    const uint32_t *locked = arg;
    CHECK_OK(ap_fork_child());
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, HIGH);
    CHECK((uint32_t)l.id != *locked);
    link_close(&l);
    world_close(w);
}

/* A free slot may be locked at the moment of the fork, by a driver with a late event: the child
 * does not use it. */
LINK_TEST(fork_child_does_not_use_free_slots, UNIX, HIGH)
{
    uint32_t locked = (uint32_t)l->id;
    link_close(l);
    settle(w);
    ap_slot_lock(ap_slot_at(locked));
    in_child(avoid_the_slot, &locked);
    ap_slot_unlock(ap_slot_at(locked));
}

static void fork_again(void *arg)
{
    struct family *f = arg;
    CHECK_OK(ap_fork_child());
    struct family mine = family_open();
    in_child(touch_everything, f);
    in_child(close_inherited, &mine);
    parent_goes_on(&mine);
    family_close(&mine);
}

TEST(fork_grandchild)
{
    fork_family(fork_again);
}

/* With the poller's thread at work: the child has no such thread, and needs none of its locks. */
TEST(fork_while_the_poller_works)
{
    struct family f = family_open();
    expect(&f.l, 1, 50, 50);
    world_start(f.w);
    uint64_t from = 100;
    for (int i = 0; i < 20; i++) {
        peer_say(&f.l, 1, from, 10000);
        in_child(close_inherited, &f);
        expect(&f.l, 1, from, 10000);
        from += 10000;
    }
    world_stop(f.w);
    family_close(&f);
}
