/* probes.h - descriptors that are sent away, and tell when they are gone. */
#ifndef PROBES_H
#define PROBES_H

#include "fixture.h"

/* The read end of a pipe; the write end is sent away, and no copy stays. */
struct probe {
    int reading;
};

static inline void peer_send_fds(struct link *l, const void *data, size_t n, const int *fds,
                                 int count)
{
    size_t offered = n;
    CHECK_EQ(ap_sys_send_rights(l->peer, data, &offered, fds, count), n);
}

/* Sends data with count write ends of one pipe. */
static inline struct probe peer_send_probes(struct link *l, const char *data, int count)
{
    int ends[2], fds[AP_FDS_MOST];
    CHECK(pipe2(ends, O_CLOEXEC) == 0);
    for (int i = 0; i < count; i++)
        fds[i] = ends[1];
    peer_send_fds(l, data, strlen(data), fds, count);
    close(ends[1]);
    return (struct probe){.reading = ends[0]};
}

static inline struct probe peer_send_probe(struct link *l, const char *data)
{
    return peer_send_probes(l, data, 1);
}

/* Whether all copies of the write end are closed. */
static inline bool gone(struct probe p)
{
    struct pollfd at = {.fd = p.reading, .events = POLLIN};
    return poll(&at, 1, 0) == 1 && (at.revents & POLLHUP);
}

static inline void probe_end(struct probe p)
{
    CHECK(gone(p));
    close(p.reading);
}

#endif
