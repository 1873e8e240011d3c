/* write.c: waiting for output, taking it back, and ending it. */
#include "fixture.h"

/* ---- draining --------------------------------------------------------- */

LINK_TEST(output_drain_waits_for_the_queue, STREAMS, HIGH)
{
    stall(l, much());
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_expect(l, 1, 0, MUCH);
    await(w, l->id, AP_MAIL_WRITE);
    CHECK_EQ(mail_of(w, l->id), AP_MAIL_SENT); /* in one token */
    CHECK_EQ(w->tokens, 1);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), 0);
}

/* Writable again, not only empty: what AnyIO's wait_writable wants. */
LINK_TEST(output_drain_until_writable, STREAMS, HIGH)
{
    size_t sent = 0;
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), 0);
    settle(w);
    while (ready_flags(l) & AP_WRITABLE) /* full, and nothing queued */
        sent += (size_t)(1000 - ap_conn_write(l->conn, (char *)much() + sent, 1000));
    int64_t left = ap_conn_hold(l->conn);
    CHECK_OK(ap_conn_requeue(l->conn, NULL, 0));
    (void)left;
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), 0);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), -EAGAIN);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_expect(l, 1, 0, sent);
    await(w, l->id, AP_MAIL_WRITE);
    CHECK_EQ(ap_conn_drain(l->conn, 1, 0), 0);
}

LINK_TEST(output_drain_deadline, TCP, HIGH)
{
    stall(l, much());
    int64_t deadline = ap_now() + 5 * MS;
    CHECK_EQ(ap_conn_drain(l->conn, 0, 1), AP_ELATE);
    int rc = ap_conn_drain(l->conn, 0, deadline);
    if (rc == -EAGAIN) {
        await(w, l->id, AP_MAIL_WRITE);
        rc = ap_conn_drain(l->conn, 0, deadline);
    }
    CHECK_EQ(rc, AP_ELATE);
    CHECK(ap_now() >= deadline);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN); /* O10: goes on as if nothing had been */
    peer_expect(l, 1, 0, MUCH);
    await(w, l->id, AP_MAIL_WRITE);
}

LINK_TEST(output_drain_taken_back, TCP, HIGH)
{
    stall(l, much());
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN);
    CHECK_OK(ap_conn_disarm_write(l->conn));
    peer_expect(l, 1, 0, MUCH);
    CHECK_EQ(await(w, l->id, AP_MAIL_SENT | AP_MAIL_WRITE), AP_MAIL_SENT);
}

/* Several tasks wait: the first deadline of all comes first, and none is lost with it. */
LINK_TEST(output_drain_of_several_tasks, TCP, HIGH)
{
    stall(l, much());
    int64_t soon, late = ap_now() + 3600 * 1000 * MS;
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), -EAGAIN);
    CHECK_EQ(ap_conn_drain(l->conn, 1, late), -EAGAIN);
    int rc;
    do { /* until it is in time */
        soon = ap_now() + 20 * MS;
        rc = ap_conn_drain(l->conn, 0, soon);
    } while (rc == AP_ELATE);
    CHECK_EQ(rc, -EAGAIN);
    CHECK_EQ(ap_conn_drain(l->conn, 0, late), -EAGAIN); /* does not put it off */
    await(w, l->id, AP_MAIL_WRITE);
    CHECK(ap_now() >= soon);
    CHECK_EQ(ap_conn_drain(l->conn, 0, soon), AP_ELATE);
    CHECK_EQ(ap_conn_drain(l->conn, 0, late), -EAGAIN); /* each looks again, and waits on */
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0);
    peer_expect(l, 1, 0, MUCH);
    await(w, l->id, AP_MAIL_WRITE);
}

/* ---- hold and requeue ------------------------------------------------- */

/* A cancelled send: the driver keeps its hands off between the two calls, the caller copies the
 * rest, and the stream stays byte-exact, as often as it happens. */
LINK_TEST(output_hold_and_requeue, STREAMS, HIGH)
{
    uint64_t seed = 21, heard = 0;
    size_t n = SANITIZED ? 2 * MB : MUCH;
    char *data = (char *)pattern_make(1, 0, n), *old = NULL;
    int64_t left = ap_conn_write(l->conn, data, n);
    while (left > 0) {
        uint64_t part = random_below(&seed, 300 * KB);
        part = part < n - heard ? part : n - heard;
        peer_expect(l, 1, heard, part);
        heard += part;
        left = ap_conn_hold(l->conn);
        CHECK_OK(left);
        kick(l);
        settle(w);
        CHECK_EQ(link_stats(l).buffered_output, left); /* nothing moves */
        char *copy = malloc((size_t)left + 1);
        memcpy(copy, data + n - (size_t)left, (size_t)left);
        memset(data, 0xee, n); /* the caller may do as it likes with it */
        memcpy(data + n - (size_t)left, copy, (size_t)left);
        ap_piece pieces[2] = {{copy, (size_t)left / 3},
                              {copy + left / 3, (size_t)(left - left / 3)}};
        CHECK_EQ(ap_conn_requeue(l->conn, pieces, left ? 2 : 0), left);
        settle(w);
        free(old);
        old = copy;
        if (link_stats(l).buffered_output == 0)
            break;
    }
    peer_expect(l, 1, heard, n - heard);
    CHECK_EQ(ap_conn_drain(l->conn, 0, 0), 0);
    settle(w);
    free(old);
    free(data);
}

