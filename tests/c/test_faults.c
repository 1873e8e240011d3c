/* faults.c, and with it every system call of the core: each fails in each of its ways, the first
 * time, later, and from then on. The outcome is the error that was injected, or it was retried; a
 * crash, a hang or a leak fails the test (scenario.h).
 */
#include "scenario.h"

struct site {
    int call;
    const char *name;
    int errors[16]; /* of the man page, as far as they are not our own misuse */
};

static const struct site sites[] = {
    {AP_CALL_ATFORK, "pthread_atfork", {ENOMEM}}, /* first: once it has worked it is not repeated */
    /* recvmsg(2), tcp(7), unix(7) */
    {AP_CALL_READ,
     "recvmsg",
     {EINTR, EAGAIN, ECONNREFUSED, ECONNRESET, ENOMEM, ENOTCONN, ETIMEDOUT, EHOSTUNREACH,
      ENETUNREACH, ENOBUFS, EIO}},
    /* sendmsg(2) */
    {AP_CALL_WRITE,
     "sendmsg",
     {EINTR, EAGAIN, ECONNRESET, EPIPE, ENOBUFS, ENOMEM, ENOTCONN, EMSGSIZE, EACCES, EALREADY,
      EDESTADDRREQ, ETIMEDOUT, EHOSTUNREACH, ENETDOWN, ETOOMANYREFS}},
    /* accept(2) */
    {AP_CALL_ACCEPT,
     "accept4",
     {EINTR, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM, EPROTO, EINVAL, EOPNOTSUPP,
      ENOSR, ESOCKTNOSUPPORT, EPROTONOSUPPORT, ETIMEDOUT, ENETDOWN}},
    {AP_CALL_EPOLL_CREATE, "epoll_create1", {EINTR, EMFILE, ENFILE, ENOMEM}},
    {AP_CALL_EPOLL_CTL, "epoll_ctl", {EINTR, ENOMEM, ENOSPC, EEXIST, ENOENT, EPERM, ELOOP}},
    {AP_CALL_EPOLL_WAIT, "epoll_wait", {EINTR}},
    {AP_CALL_EVENTFD, "eventfd", {EINTR, EMFILE, ENFILE, ENODEV, ENOMEM}},
    {AP_CALL_THREAD, "pthread_create", {EAGAIN, EPERM}},
    {AP_CALL_SIGNAL, "write", {EINTR, EAGAIN}},
    {AP_CALL_DRAIN, "read", {EINTR, EAGAIN}},
    {AP_CALL_SHUTDOWN, "shutdown", {EINTR, ENOTCONN}},
    {AP_CALL_SOCKOPT, "getsockopt", {EINTR, ENOMEM, ENOBUFS}},
    {AP_CALL_IOCTL, "ioctl", {EINTR, EINVAL, ENOTTY}},
    {AP_CALL_POLL, "poll", {EINTR, ENOMEM}},
    {AP_CALL_ERRQUEUE, "recvmsg(MSG_ERRQUEUE)", {EINTR, EAGAIN, ENOMEM}},
    {AP_CALL_CLOSE, "close", {EINTR, EIO, ENOSPC, EDQUOT}},
    {AP_CALL_UNMAP, "munmap", {ENOMEM}},
};

#define FOR_EACH(site) \
    for (const struct site *site = sites; site < sites + AP_ARRAY_SIZE(sites); site++)

static void fails_with_a_thread(const struct site *site, int error)
{
    scenario(site->call, error, 0, 1, 0, true);
    scenario(site->call, error, 4, 2, 0, true);
}

static void each_error(void (*try)(const struct site *, int))
{
    FOR_EACH(site)
    {
        for (size_t i = 0; i < AP_ARRAY_SIZE(site->errors) && site->errors[i]; i++)
            try(site, site->errors[i]);
    }
}

/* So that no row of the table is about nothing. */
TEST(faults_every_call_is_reached)
{
    FOR_EACH(site)
    {
        if (scenario(site->call, site->errors[0], 0, 1, 0, true) == 0)
            CHECK_FAIL("%s is not called", site->name);
    }
}

