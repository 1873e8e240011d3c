/* output.c: sending at once, the queue, and what is owed for it; output that goes along with a wait
 * for input, and the mask of events. */
#include "fixture.h"

static uint32_t epoll_mask(struct link *l)
{
    char path[64], line[256];
    unsigned fd, events, mask = 0;
    snprintf(path, sizeof path, "/proc/self/fdinfo/%d", l->w->poller->epfd);
    FILE *file = fopen(path, "r");
    CHECK(file != NULL);
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "tfd: %u events: %x", &fd, &events) == 2 && (int)fd == l->fd)
            mask = events;
    }
    fclose(file);
    return mask;
}

/* ---- at once ---------------------------------------------------------- */

LINK_TEST(output_small_writes_are_sent_inline, STREAMS, HIGH)
{
    for (uint64_t i = 0; i < 10; i++)
        CHECK_EQ(ap_conn_write(l->conn, (char *)much() + i * 100, 100), 0);
    CHECK_EQ(stats(w).polls, 0);
    CHECK_EQ(link_stats(l).writes, 10);
    CHECK_EQ(link_stats(l).bytes_sent, 1000);
    peer_expect(l, 1, 0, 1000);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0); /* nothing is owed for what was never queued */
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), 0);
}

LINK_TEST(output_of_nothing, TCP, HIGH)
{
    ap_piece empty[3] = {{NULL, 0}, {"", 0}, {NULL, 0}}, mixed[3] = {{"", 0}, {"x", 1}, {"", 0}};
    CHECK_EQ(ap_conn_send(l->conn, NULL, 0), 0); /* L05 */
    CHECK_EQ(ap_conn_send(l->conn, empty, 3), 0);
    CHECK_EQ(ap_conn_send(l->conn, mixed, 3), 0);
    char got[4];
    UNTIL(w, unread_in_kernel(l->peer) > 0);
    CHECK_EQ(recv(l->peer, got, 4, 0), 1);
}

/* ---- the queue -------------------------------------------------------- */

/* What the kernel does not take is finished by the driver, without the loop; and a token comes
 * whether anybody waits or not. */
LINK_TEST(output_stalls_and_the_driver_finishes, STREAMS, HIGH)
{
    stall(l, much());
    CHECK(stats(w).stalls > 0);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_expect(l, 1, 0, MUCH);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
    CHECK_EQ(w->tokens, 1);
    CHECK_EQ(link_stats(l).buffered_output, 0);
    CHECK_EQ(link_stats(l).bytes_sent, MUCH);
}

static void send_pieces(int kind, size_t count, size_t each)
{
    struct world *w = world_open();
    struct link l = link_open(w, kind, HIGH);
    uint8_t *data = pattern_make(3, 0, count * each);
    ap_piece *pieces = calloc(count, sizeof *pieces);
    for (size_t i = 0; i < count; i++)
        pieces[i] = (ap_piece){data + i * each, each};
    int64_t left = ap_conn_send(l.conn, pieces, (int)count);
    CHECK_OK(left);
    memset(pieces, 0, count * sizeof *pieces); /* only the memory they name must stay */
    peer_expect(&l, 3, 0, count * each);
    if (left)
        await(w, l.id, AP_MAIL_SENT);
    free(pieces);
    free(data);
    link_close(&l);
    world_close(w);
}

/* More than one call takes, and more than IOV_MAX (L20). */
TEST(output_many_pieces)
{
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        send_pieces(kind, 63, 10);
        send_pieces(kind, 64, 10);
        send_pieces(kind, 65, 10);
        send_pieces(kind, 3000, 7);
        send_pieces(kind, 3000, 1000);
        send_pieces(kind, 5, 700 * KB);
        send_pieces(kind, 64, 4096); /* the bound falls on the end of a piece */
        send_pieces(kind, 65, 4096);
    }
}

