/* Test fixtures: a poller, a hub and connected sockets, without an event loop.
 *
 * Most tests drive the poller themselves (ap_poller_step), so that one thread plays driver and
 * loop, and an interleaving is written down instead of hoped for. `world_start` starts the
 * poller's own thread instead; everything else works the same.
 *
 * A `struct link` is one connection and the socket at its other end, with what Python's reader
 * keeps: the block it was handed and its place in it.
 */
#ifndef FIXTURE_H
#define FIXTURE_H

#include "check.h"
#include "clock.h"
#include "connection.h"
#include "ending.h"
#include "endpoint.h"
#include "epoch.h"
#include "fds.h"
#include "hub.h"
#include "inbox.h"
#include "input.h"
#include "listener.h"
#include "output.h"
#include "poller.h"
#include "read.h"
#include "runlist.h"
#include "serve.h"
#include "slot.h"
#include "sysio.h"
#include "window.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#define ROUNDS(n) ((n) / 20 + 1)
#else
#define SANITIZED 0
#define ROUNDS(n) (n)
#endif

#define MS ((int64_t)1000 * 1000)
#define KB ((size_t)1024)
#define MB ((size_t)1024 * 1024)
#define HIGH (256u * 1024)
#define PATIENCE (30 * 1000 * MS) /* for a condition that must come true */
#define BUDGET 1024
#define LITMUS \
    (4 * 1000 * MS) /* how long threads race at most: on a busy machine a round is slow */

/* So many rounds of a race, or as many as there is time for. */
#define RACE(round_, n_)                                    \
    for (int64_t over_ = ap_now() + 2 * LITMUS, round_ = 0; \
         round_ < ROUNDS(n_) && ap_now() < over_; round_++)

/* ---- the world -------------------------------------------------------- */

#define MAIL_SLOTS 4096

struct mail {
    uint64_t id;
    uint32_t bits;
    int32_t error;
};

struct world {
    ap_poller *poller;
    ap_hub *hub;
    bool threaded;
    uint64_t tokens; /* taken so far */
    struct mail mail[MAIL_SLOTS];
};

static inline struct world *world_open(void)
{
    struct world *w = calloc(1, sizeof *w);
    CHECK(w != NULL);
    CHECK_OK(ap_poller_new(&w->poller));
    CHECK_OK(ap_hub_new(&w->hub));
    return w;
}

static inline void world_start(struct world *w)
{
    CHECK_OK(ap_poller_start(w->poller));
    w->threaded = true;
}

static inline void world_stop(struct world *w)
{
    CHECK_OK(ap_poller_stop(w->poller));
    w->threaded = false;
}

static inline ap_poller_stats stats(struct world *w)
{
    ap_poller_stats s;
    CHECK_OK(ap_poller_statistics(w->poller, &s));
    return s;
}

/* Of the blocks that the loop made. */
static inline ap_poller_stats hub_blocks(struct world *w)
{
    ap_poller_stats s = {0};
    CHECK_OK(ap_hub_statistics(w->hub, &s));
    return s;
}

static inline uint64_t bytes_pinned(struct world *w)
{
    return stats(w).bytes_pinned + hub_blocks(w).bytes_pinned;
}

static inline uint64_t bytes_in_use(struct world *w)
{
    return stats(w).bytes_in_use + hub_blocks(w).bytes_in_use;
}

static inline int step(struct world *w, int timeout_ms)
{
    int served = ap_poller_step(w->poller, timeout_ms, BUDGET);
    CHECK_OK(served);
    return served;
}

/* Steps until there is nothing left that is known now. */
static inline void settle(struct world *w)
{
    for (int quiet = 0; quiet < 2;) {
        uint64_t events = stats(w).events;
        int served = step(w, 0);
        quiet = served == 0 && events == stats(w).events ? quiet + 1 : 0;
    }
}

static inline struct mail *mail_at(struct world *w, uint64_t id)
{
    struct mail *m = &w->mail[(uint32_t)id % MAIL_SLOTS];
    if (m->id != id)
        *m = (struct mail){.id = id};
    return m;
}