TEST(faults_of_each_call_beside_a_thread)
{
    each_error(fails_with_a_thread);
}

/* L21 */
TEST(faults_storms_of_interruptions)
{
    FOR_EACH(site)
    {
        for (size_t i = 0; i < AP_ARRAY_SIZE(site->errors); i++) {
            if (site->errors[i] == EINTR)
                CHECK(scenario(site->call, EINTR, 0, 1000, 0, true) > 0);
        }
    }
}

TEST(faults_short_transfers)
{
    static const size_t limits[] = {1, 7, 100, 5000};
    for (size_t i = 0; i < AP_ARRAY_SIZE(limits); i++) {
        for (int call = AP_CALL_READ; call <= AP_CALL_WRITE; call++) {
            CHECK(scenario(call, 0, 0, 300, limits[i], false) > 0);
            CHECK(scenario(call, 0, 2, 3, limits[i], false) > 0);
            CHECK(scenario(call, 0, 0, 300, limits[i], true) > 0);
        }
    }
}

/* The first allocation fails, then the second, ..., until a run makes it through. */
static void without_memory(int call, int times, bool threaded)
{
    int at = 0;
    while (scenario(call, ENOMEM, at, times, 0, threaded) > 0)
        at++;
    CHECK(at > (call == AP_CALL_ALLOC ? 15 : 3));
}

TEST(faults_no_memory_beside_a_thread)
{
    without_memory(AP_CALL_ALLOC, 1, true);
    without_memory(AP_CALL_MAP, 1, true);
}

#ifndef __SANITIZE_THREAD__ /* a driver and a loop in one thread have no races */

static bool is_retried(int error)
{
    return error == EINTR || error == EAGAIN;
}

/* From the first call on, then from a later one on: once, and from then on for ever, or as often
 * as a call that is retried could bear it. */
static void fails_everywhere(const struct site *site, int error)
{
    static const int skips[] = {0, 1, 2, 3, 5, 9, 17, 40};
    size_t count = site->call == AP_CALL_ACCEPT ? 2 : AP_ARRAY_SIZE(skips); /* which pauses */
    int more = is_retried(error) ? 3 : -1;
    for (size_t i = 0; i < count; i++) {
        if (scenario(site->call, error, skips[i], 1, 0, false) == 0)
            return; /* it is not called that often */
        scenario(site->call, error, skips[i], more, 0, false);
    }
}

TEST(faults_of_each_call)
{
    each_error(fails_everywhere);
}

TEST(faults_no_memory_at_each_allocation)
{
    without_memory(AP_CALL_ALLOC, 1, false);
    without_memory(AP_CALL_MAP, 1, false);
}

TEST(faults_no_memory_from_each_allocation_on)
{
    without_memory(AP_CALL_ALLOC, -1, false);
    without_memory(AP_CALL_MAP, -1, false);
}

#endif

/* The idle timeout ends a connection whose socket does not let itself be shut down. */
LINK_TEST(faults_of_the_idle_end, TCP, HIGH)
{
    CHECK_OK(ap_fault_set(AP_CALL_SHUTDOWN, ENOTCONN, 0, 1, 0));
    CHECK_OK(ap_conn_set_idle(l->conn, MS));
    await(w, l->id, AP_MAIL_IDLE);
    CHECK_EQ(ap_fault_hits(AP_CALL_SHUTDOWN), 1);
    ap_fault_clear();
    CHECK_EQ(want(l, 1), AP_EIDLE);
}

TEST(faults_are_counted)
{
    CHECK_EQ(ap_fault_hits(-1), -EINVAL);
    CHECK_EQ(ap_fault_hits(AP_CALLS), -EINVAL);
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 1, 2, 0));
    for (int hits = 0; hits < 4; hits++) {
        free(ap_sys_alloc(1));
        CHECK_EQ(ap_fault_hits(AP_CALL_ALLOC), hits < 2 ? hits : 2);
    }
    CHECK_OK(ap_fault_set(AP_CALL_ALLOC, ENOMEM, 0, 1, 0));
    CHECK_EQ(ap_fault_hits(AP_CALL_ALLOC), 0);
    ap_fault_clear();
}