/* Random pieces, queued and not, against the stream. */
LINK_TEST(output_random_pieces, STREAMS, HIGH)
{
    uint64_t seed = 8, sent = 0, heard = 0, total = SANITIZED ? 4 * MB : 40 * MB;
    uint8_t *data = pattern_make(2, 0, total + MB);
    while (heard < total) {
        ap_piece pieces[100];
        int count = (int)random_below(&seed, 100);
        for (int i = 0; i < count && sent < total; i++) {
            size_t n = random_below(&seed, random_below(&seed, 4) ? 3000 : 30000);
            n = n < total - sent ? n : total - sent;
            pieces[i] = (ap_piece){data + sent, n};
            sent += n;
            if (sent == total)
                count = i + 1;
        }
        if (sent < total || count > 0)
            CHECK_OK(ap_conn_send(l->conn, pieces, sent == heard ? 0 : count));
        if (sent == heard) {
            sent = heard;
            continue;
        }
        uint64_t n = random_below(&seed, sent - heard + 1);
        if (sent == total)
            n = total - heard;
        peer_expect(l, 2, heard, n);
        heard += n;
    }
    if (link_stats(l).buffered_output)
        await(w, l->id, AP_MAIL_SENT);
    free(data);
}

/* ---- what is owed ----------------------------------------------------- */

/* Failed output owes the token as well: the loop holds memory for it. */
LINK_TEST(output_failed_owes_a_token, STREAMS, HIGH)
{
    uint8_t *data = pattern_make(1, 0, MUCH);
    stall(l, data);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN);
    peer_reset(l);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_WRITE, AP_MAIL_WRITE);
    free(data); /* nothing looks at it any more */
    CHECK_EQ(link_stats(l).buffered_output, 0);
    CHECK(ap_conn_write(l->conn, "x", 1) < 0);
    CHECK(ap_conn_drain(l->conn, 0, 0) < 0);
    CHECK(ap_conn_status(l->conn) & AP_IS_BROKEN);
    settle(w);
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_SENT, 0); /* and only once */
}

/* ENOMEM while queueing ends the connection, and owes what was queued before. */
LINK_TEST(output_without_memory, UNIX, HIGH)
{
    uint8_t *data = pattern_make(1, 0, MUCH);
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, -1, 0));
    CHECK_EQ(ap_conn_write(l->conn, (char *)data, MUCH), -ENOMEM);
    ap_fault_clear();
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -ENOMEM);
    link_close(l);

    *l = link_open(w, AP_UNIX, HIGH);
    stall(l, data);
    ap_piece pieces[20];
    for (int i = 0; i < 20; i++)
        pieces[i] = (ap_piece){data, 1};
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, -1, 0));
    CHECK_EQ(ap_conn_send(l->conn, pieces, 20), -ENOMEM);
    ap_fault_clear();
    CHECK_EQ(mail_of(w, l->id) & AP_MAIL_SENT, AP_MAIL_SENT);
    free(data);
}

LINK_TEST(output_to_a_closed_peer, UNIX, HIGH)
{
    peer_close(l);
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -EPIPE);
    CHECK_EQ(want_wait(l, 1), AP_EEOF); /* it was no RST */
    link_close(l);

    *l = link_open(w, AP_TCP, HIGH);
    peer_reset(l);
    arrived_event(l, POLLERR);
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -ECONNRESET);
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -ECONNRESET);
}

/* ---- handed over: output of a task that waits for input ---------------- */

#define BUSY 6

/* Makes connections ready together, so that the loop counts as busy. */
static void make_busy(struct world *w, struct link *links)
{
    for (int i = 0; i < BUSY; i++) {
        CHECK_EQ(want(&links[i], 10), -EAGAIN);
        peer_say(&links[i], 1, 0, 10);
        arrived(&links[i], 1);
    }
    settle(w);
    CHECK_EQ(collect(w), BUSY);
    for (int i = 0; i < BUSY; i++)
        expect(&links[i], 1, 0, 10);
}

/* Asks for input, with n bytes of stream 9 as output, from memory that is gone right after. */
static int64_t ask(struct link *l, uint64_t from, size_t n)
{
    uint8_t *data = pattern_make(9, from, n);
    int64_t rc = ap_conn_read(l->conn, l->pos, 10, 0, 0, (char *)data, n);
    memset(data, 0xee, n);
    free(data);
    return rc;
}