static inline int collect(struct world *w)
{
    ap_token tokens[16];
    int n, all = 0;
    do {
        n = ap_hub_take(w->hub, tokens, 16);
        CHECK_OK(n);
        for (int i = 0; i < n; i++) {
            struct mail *m = mail_at(w, tokens[i].id);
            m->bits |= tokens[i].bits;
            m->error = tokens[i].value ? tokens[i].value : m->error;
        }
        all += n;
    } while (n == 16);
    w->tokens += (uint64_t)all;
    return all;
}

/* What came for id until now; clears it. */
static inline uint32_t mail_of(struct world *w, uint64_t id)
{
    collect(w);
    uint32_t bits = mail_at(w, id)->bits;
    mail_at(w, id)->bits = 0;
    return bits;
}

/* The same, of what was collected already. */
static inline uint32_t mail_of_quietly(struct world *w, uint64_t id)
{
    uint32_t bits = mail_at(w, id)->bits;
    mail_at(w, id)->bits = 0;
    return bits;
}

/* Lets the driver work: a moment at most. */
static inline void breathe(struct world *w)
{
    struct pollfd door = {.fd = ap_hub_fd(w->hub), .events = POLLIN};
    if (w->threaded)
        poll(&door, 1, 5);
    else
        step(w, 5);
}

#define UNTIL(w, condition)                                       \
    for (int64_t end_ = ap_now() + PATIENCE; !(condition);) {     \
        breathe(w);                                               \
        if (ap_now() > end_)                                      \
            CHECK_FAIL("UNTIL(%s): it did not come", #condition); \
    }

/* Waits for any of bits, and takes those that came out of the mail. */
static inline uint32_t await(struct world *w, uint64_t id, uint32_t bits)
{
    UNTIL(w, (collect(w), mail_at(w, id)->bits & bits));
    uint32_t got = mail_at(w, id)->bits & bits;
    mail_at(w, id)->bits &= ~bits;
    return got;
}

/* Everything must be back where it was: nothing is open, referenced, or pinned. */
static inline void world_close(struct world *w)
{
    CHECK_OK(ap_hub_kill(w->hub));
    CHECK_OK(ap_poller_stop(w->poller));
    for (int i = 0; i < 4; i++)
        step(w, 0);
    ap_poller_stats s = stats(w);
    CHECK_EQ(s.connections, 0);
    CHECK_EQ(s.slots, 0);
    CHECK_EQ(s.blocks_in_use, 0);
    CHECK_EQ(bytes_in_use(w), 0);
    CHECK_EQ(bytes_pinned(w), 0);
    ap_hub_unref(w->hub);
    ap_poller_unref(w->poller);
    free(w);
}

/* ---- bytes ------------------------------------------------------------ */

/* The bytes from a place of a stream on: neighbours, blocks and streams differ. Not instrumented,
 * for the sanitizers look at what is compared with it. */
__attribute__((no_sanitize("address", "thread", "undefined"))) static inline void pattern_fill(
    uint8_t *bytes, uint64_t stream, uint64_t from, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t x = (from + i + 1) * 0x9e3779b97f4a7c15u + stream * 0xc2b2ae3d27d4eb4fu;
        bytes[i] = (uint8_t)(x >> 40);
    }
}

static inline uint8_t pattern(uint64_t stream, uint64_t at)
{
    uint8_t byte;
    pattern_fill(&byte, stream, at, 1);
    return byte;
}

static inline uint8_t *pattern_make(uint64_t stream, uint64_t from, size_t n)
{
    uint8_t *bytes = malloc(n ? n : 1);
    CHECK(bytes != NULL);
    pattern_fill(bytes, stream, from, n);
    return bytes;
}

static inline void pattern_check(const void *data, uint64_t stream, uint64_t from, size_t n)
{
    const uint8_t *bytes = data;
    uint8_t expected[4096];
    for (size_t done = 0; done < n; done += sizeof expected) {
        size_t part = n - done < sizeof expected ? n - done : sizeof expected;
        pattern_fill(expected, stream, from + done, part);
        if (memcmp(bytes + done, expected, part) == 0)
            continue;
        for (size_t i = done; i < done + part; i++) {
            if (bytes[i] != pattern(stream, from + i))
                CHECK_FAIL("stream %llu: byte %llu is 0x%02x, not 0x%02x",
                           (unsigned long long)stream, (unsigned long long)(from + i), bytes[i],
                           pattern(stream, from + i));
        }
    }
}