/* The rest of a send that was given up goes out in front of what comes later, and only that is
 * waited for, however much of the rest is still there. */
LINK_TEST(output_given_up, STREAMS, HIGH)
{
    size_t later = 100 * KB;
    char *data = (char *)pattern_make(1, 0, MUCH + later);
    int64_t rest = ap_conn_write(l->conn, data, MUCH);
    CHECK(rest > 0);
    settle(w);
    rest = ap_conn_queued(l->conn);
    CHECK_EQ(ap_conn_awaited(l->conn), rest);
    CHECK_OK(ap_conn_give_up(l->conn));
    CHECK_EQ(ap_conn_awaited(l->conn), 0);
    CHECK_EQ(ap_conn_write(l->conn, data + MUCH, later), rest + (int64_t)later);
    CHECK_EQ(ap_conn_awaited(l->conn), later);
    int64_t left = ap_conn_hold(l->conn); /* an own copy of all of it changes nothing */
    ap_piece pieces[1] = {{data + MUCH + later - left, (size_t)left}};
    CHECK_EQ(ap_conn_requeue(l->conn, pieces, 1), left);
    CHECK_EQ(ap_conn_awaited(l->conn), later);
    uint64_t heard = 0;
    while ((left = ap_conn_queued(l->conn)) > 0) {
        CHECK_EQ(ap_conn_awaited(l->conn), left < (int64_t)later ? left : (int64_t)later);
        peer_expect(l, 1, heard, 10 * KB);
        heard += 10 * KB;
        step(w, 0);
    }
    CHECK_EQ(ap_conn_awaited(l->conn), 0);
    CHECK_OK(ap_conn_give_up(l->conn)); /* nothing is there */
    peer_expect(l, 1, heard, MUCH + later - heard);
    settle(w);
    free(data);
}

LINK_TEST(output_requeue_after_failure, TCP, HIGH)
{
    uint8_t *data = pattern_make(1, 0, MUCH);
    stall(l, data);
    CHECK(ap_conn_hold(l->conn) > 0);
    peer_reset(l);
    arrived_event(l, POLLERR);
    settle(w);
    ap_piece piece = {data, 100};
    int64_t left = ap_conn_requeue(l->conn, &piece, 1);
    CHECK(left == 100 || left < 0);
    if (left == 100)
        await(w, l->id, AP_MAIL_SENT);
    free(data);
    CHECK(ap_conn_write(l->conn, "x", 1) < 0);
}

/* ---- shutdown --------------------------------------------------------- */

LINK_TEST(output_shutdown, STREAMS, HIGH)
{
    CHECK_EQ(ap_conn_write(l->conn, "last", 4), 0);
    CHECK_OK(ap_conn_shutdown(l->conn));
    CHECK_OK(ap_conn_shutdown(l->conn));
    CHECK_EQ(ap_conn_write(l->conn, "x", 1), -EPIPE);
    CHECK_EQ(ap_conn_status(l->conn), AP_IS_SHUT);
    char got[8];
    CHECK_EQ(recv(l->peer, got, 4, MSG_WAITALL), 4);
    peer_expect_eof(l);
    peer_say(l, 1, 0, 100); /* the other direction is open */
    expect(l, 1, 0, 100);
}

/* An end in the middle of queued output would cut it off. */
LINK_TEST(output_that_is_queued_refuses_an_end, STREAMS, HIGH)
{
    stall(l, much());
    CHECK_EQ(ap_conn_shutdown(l->conn), -EBUSY);
    CHECK_EQ(ap_conn_detach(l->conn, 0), -EBUSY);
    if (l->conn->type == AP_TCP)
        CHECK_EQ(ap_conn_linger(l->conn, l->pos, 0), -EBUSY);
    CHECK_EQ(ap_conn_status(l->conn), 0);
    peer_expect(l, 1, 0, MUCH);
    await(w, l->id, AP_MAIL_SENT);
    CHECK_OK(ap_conn_shutdown(l->conn));
    peer_expect_eof(l);
}

/* Closing drops what is queued, and the memory is free from then on. */
LINK_TEST(output_close_drops_the_queue, STREAMS, HIGH)
{
    uint8_t *data = pattern_make(1, 0, MUCH);
    stall(l, data);
    CHECK_OK(ap_conn_close(l->conn, 0, 0));
    free(data);
    settle(w);
    CHECK_EQ(mail_of(w, l->id), 0);
}
