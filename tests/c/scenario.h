/* A test scenario: one run through everything the core does, any system call of which may fail.
 *
 * A run ends in one of two ways at each step: it works, byte for byte, or says why not. `told`
 * holds that against the fault that was set. A wait that ends in neither way is a hang, and fails
 * the test. At the end everything that was opened is closed, and counted.
 */
#ifndef SCENARIO_H
#define SCENARIO_H

#include "fixture.h"

#include <linux/net_tstamp.h>

#define DELIMITER "-- behind this line --" /* longer than AP_DELIMITER_INLINE */
#define PIECES 40
#define BIG ((SANITIZED ? 300 : 700) * KB) /* more than AP_BOUND, and than a UNIX socket takes */

struct run {
    struct world w;
    int error;     /* the fault's; 0: there is none, or it shortens transfers */
    bool stopped;  /* the poller does not work any more, and says so */
    bool spurious; /* EAGAIN without a reason: no edge follows, so one is made */
    bool forever;  /* the fault stays */
};

/* Whether a result is good, or the error that the fault calls for. */
static inline bool told(struct run *r, int64_t result)
{
    if (result >= 0)
        return true;
    if (result != -r->error && !(r->error && (result == -EPIPE || result == AP_EEOF)))
        CHECK_FAIL("%lld (%s) is not what was injected: %d (%s)", (long long)result,
                   strerror((int)-result), r->error, strerror(r->error));
    return false;
}

/* ---- waiting ---------------------------------------------------------- */

/* Makes the edge that the kernel would make after a real EAGAIN. */
static inline void make_edge(struct link *l)
{
    struct epoll_event event = {.events = EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET | EPOLLOUT};
    ap_slot_lock(&l->conn->slot);
    event.data.u64 = ap_slot_tag(&l->conn->slot);
    epoll_ctl(l->w->poller->epfd, EPOLL_CTL_MOD, l->fd, &event);
    ap_slot_unlock(&l->conn->slot);
}

/* The loop only looks into its mailbox when it was woken. */
static inline void beat(struct run *r, struct link *l)
{
    struct pollfd door = {.fd = ap_hub_fd(r->w.hub), .events = POLLIN};
    if (r->spurious && l)
        make_edge(l);
    if (!r->w.threaded)
        r->stopped |= ap_poller_step(r->w.poller, 1, BUDGET) < 0;
    if (poll(&door, 1, r->w.threaded ? 5 : 0) == 1)
        collect(&r->w);
}

/* False: the poller is out of order, and nobody will be woken. */
static inline bool woken(struct run *r, struct link *l, uint64_t id, uint32_t bits)
{
    for (int64_t end = ap_now() + PATIENCE; !(mail_at(&r->w, id)->bits & bits);) {
        if (r->stopped)
            return false;
        CHECK(ap_now() < end); /* a wake-up was lost */
        beat(r, l);
    }
    mail_at(&r->w, id)->bits &= ~bits;
    return true;
}

static inline int64_t wants(struct run *r, struct link *l, size_t n)
{
    int64_t result = want(l, n);
    while (result == -EAGAIN && woken(r, l, l->id, AP_MAIL_READ))
        result = want(l, n);
    return result == -EAGAIN ? -r->error : result;
}

/* ---- a stream --------------------------------------------------------- */

/* False: it could not be opened, and its sockets are closed. */
static inline bool opens(struct run *r, int kind, struct link *l)
{
    int fds[2], result;
    sockets_of(kind, fds);
    *l = (struct link){.w = &r->w, .fd = fds[0], .peer = fds[1]};
    int rc = ap_conn_new(r->w.poller, r->w.hub, fds[0], kind, HIGH, &l->conn);
    if (!told(r, rc)) {
        close(fds[0]);
        close(fds[1]);
        return false;
    }
    l->id = ap_conn_id(l->conn);
    int failed = ap_conn_register(&l->conn, &result, 1);
    CHECK_EQ(failed, result < 0);
    if (told(r, result))
        return true;
    link_close(l);
    return false;
}

static inline bool takes(struct run *r, struct link *l, uint64_t from, size_t n)
{
    int64_t result = wants(r, l, n);
    if (!told(r, result))
        return false;
    pattern_check(link_at(l), 1, from, n);
    l->pos += (uint32_t)n;
    return true;
}