/* xorshift64: a test that fails fails again. */
static inline uint64_t random_next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static inline uint64_t random_below(uint64_t *state, uint64_t n)
{
    return random_next(state) % n;
}

/* ---- sockets ---------------------------------------------------------- */

static inline void make_nonblocking(int fd)
{
    CHECK_OK(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK));
}

/* A listening socket on 127.0.0.1 and the port the kernel chose. */
static inline int listen_tcp(int backlog, struct sockaddr_in *address)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    CHECK(fd >= 0);
    *address = (struct sockaddr_in){.sin_family = AF_INET};
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof *address;
    CHECK(bind(fd, (struct sockaddr *)address, size) == 0);
    CHECK(listen(fd, backlog) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)address, &size) == 0);
    return fd;
}

static inline int connect_tcp(const struct sockaddr_in *address)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    CHECK(fd >= 0);
    CHECK(connect(fd, (const struct sockaddr *)address, sizeof *address) == 0);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    make_nonblocking(fd);
    return fd;
}

static inline void sockets_tcp(int fds[2])
{
    struct sockaddr_in address;
    int listening = listen_tcp(8, &address), on = 1;
    fds[1] = connect_tcp(&address);
    struct pollfd ready = {.fd = listening, .events = POLLIN};
    CHECK_EQ(poll(&ready, 1, 10000), 1);
    fds[0] = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    CHECK(fds[0] >= 0);
    setsockopt(fds[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    close(listening);
}

static inline void sockets_of(int kind, int fds[2])
{
    if (kind == AP_TCP)
        sockets_tcp(fds);
    else
        CHECK(socketpair(AF_UNIX,
                         (kind == AP_UNIX ? SOCK_STREAM : SOCK_SEQPACKET) | SOCK_NONBLOCK |
                             SOCK_CLOEXEC,
                         0, fds) == 0);
}

/* A close that sends a RST. */
static inline void close_reset(int fd)
{
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    close(fd);
}

static inline int unread_in_kernel(int fd)
{
    int n = -1;
    ioctl(fd, FIONREAD, &n);
    return n;
}

/* ---- links ------------------------------------------------------------ */

struct link {
    struct world *w;
    ap_conn *conn;
    uint64_t id;
    int fd;          /* of conn */
    int peer;        /* -1 once closed */
    ap_block *block; /* what was handed out; we own one reference */
    uint32_t pos;    /* our place in it */
};

static inline struct link link_fd(struct world *w, int kind, uint32_t high, int fd, int peer)
{
    struct link l = {.w = w, .fd = fd, .peer = peer};
    CHECK_OK(ap_conn_new(w->poller, w->hub, fd, kind, high, &l.conn));
    l.id = ap_conn_id(l.conn);
    return l;
}

static inline void link_register(struct link *l)
{
    int result;
    CHECK_EQ(ap_conn_register(&l->conn, &result, 1), 0);
}

static inline struct link link_open(struct world *w, int kind, uint32_t high)
{
    int fds[2];
    sockets_of(kind, fds);
    struct link l = link_fd(w, kind, high, fds[0], fds[1]);
    link_register(&l);
    return l;
}

/* Lets go of the window, and says how far it was read. */
static inline void link_drop_block(struct link *l)
{
    if (l->block && l->conn) {
        int rc = ap_conn_consume(l->conn, l->pos, 0);
        CHECK(rc == 0 || rc == -EBADF);
    }
    if (l->block)
        ap_block_unref(l->block);
    l->block = NULL;
    l->pos = 0;
}

static inline void peer_close(struct link *l)
{
    if (l->peer >= 0)
        close(l->peer);
    l->peer = -1;
}

static inline void peer_reset(struct link *l)
{
    close_reset(l->peer);
    l->peer = -1;
}

/* Once or again: a test may close what is closed for it anyway. */
static inline void link_close(struct link *l)
{
    link_drop_block(l);
    if (l->conn)
        ap_conn_release(l->conn);
    l->conn = NULL;
    peer_close(l);
}

enum {
    TCP = 1 << AP_TCP,
    UNIX = 1 << AP_UNIX,
    MESSAGES = 1 << AP_SEQPACKET,
    STREAMS = TCP | UNIX,
};

static inline void for_links(int kinds, uint32_t high, int count,
                             void (*run)(struct world *, struct link *))
{
    CHECK(kinds && !(kinds & ~(STREAMS | MESSAGES)));
    for (int kind = AP_TCP; kind <= AP_SEQPACKET; kind++) {
        if (!(kinds & 1 << kind))
            continue;
        struct world *w = world_open();
        struct link *links = calloc((size_t)count, sizeof *links);
        CHECK(links != NULL);
        for (int i = 0; i < count; i++)
            links[i] = link_open(w, kind, high);
        run(w, links);
        for (int i = 0; i < count; i++)
            link_close(&links[i]);
        free(links);
        world_close(w);
    }
}

/* A test of so many connections, `l`, in a world of their own, `w`: it runs once over each kind. */
#define LINKS_TEST(name_, kinds_, high_, count_)               \
    static void name_##_over(struct world *w, struct link *l); \
    TEST(name_)                                                \
    {                                                          \
        for_links(kinds_, high_, count_, name_##_over);        \
    }                                                          \
    static void name_##_over(__attribute__((unused)) struct world *w, struct link *l)

#define LINK_TEST(name_, kinds_, high_) LINKS_TEST(name_, kinds_, high_, 1)

/* Takes over the window that the head of the input begins. */
static inline void link_fetch(struct link *l)
{
    ap_view view;
    int rc = ap_conn_block(l->conn, l->pos, &view);
    CHECK_OK(rc);
    if (rc == 1) {
        if (l->block)
            ap_block_unref(l->block); /* the call before has reported how far it was read */
        l->block = view.block;
    }
    CHECK(l->block == view.block);
    CHECK(view.start < view.end && view.end <= view.size);
    l->pos = view.start;
}

/* Asks for n bytes and waits no longer than deadline; 0 or the error. */
static inline int64_t want_until(struct link *l, size_t n, int64_t deadline)
{
    int64_t result = ap_conn_read(l->conn, l->pos, n, 0, deadline, NULL, 0);
    if (result < 0)
        return result;
    if (result >> AP_NEW_BLOCK_SHIFT)
        link_fetch(l);
    return 0;
}

static inline int64_t want(struct link *l, size_t n)
{
    return want_until(l, n, 0);
}

/* As want, until it is over. */
static inline int64_t want_wait(struct link *l, size_t n)
{
    int64_t result = want(l, n);
    while (result == -EAGAIN) {
        await(l->w, l->id, AP_MAIL_READ);
        result = want(l, n);
    }
    return result;
}

static inline const uint8_t *link_at(const struct link *l)
{
    return ap_block_at(l->block, l->pos);
}

/* Receives n bytes that must be those of the stream. */
static inline void expect(struct link *l, uint64_t stream, uint64_t from, size_t n)
{
    CHECK_EQ(want_wait(l, n), 0);
    pattern_check(link_at(l), stream, from, n);
    l->pos += (uint32_t)n;
}

/* The same in small portions: contiguity does not matter. */
static inline void expect_stream(struct link *l, uint64_t stream, uint64_t from, uint64_t n)
{
    for (uint64_t done = 0; done < n;) {
        size_t portion = n - done < 16 * KB ? (size_t)(n - done) : 16 * KB;
        expect(l, stream, from + done, portion);
        done += portion;
    }
}

static inline int64_t buffered(struct link *l)
{
    return ap_conn_buffered(l->conn, l->pos);
}

static inline ap_conn_stats link_stats(struct link *l)
{
    ap_conn_stats s;
    CHECK_OK(ap_conn_statistics(l->conn, l->pos, &s));
    return s;
}

/* ---- the other end ---------------------------------------------------- */

/* Sends as much as the kernel takes of n bytes of the stream. */
static inline size_t peer_push(struct link *l, uint64_t stream, uint64_t from, size_t n)
{
    uint8_t *bytes = pattern_make(stream, from, n);
    size_t done = 0;
    while (done < n) {
        ssize_t sent = send(l->peer, bytes + done, n - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            break;
        done += (size_t)sent;
    }
    free(bytes);
    return done;
}

static inline void peer_send(struct link *l, const void *data, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t sent =
            send(l->peer, (const char *)data + done, n - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        CHECK(sent > 0 || errno == EAGAIN);
        if (sent > 0)
            done += (size_t)sent;
        else
            breathe(l->w);
    }
}

static inline void peer_say(struct link *l, uint64_t stream, uint64_t from, size_t n)
{
    uint8_t *bytes = pattern_make(stream, from, n);
    peer_send(l, bytes, n);
    free(bytes);
}

/* Receives exactly n bytes, which must be those of the stream. */
static inline void peer_expect(struct link *l, uint64_t stream, uint64_t from, size_t n)
{
    uint8_t chunk[16 * 1024];
    for (size_t done = 0; done < n;) {
        size_t most = n - done < sizeof chunk ? n - done : sizeof chunk;
        ssize_t got = recv(l->peer, chunk, most, MSG_DONTWAIT);
        CHECK(got > 0 || (got < 0 && errno == EAGAIN));
        if (got > 0) {
            pattern_check(chunk, stream, from + done, (size_t)got);
            done += (size_t)got;
        } else {
            breathe(l->w);
        }
    }
}

static inline void peer_expect_eof(struct link *l)
{
    char byte;
    ssize_t got;
    UNTIL(l->w, (got = recv(l->peer, &byte, 1, MSG_DONTWAIT)) >= 0 || errno != EAGAIN);
    CHECK_EQ(got, 0);
}

/* Waits until so many bytes lie in the kernel for the connection. */
static inline void arrived(struct link *l, int n)
{
    for (int64_t end = ap_now() + PATIENCE; unread_in_kernel(l->fd) < n;) {
        CHECK(ap_now() < end);
        sched_yield();
    }
}

static inline short peek_events(int fd, short events)
{
    struct pollfd at = {.fd = fd, .events = events};
    return poll(&at, 1, 0) == 1 ? at.revents : 0;
}

/* Waits until the kernel has a poll event for the connection. */
static inline void arrived_event(struct link *l, short events)
{
    for (int64_t end = ap_now() + PATIENCE; !(peek_events(l->fd, events) & events);) {
        CHECK(ap_now() < end);
        sched_yield();
    }
}

/* ---- much output ------------------------------------------------------ */

#define MUCH (8 * MB) /* more than the kernel takes for one connection */

/* MUCH bytes of stream 1. They stay: for a test in which the memory matters, they are not. */
static inline uint8_t *much(void)
{
    static uint8_t *bytes;
    if (!bytes)
        bytes = pattern_make(1, 0, MUCH);
    return bytes;
}

/* ---- a look inside ---------------------------------------------------- */

static inline uint8_t ready_flags(struct link *l)
{
    ap_slot_lock(&l->conn->slot);
    uint8_t ready = l->conn->slot.ready;
    ap_slot_unlock(&l->conn->slot);
    return ready;
}

/* Sends MUCH bytes, of which the kernel takes a part. */
static inline void stall(struct link *l, const uint8_t *data)
{
    CHECK(ap_conn_write(l->conn, (const char *)data, MUCH) > 0);
    UNTIL(l->w, !(ready_flags(l) & AP_WRITABLE));
}

static inline bool is_paused(struct link *l)
{
    ap_slot_lock(&l->conn->slot);
    bool paused = l->conn->paused;
    ap_slot_unlock(&l->conn->slot);
    return paused;
}

/* Makes epoll report anew what the socket is ready for: the edge that follows when the kernel
 * itself had cut a transfer short. A fault that cuts one short has no such edge. */
static inline void kick(struct link *l)
{
    uint32_t events = EPOLLIN | EPOLLPRI | EPOLLRDHUP | EPOLLET | EPOLLOUT;
    ap_slot_lock(&l->conn->slot);
    int rc = ap_sys_epoll_ctl(l->w->poller->epfd, EPOLL_CTL_MOD, l->fd, events,
                              ap_slot_tag(&l->conn->slot));
    ap_slot_unlock(&l->conn->slot);
    (void)rc;
}

#endif