LINKS_TEST(output_handed_over_is_sent_by_the_driver, STREAMS, HIGH, BUSY)
{
    make_busy(w, l);
    for (int i = 0; i < BUSY; i++)
        CHECK_EQ(ask(&l[i], 0, 500), -EAGAIN); /* Python keeps nothing */
    CHECK_EQ(stats(w).writes, 0);
    for (int i = 0; i < BUSY; i++)
        CHECK_EQ(ap_conn_queued(l[i].conn), 500);
    for (int i = 0; i < BUSY; i++) {
        peer_expect(&l[i], 9, 0, 500);
        CHECK_EQ(ap_conn_queued(l[i].conn), 0);
        peer_say(&l[i], 1, 10, 10);
        expect(&l[i], 1, 10, 10);
    }
    for (int i = 0; i < BUSY; i++)
        CHECK_EQ(mail_of(w, l[i].id) & AP_MAIL_SENT, 0); /* nothing is owed */
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0);            /* the copies have gone back */
}

/* What follows it goes behind it, and only that is held and put back. */
LINKS_TEST(output_handed_over_stays_in_front, STREAMS, HIGH, BUSY)
{
    make_busy(w, l);
    uint8_t *data = pattern_make(9, 500, MB), *copy = pattern_make(9, 500, MB);
    CHECK_EQ(ask(l, 0, 500), -EAGAIN);
    CHECK_EQ(ap_conn_write(l->conn, (char *)data, MB), MB + 500);
    CHECK_EQ(ap_conn_hold(l->conn), MB);
    settle(w);
    memset(data, 0, MB);
    ap_piece pieces[2] = {{copy, 1000}, {copy + 1000, MB - 1000}};
    CHECK_EQ(ap_conn_requeue(l->conn, pieces, 2), MB + 500);
    free(data);
    peer_expect(l, 9, 0, 500 + MB);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
    free(copy);
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0); /* the copies have gone back */
}

/* A cancelled send that had queued nothing of its own leaves the answer before it alone. */
LINKS_TEST(output_handed_over_survives_an_empty_requeue, TCP, HIGH, BUSY)
{
    make_busy(w, l);
    CHECK_EQ(ask(l, 0, 500), -EAGAIN);
    CHECK_EQ(ap_conn_hold(l->conn), 0);
    CHECK_EQ(ap_conn_requeue(l->conn, NULL, 0), 500);
    CHECK_EQ(ap_conn_shutdown(l->conn), -EBUSY);
    CHECK_EQ(ap_conn_detach(l->conn, l->pos), -EBUSY);
    CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), -EBUSY);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN);
    peer_expect(l, 9, 0, 500);
    await(w, l->id, AP_MAIL_WRITE);
    CHECK_OK(ap_conn_shutdown(l->conn));
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0); /* the copies have gone back */
}

LINKS_TEST(output_handed_over_may_stall, STREAMS, HIGH, BUSY)
{
    make_busy(w, l);
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, 0, 0, 3, 100)); /* in portions */
    CHECK_EQ(ask(l, 0, 1000), -EAGAIN);
    step(w, 0);
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, EAGAIN, 0, 1, 0));
    ap_fault_clear();
    peer_expect(l, 9, 0, 1000);
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0); /* the copies have gone back */
}

/* The connection breaks, or is closed, with it under way: its block goes back. */
LINKS_TEST(output_handed_over_and_broken, STREAMS, HIGH, BUSY)
{
    make_busy(w, l);
    for (int i = 0; i < BUSY; i++) {
        struct link *one = &l[i];
        CHECK_OK(ap_fault_set(AP_CALL_WRITE, ECONNRESET, 0, 1, 0));
        CHECK_EQ(ask(one, 0, 1000), -EAGAIN);
        if (i % 2)
            settle(w);
        else
            CHECK_OK(ap_conn_close(one->conn, 0, 0));
        CHECK_EQ(ap_conn_queued(one->conn), i % 2 ? 0 : -EBADF);
        if (i % 2)
            CHECK_EQ(ap_conn_write(one->conn, "x", 1), -ECONNRESET);
        ap_fault_clear();
    }
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0); /* the copies have gone back */
}