static inline bool finds(struct run *r, struct link *l)
{
    peer_say(l, 3, 0, 3000);
    peer_send(l, DELIMITER, strlen(DELIMITER));
    int64_t result = -EAGAIN;
    do {
        result =
            ap_conn_find(l->conn, l->pos, DELIMITER, strlen(DELIMITER), 64 * KB, 0, 0, NULL, 0);
    } while (result == -EAGAIN && woken(r, l, l->id, AP_MAIL_READ));
    if (result == -EAGAIN || !told(r, result))
        return false;
    if (result >> AP_NEW_BLOCK_SHIFT)
        link_fetch(l);
    result &= ((int64_t)1 << AP_NEW_BLOCK_SHIFT) - 1;
    CHECK_EQ(result, 3000 + strlen(DELIMITER));
    pattern_check(link_at(l), 3, 0, 3000);
    l->pos += (uint32_t)result;
    return true;
}

/* Small portions, then much at once, merged; then a delimiter. */
static inline void reads(struct run *r, struct link *l)
{
    size_t most = l->conn->type == AP_TCP ? 120 * KB : 60 * KB, at = 0;
    for (; at < 6 * KB; at += 2 * KB) {
        peer_say(l, 1, at, 2 * KB);
        if (!takes(r, l, at, KB) || !takes(r, l, at + KB, KB))
            return;
    }
    peer_say(l, 1, at, KB);
    if (!told(r, wants(r, l, KB)))
        return;
    size_t sent = KB + peer_push(l, 1, at + KB, most);
    if (takes(r, l, at, sent / 2) && takes(r, l, at + sent / 2, sent - sent / 2))
        finds(r, l);
}

/* What the peer can have by now must be the beginning of what was sent. */
static inline uint64_t peer_takes(struct link *l, uint64_t from)
{
    uint8_t chunk[16 * 1024];
    ssize_t got;
    while ((got = recv(l->peer, chunk, sizeof chunk, MSG_DONTWAIT)) > 0) {
        pattern_check(chunk, 2, from, (size_t)got);
        from += (uint64_t)got;
    }
    return from;
}

/* As flush(): the pieces stay until C is done with them. */
static inline bool drains(struct run *r, struct link *l, uint64_t *got)
{
    int rc;
    while ((rc = ap_conn_drain(l->conn, 0, 0)) == -EAGAIN) {
        for (int64_t end = ap_now() + PATIENCE; !(mail_at(&r->w, l->id)->bits & AP_MAIL_WRITE);) {
            if (r->stopped)
                return false;
            CHECK(ap_now() < end);
            *got = peer_takes(l, *got);
            beat(r, l);
        }
        mail_at(&r->w, l->id)->bits &= ~(uint32_t)AP_MAIL_WRITE;
    }
    return told(r, rc);
}

/* A send that is given up on the way, as Python's Output._requeue does it. */
static inline int64_t gives_up(struct link *l, uint8_t *bytes, size_t end)
{
    int64_t left = ap_conn_hold(l->conn);
    if (left <= 0)
        return left;
    ap_piece rest = {.data = bytes + end - (size_t)left, .size = (size_t)left};
    return ap_conn_requeue(l->conn, &rest, 1);
}

static inline void writes(struct run *r, struct link *l)
{
    uint8_t *bytes = pattern_make(2, 0, BIG + 500);
    ap_piece pieces[PIECES + 1];
    for (size_t i = 0; i < PIECES; i++)
        pieces[i] = (ap_piece){.data = bytes + i * 50, .size = 50};
    pieces[PIECES] = (ap_piece){.data = bytes + PIECES * 50, .size = BIG - PIECES * 50};
    uint64_t got = 0, sent = BIG;
    int64_t left = ap_conn_send(l->conn, pieces, PIECES + 1);
    if (told(r, left) && told(r, gives_up(l, bytes, BIG)) && drains(r, l, &got)) {
        r->w.hub->batch = 8; /* as if many were ready: a little output goes to the poller */
        int64_t result = ap_conn_read(l->conn, l->pos, 1, 0, 0, (char *)bytes + BIG, 500);
        bool taken = result == -EAGAIN || result == AP_EQUEUED;
        CHECK(taken || !told(r, result));
        ap_conn_disarm_read(l->conn);
        sent += taken ? 500 : 0;
        if (drains(r, l, &got) && taken) {
            for (int64_t end = ap_now() + PATIENCE; (got = peer_takes(l, got)) < sent;)
                CHECK(ap_now() < end);
        }
    }
    got = peer_takes(l, got);
    CHECK(got <= sent);
    ap_conn_close(l->conn, 0, 0);
    free(bytes);
}

