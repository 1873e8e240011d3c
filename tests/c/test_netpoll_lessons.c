/* What went wrong in netpoll, as far as it is the core's: docs/internals/netpoll-lessons.md. */
#include "fixture.h"

#include <sys/mman.h>

/* L23: between the moment in which the driver remembers a batch and the one in which it serves it,
 * a connection of the batch is closed, and a new one gets its descriptor. */
TEST(lessons_descriptor_reused_within_a_batch)
{
    for (uint64_t round = 1; round <= 50; round++) {
        struct world *w = world_open();
        struct link a = link_open(w, AP_TCP, 64 * KB), b = link_open(w, AP_TCP, 64 * KB);
        settle(w);
        int fd = a.fd;
        peer_say(&a, 1, 0, 100);
        peer_say(&b, 2, 0, 100);
        arrived(&a, 100);
        arrived(&b, 100);
        CHECK_EQ(ap_poller_step(w->poller, 0, 0), 0); /* remembered, none served */
        CHECK(a.conn->slot.on_run && b.conn->slot.on_run);
        link_close(&a);
        struct link c = link_open(w, AP_TCP, 64 * KB);
        CHECK_EQ(c.fd, fd);
        CHECK_EQ(want(&c, 1), -EAGAIN);
        settle(w);
        CHECK_EQ(mail_of(w, c.id), 0);
        CHECK_EQ(link_stats(&c).bytes_received, 0);
        peer_say(&c, 3, 0, 100);
        expect(&c, 3, 0, 100);
        expect(&b, 2, 0, 100);
        link_close(&b);
        link_close(&c);
        world_close(w);
    }
}

/* L20: lengths are 64 bits wide, in one piece and in the sum. */
TEST(lessons_lengths_above_two_gib)
{
    size_t size = ((size_t)1 << 31) + 100;
    char *zeros = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(zeros != MAP_FAILED);
    struct world *w = world_open();
    struct link l = link_open(w, AP_UNIX, 64 * KB);
    ap_piece pieces[] = {{zeros, size}, {zeros, size}, {zeros, size}};
    int64_t left = ap_conn_send(l.conn, pieces, 3);
    int64_t sent = (int64_t)link_stats(&l).bytes_sent;
    CHECK(sent > 0);
    CHECK_EQ(left, 3 * (int64_t)size - sent);
    CHECK_EQ(ap_conn_queued(l.conn), left);
    CHECK_EQ(link_stats(&l).buffered_output, left);
    CHECK_EQ(ap_conn_hold(l.conn), left);
    CHECK_EQ(ap_conn_requeue(l.conn, pieces, 2), 2 * (int64_t)size);
    CHECK_EQ(ap_conn_queued(l.conn), 2 * (int64_t)size);
    link_close(&l);
    world_close(w);
    munmap(zeros, size);
}