/* Without memory for a copy the caller sends it by itself. */
LINKS_TEST(output_not_handed_over, TCP, HIGH, BUSY)
{
    make_busy(w, l);
    CHECK_OK(ap_fault_set(AP_CALL_MAP, ENOMEM, 0, -1, 0));
    CHECK_EQ(ask(&l[0], 0, 1000), -EAGAIN);
    ap_fault_clear();
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, -1, 0));
    CHECK_EQ(ask(&l[1], 0, 1000), -EAGAIN);
    ap_fault_clear();
    CHECK_EQ(ask(&l[2], 0, 32 * KB), -EAGAIN); /* too large to be copied */
    CHECK_OK(ap_conn_shutdown(l[3].conn));
    CHECK_EQ(ask(&l[3], 0, 10), -EAGAIN); /* nothing may be sent: not even tried */
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(ap_conn_queued(l[i].conn), 0);
        peer_expect(&l[i], 9, 0, i == 2 ? 32 * KB : 1000);
    }
    CHECK_EQ(stats(w).writes, 3);
    CHECK_EQ(hub_blocks(w).blocks_in_use, 0); /* the copies have gone back */
}

/* ---- the mask --------------------------------------------------------- */

/* On TCP EPOLLOUT is always watched; on UNIX sockets, where it would cost an event for every
 * reply, only while a write is stalled. */
LINK_TEST(output_mask_of_tcp, TCP, HIGH)
{
    CHECK(epoll_mask(l) & EPOLLOUT);
    CHECK(epoll_mask(l) & (uint32_t)EPOLLET);
    CHECK(epoll_mask(l) & EPOLLPRI);
    CHECK(epoll_mask(l) & EPOLLRDHUP);
    settle(w);
    uint64_t events = stats(w).events;
    for (uint64_t i = 0; i < 100; i++) { /* and costs no event there */
        CHECK_EQ(ap_conn_write(l->conn, (char *)much() + i * 100, 100), 0);
        peer_expect(l, 1, i * 100, 100);
        step(w, 0);
    }
    CHECK(stats(w).events - events <= 2);
}

LINK_TEST(output_mask_of_unix, UNIX, HIGH)
{
    CHECK(!(epoll_mask(l) & EPOLLOUT));
    CHECK_EQ(ap_conn_write(l->conn, (char *)much(), 1000), 0);
    CHECK(!(epoll_mask(l) & EPOLLOUT));
    peer_expect(l, 1, 0, 1000);
    settle(w);
    CHECK_EQ(stats(w).events, 0); /* no event for a reply that was read */
    for (int i = 0; i < 3; i++) {
        stall(l, much());
        CHECK(epoll_mask(l) & EPOLLOUT);
        CHECK(epoll_mask(l) & (uint32_t)EPOLLET);
        peer_expect(l, 1, 0, MUCH);
        await(w, l->id, AP_MAIL_SENT);
        settle(w);
        CHECK(!(epoll_mask(l) & EPOLLOUT));
    }
}

/* A wait for room that was taken back leaves nothing behind. */
LINK_TEST(output_mask_of_unix_after_a_cancelled_drain, UNIX, HIGH)
{
    stall(l, much());
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
    CHECK_OK(ap_conn_disarm_write(l->conn));
    peer_expect(l, 1, 0, MUCH);
    await(w, l->id, AP_MAIL_SENT);
    settle(w);
    for (int i = 0; i < 3; i++) { /* full, and waited for room, and given up */
        size_t sent = 0;
        while (ready_flags(l) & AP_WRITABLE)
            sent += (size_t)(1000 - ap_conn_write(l->conn, (char *)much() + sent, 1000));
        ap_conn_hold(l->conn);
        CHECK_OK(ap_conn_requeue(l->conn, NULL, 0));
        CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
        CHECK_OK(ap_conn_disarm_write(l->conn));
        peer_expect(l, 1, 0, sent);
        settle(w);
        mail_of(w, l->id);
        CHECK(!(epoll_mask(l) & EPOLLOUT));
    }
}