/* The error queue; then the ends of both sides, with input that nobody has read. */
static inline void ends(struct run *r, struct link *l)
{
    unsigned flags = SOF_TIMESTAMPING_TX_SOFTWARE | SOF_TIMESTAMPING_SOFTWARE;
    setsockopt(l->fd, SOL_SOCKET, SO_TIMESTAMPING, &flags, sizeof flags);
    const uint8_t byte = pattern(2, 0);
    uint64_t got = 0;
    if (!told(r, ap_conn_write(l->conn, (const char *)&byte, 1)) || !drains(r, l, &got))
        return;
    for (int i = 0; i < 100 && !(peek_events(l->fd, POLLERR) & POLLERR); i++)
        usleep(100);
    for (int i = 0; i < 100 && (peek_events(l->fd, POLLERR) & POLLERR); i++)
        beat(r, l);
    CHECK(r->error || !(peek_events(l->fd, POLLERR) & POLLERR));
    peer_say(l, 1, 0, 100);
    if (!told(r, wants(r, l, 50)))
        return;
    int rc;
    while ((rc = ap_conn_linger(l->conn, l->pos, 0)) == -EAGAIN) {
        link_drop_block(l);
        peer_close(l);
        if (!woken(r, l, l->id, AP_MAIL_READ))
            return;
    }
    told(r, rc);
}

static inline void streams(struct run *r)
{
    static void (*const parts[])(struct run *, struct link *) = {reads, writes, ends};
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        for (size_t i = 0; i < AP_ARRAY_SIZE(parts); i++) {
            struct link l;
            if (kind == AP_UNIX && parts[i] == ends)
                continue;
            if (!opens(r, kind, &l))
                continue;
            parts[i](r, &l);
            ap_conn_close(l.conn, parts[i] == reads, 0);
            link_close(&l);
        }
    }
}

/* ---- UNIX sockets ----------------------------------------------------- */

static inline void close_all(const int *fds, int count)
{
    for (int i = 0; i < count; i++)
        close(fds[i]);
}

static inline int64_t takes_fds(struct run *r, struct link *l, int kind)
{
    int fds[4], count = 4;
    char data[8];
    ap_view view;
    int64_t result = kind == AP_UNIX ? wants(r, l, 1) : -EAGAIN;
    while (result == -EAGAIN) {
        result = ap_conn_receive(l->conn, 100 * KB, 0, &view, fds, &count);
        if (result >= 0)
            ap_block_unref(view.block);
        if (result == -EAGAIN && !woken(r, l, l->id, AP_MAIL_READ))
            return -r->error;
    }
    if (result >= 0 && kind == AP_UNIX)
        result = ap_conn_take_fds(l->conn, l->pos, data, sizeof data, fds, &count);
    if (result >= 0)
        close_all(fds, count);
    return result;
}

static inline void descriptors(struct run *r)
{
    for (int kind = AP_UNIX; kind <= AP_SEQPACKET; kind++) {
        struct link l;
        int fds[] = {dup(0), dup(0)};
        ap_rights got;
        char data[8];
        struct iovec iov = {.iov_base = data, .iov_len = sizeof data};
        size_t offered = 2;
        if (opens(r, kind, &l)) {
            CHECK_EQ(sendmsg(l.peer,
                             &(struct msghdr){.msg_iov = &(struct iovec){"ab", 2}, .msg_iovlen = 1},
                             0),
                     2);
            told(r, kind == AP_UNIX ? wants(r, &l, 2) : takes_fds(r, &l, kind));
            link_drop_block(&l);
            if (ap_sys_send_rights(l.peer, "xy", &offered, fds, 2) > 0)
                told(r, takes_fds(r, &l, kind));
            if (told(r, ap_conn_send_fds(l.conn, "zz", 2, fds, 2)) &&
                ap_sys_recv_rights(l.peer, &iov, 1, &offered, &got) > 0) {
                for (int i = 0; i < got.count; i++)
                    ap_sys_close(got.fds[i]);
            }
            peer_close(&l);
            if (kind == AP_SEQPACKET) {
                int64_t end = takes_fds(r, &l, kind);
                CHECK(end == AP_EEOF || !told(r, end));
            }
            link_close(&l);
        }
        close_all(fds, 2);
    }
}