/* ---- faults ----------------------------------------------------------- */

LINK_TEST(output_survives_faults_of_send, STREAMS, HIGH)
{
    static const int errors[] = {EINTR, EAGAIN, 0};
    uint64_t at = 0, seed = 4;
    for (int i = 0; i < 200; i++) {
        size_t n = 1 + random_below(&seed, 8000);
        CHECK_OK(ap_fault_set(AP_CALL_WRITE, errors[i % 3], (int)random_below(&seed, 2),
                              1 + (int)random_below(&seed, 3), 1 + random_below(&seed, 100)));
        ap_piece pieces[2] = {{much() + at, n / 3}, {much() + at + n / 3, n - n / 3}};
        int64_t left = ap_conn_send(l->conn, pieces, 2);
        CHECK_OK(left);
        while (link_stats(l).buffered_output) {
            kick(l);
            step(w, 0);
        }
        if (left)
            CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
        ap_fault_clear();
        peer_expect(l, 1, at, n);
        at += n;
    }
}

TEST(output_error_of_send)
{
    static const int errors[] = {ECONNRESET, EPIPE, ENOBUFS, ETIMEDOUT};
    struct world *w = world_open();
    for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
        struct link l = link_open(w, AP_TCP, HIGH);
        CHECK_OK(ap_fault_set(AP_CALL_WRITE, errors[i], 0, 1, 0));
        CHECK_EQ(ap_conn_write(l.conn, "abc", 3), -errors[i]);
        CHECK_EQ(ap_conn_write(l.conn, "abc", 3), -errors[i]);
        CHECK_EQ(ap_conn_shutdown(l.conn), -errors[i]);
        CHECK_EQ(ap_conn_status(l.conn), AP_IS_BROKEN | (errors[i] == ENOBUFS ? 0 : AP_IS_GONE));
        link_close(&l);
    }
    ap_fault_clear();
    world_close(w);
}

LINK_TEST(output_error_of_epoll_while_stalled, UNIX, HIGH)
{
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_CTL, ENOMEM, 0, 1, 0));
    int64_t left = ap_conn_write(l->conn, (char *)much(), MUCH);
    if (left > 0) { /* the driver got to the stall */
        for (int i = 0; i < 50; i++)
            step(w, 0);
        CHECK_EQ(await(w, l->id, AP_MAIL_SENT), AP_MAIL_SENT);
    }
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -ENOMEM);
    ap_fault_clear();
}

/* A socket that lives on after a failed write would leave both ends waiting: the peer for the
 * answer, the loop for the next request. */
TEST(output_that_fails_ends_the_input_too)
{
    int errors[] = {ENOBUFS, ENOMEM, EPIPE};
    for (int kind = AP_TCP; kind <= AP_UNIX; kind++) {
        for (size_t i = 0; i < AP_ARRAY_SIZE(errors); i++) {
            struct world *w = world_open();
            struct link l = link_open(w, kind, HIGH);
            peer_say(&l, 1, 0, 100);
            CHECK_OK(ap_fault_set(AP_CALL_WRITE, errors[i], 0, 1, 0));
            CHECK_EQ(ap_conn_write(l.conn, "x", 1), -errors[i]);
            ap_fault_clear();
            expect(&l, 1, 0, 100); /* what had come stays readable */
            if (kind == AP_UNIX && errors[i] == EPIPE) {
                CHECK_EQ(want(&l, 1), -EAGAIN); /* it only does not read any more */
            } else {
                CHECK_EQ(want_wait(&l, 1), errors[i] == EPIPE ? AP_EEOF : -errors[i]);
                peer_expect_eof(&l);
            }
            link_close(&l);
            world_close(w);
        }
    }
}