/* ---- accepting -------------------------------------------------------- */

static inline void accepts_all(struct run *r, ap_listener *listener, int want_of_them)
{
    ap_accepted batch[8];
    uint64_t id = ap_listener_id(listener);
    for (int have = 0; have < want_of_them;) {
        int n = ap_listener_take(listener, batch, 2);
        if (n == 0) {
            if (!woken(r, NULL, id, AP_MAIL_ACCEPT | (r->forever ? AP_MAIL_STARVED : 0)))
                return;
            if (r->forever && mail_at(&r->w, id)->error)
                return; /* it pauses, again and again, and has said why */
        } else if (!told(r, n) && r->forever) {
            return; /* otherwise it was reported, and goes on */
        }
        for (int i = 0; i < n; i++, have++)
            CHECK_OK(ap_fd_close(batch[i].fd));
    }
}

static inline void accepting(struct run *r)
{
    struct sockaddr_in address;
    int fd = listen_tcp(16, &address), peers[6];
    ap_account *account = NULL;
    ap_listener *listener = NULL;
    if (!told(r, ap_account_new(&account))) {
        close(fd);
        return;
    }
    if (!told(r, ap_listener_new(r->w.poller, r->w.hub, fd, account, &listener))) {
        close(fd);
        ap_account_unref(account);
        return;
    }
    for (size_t i = 0; i < AP_ARRAY_SIZE(peers); i++)
        peers[i] = connect_tcp(&address);
    ap_account_add(account, 6);
    accepts_all(r, listener, 5); /* the last stays in the queue, and is closed with it */
    ap_listener_release(listener);
    ap_account_unref(account);
    close_all(peers, AP_ARRAY_SIZE(peers));
}

/* ---- all of it -------------------------------------------------------- */

static inline bool begins(struct run *r, bool threaded)
{
    if (!told(r, ap_poller_new(&r->w.poller)))
        return false;
    if (!told(r, ap_hub_new(&r->w.hub))) {
        ap_poller_unref(r->w.poller);
        return false;
    }
    if (!threaded)
        return true;
    r->w.threaded = told(r, ap_poller_start(r->w.poller));
    return true;
}

/* Everything is back where it was. Faults that are left may still hit until then. */
static inline void finishes(struct run *r)
{
    struct world *w = &r->w;
    ap_hub_trim(w->hub);
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_OK(ap_poller_stop(w->poller));
    for (int i = 0; i < 3; i++)
        ap_poller_step(w->poller, 0, BUDGET);
    ap_pool_trim(w->poller->context.pool);
    ap_poller_stats s;
    CHECK_OK(ap_poller_statistics(w->poller, &s));
    CHECK_EQ(s.connections, 0);
    CHECK_EQ(s.slots, 0);
    CHECK_EQ(s.blocks_in_use, 0);
    CHECK_EQ(bytes_in_use(w), 0);
    CHECK_EQ(bytes_pinned(w), 0);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
}

/* With a fault: after skip calls the next times calls fail. Returns how often it has hit. */
static inline int scenario(int call, int error, int skip, int times, size_t limit, bool threaded)
{
    struct run *r = calloc(1, sizeof *r);
    CHECK(r != NULL);
    *r = (struct run){.error = error, .spurious = error == EAGAIN, .forever = times < 0};
    int before = check_open_files();
    CHECK_OK(ap_fault_set(call, error, skip, times, limit));
    if (begins(r, threaded)) {
        streams(r);
        descriptors(r);
        accepting(r);
        finishes(r);
    }
    int hits = ap_fault_hits(call);
    ap_fault_clear();
    CHECK_EQ(check_open_files(), before);
    free(r);
    return hits;
}

#endif
