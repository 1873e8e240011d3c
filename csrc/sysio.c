/* System call wrappers: they retry on EINTR, return -errno, and let tests inject faults.
 *
 * Every call of the core that can fail for outside reasons goes through here
 * (AP_CALL_*), in the build that ships: what the fault tests exercise is what runs
 * in production. While no fault is set, that costs one load. Exempt are calls that
 * fail only through misuse: mutexes, pthread_join, clock_gettime, pthread_sigmask.
 */
#include "sysio.h"

#include "clock.h"
#include "faults.h"
#include "owned.h"

#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ---- faults ----------------------------------------------------------- */

/* The error to fail with, or 0. A fault without an error shortens what is offered, and
 * says so: no event follows a transfer that the kernel did not cut short. */
static int fault_transfer(int call, const struct iovec **iov, size_t *count, struct iovec *one,
                          size_t *offered)
{
    size_t limit;
    int error = ap_fault_next(call, &limit);
    if (error >= 0 || *count == 0)
        return error > 0 ? error : 0;
    one->iov_base = (*iov)->iov_base;
    one->iov_len = (*iov)->iov_len < limit ? (*iov)->iov_len : limit;
    *iov = one;
    *count = 1;
    *offered = one->iov_len;
    return 0;
}

/* Evaluates call until it is not interrupted; the result is >= 0 or -errno. */
#define RETRY(result, kind, call)                 \
    do {                                          \
        int injected = ap_fault_error(kind);      \
        (result) = injected ? -injected : (call); \
        if (!injected && (result) < 0)            \
            (result) = -errno;                    \
    } while ((result) == -EINTR)

/* ---- transfers -------------------------------------------------------- */

/* MSG_DONTWAIT, although sockets are non-blocking: the holder of the raw socket could
 * make it blocking, and that must not stop a poller. */
ssize_t ap_sys_recv(int fd, const struct iovec *iov, size_t count, size_t *offered)
{
    ssize_t got;
    do {
        struct iovec one;
        const struct iovec *into = iov;
        size_t n = count;
        int error = fault_transfer(AP_CALL_READ, &into, &n, &one, offered);
        struct msghdr message = {.msg_iov = (struct iovec *)into, .msg_iovlen = n};
        if (error)
            got = -1;
        else if (n == 1) /* the same, but 0.1 us faster */
            got = recv(fd, into->iov_base, into->iov_len, MSG_DONTWAIT);
        else
            got = recvmsg(fd, &message, MSG_DONTWAIT);
        if (got < 0)
            got = error ? -error : -errno;
    } while (got == -EINTR);
    return got;
}

ssize_t ap_sys_send(int fd, const struct iovec *iov, size_t count, size_t *offered)
{
    ssize_t sent;
    do {
        struct iovec one;
        const struct iovec *from = iov;
        size_t n = count;
        int error = fault_transfer(AP_CALL_WRITE, &from, &n, &one, offered);
        struct msghdr message = {.msg_iov = (struct iovec *)from, .msg_iovlen = n};
        if (error)
            sent = -1;
        else if (n == 1)
            sent = send(fd, from->iov_base, from->iov_len, MSG_DONTWAIT | MSG_NOSIGNAL);
        else
            sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            sent = error ? -error : -errno;
    } while (sent == -EINTR);
    return sent;
}

/* ---- transfers with descriptors --------------------------------------- */

#ifndef SCM_PIDFD
#define SCM_PIDFD 0x04
#endif

/* Room for all descriptors of a message, and for what socket options set by others
 * (SO_PASSCRED, SO_PASSSEC, SO_TIMESTAMP, ...) put beside them: without it the kernel
 * would drop descriptors. */
typedef union {
    struct cmsghdr header;
    char room[CMSG_SPACE(AP_FDS_MOST * sizeof(int)) + 1024];
} control_buffer;

static void take_rights(struct msghdr *message, ap_rights *rights)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
        bool pidfd = c->cmsg_type == SCM_PIDFD; /* nobody asks for it, but it is open */
        if (c->cmsg_level != SOL_SOCKET || (c->cmsg_type != SCM_RIGHTS && !pidfd))
            continue;
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            if (fd >= 0 && (pidfd || rights->count == AP_FDS_MOST)) {
                ap_sys_close(fd);
            } else if (fd >= 0) {
                ap_fd_own(fd);
                rights->fds[rights->count++] = fd;
            }
        }
    }
}

ssize_t ap_sys_recv_rights(int fd, const struct iovec *iov, size_t count, size_t *offered,
                           ap_rights *rights)
{
    ssize_t got;
    control_buffer control;
    rights->count = 0;
    rights->truncated = false;
    do {
        struct iovec one;
        const struct iovec *into = iov;
        size_t n = count;
        int error = fault_transfer(AP_CALL_READ, &into, &n, &one, offered);
        struct msghdr message = {.msg_iov = (struct iovec *)into,
                                 .msg_iovlen = n,
                                 .msg_control = &control,
                                 .msg_controllen = sizeof control};
        got = error ? -1 : recvmsg(fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got < 0) {
            got = error ? -error : -errno;
        } else {
            rights->truncated = (message.msg_flags & MSG_TRUNC) != 0;
            take_rights(&message, rights);
        }
    } while (got == -EINTR);
    return got;
}

ssize_t ap_sys_send_rights(int fd, const char *data, size_t *offered, const int *fds, int count)
{
    ssize_t sent;
    control_buffer control;
    struct iovec whole = {.iov_base = (char *)data, .iov_len = *offered};
    do {
        struct iovec one;
        const struct iovec *from = &whole;
        size_t n = 1;
        int error = fault_transfer(AP_CALL_WRITE, &from, &n, &one, offered);
        struct msghdr message = {.msg_iov = (struct iovec *)from, .msg_iovlen = n};
        if (count > 0) {
            control.header = (struct cmsghdr){.cmsg_level = SOL_SOCKET,
                                              .cmsg_type = SCM_RIGHTS,
                                              .cmsg_len = CMSG_LEN((size_t)count * sizeof(int))};
            memcpy(CMSG_DATA(&control.header), fds, (size_t)count * sizeof(int));
            message.msg_control = &control;
            message.msg_controllen = CMSG_SPACE((size_t)count * sizeof(int));
        }
        sent = error ? -1 : sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0)
            sent = error ? -error : -errno;
    } while (sent == -EINTR);
    return sent;
}

ssize_t ap_sys_next_length(int fd)
{
    ssize_t n;
    char nothing;
    RETRY(n, AP_CALL_READ, recv(fd, &nothing, 0, MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT));
    return n;
}

static int state_of(int fd, int events)
{
    struct pollfd at = {.fd = fd, .events = (short)events};
    int rc;
    RETRY(rc, AP_CALL_POLL, poll(&at, 1, 0));
    return rc == 1 ? at.revents : 0;
}

bool ap_sys_readable(int fd)
{
    return state_of(fd, POLLIN) & POLLIN;
}

bool ap_sys_writable(int fd)
{
    return state_of(fd, POLLOUT) & POLLOUT;
}

bool ap_sys_hung_up(int fd)
{
    return state_of(fd, POLLRDHUP) & (POLLRDHUP | POLLHUP);
}

bool ap_sys_at_end(int fd)
{
    return (state_of(fd, POLLRDHUP) & POLLRDHUP) && ap_sys_unread(fd) == 0;
}

bool ap_sys_message_waits(int fd)
{
    return state_of(fd, POLLIN | POLLRDHUP) == POLLIN; /* the end is readable, too */
}

/* ---- accepting -------------------------------------------------------- */

static void note_address(const struct sockaddr_storage *from, socklen_t size, ap_accepted *out)
{
    out->family = from->ss_family;
    if (from->ss_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)from;
        out->port = ntohs(in->sin_port);
        memcpy(out->address, &in->sin_addr, sizeof in->sin_addr);
    } else if (from->ss_family == AF_INET6) {
        const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)from;
        out->port = ntohs(in6->sin6_port);
        out->scope = in6->sin6_scope_id;
        memcpy(out->address, &in6->sin6_addr, sizeof in6->sin6_addr);
    } else {
        out->port = size > sizeof from->ss_family;
    }
}

int ap_sys_accept(int fd, ap_accepted *out)
{
    struct sockaddr_storage from;
    socklen_t size;
    int got;
    RETRY(got, AP_CALL_ACCEPT,
          (size = sizeof from, memset(&from, 0, sizeof from),
           accept4(fd, (struct sockaddr *)&from, &size, SOCK_NONBLOCK | SOCK_CLOEXEC)));
    if (got < 0)
        return got;
    memset(out, 0, sizeof *out);
    out->fd = got;
    note_address(&from, size, out);
    ap_fd_own(got);
    return 0;
}

/* ---- epoll and eventfd ------------------------------------------------ */

int ap_sys_epoll_create(void)
{
    int fd;
    RETRY(fd, AP_CALL_EPOLL_CREATE, epoll_create1(EPOLL_CLOEXEC));
    if (fd >= 0)
        ap_fd_own(fd);
    return fd;
}

int ap_sys_epoll_ctl(int epfd, int op, int fd, uint32_t events, uint64_t data)
{
    struct epoll_event event = {.events = events, .data.u64 = data};
    int rc;
    RETRY(rc, AP_CALL_EPOLL_CTL, epoll_ctl(epfd, op, fd, &event));
    return rc;
}

int ap_sys_epoll_wait(int epfd, struct epoll_event *events, int max, int timeout_ms)
{
    int injected = ap_fault_error(AP_CALL_EPOLL_WAIT);
    int n = injected ? -1 : epoll_wait(epfd, events, max, timeout_ms);
    if (n >= 0)
        return n;
    int error = injected ? injected : errno;
    return error == EINTR ? 0 : -error; /* the caller recomputes its timeout */
}

int ap_sys_eventfd(void)
{
    int fd;
    RETRY(fd, AP_CALL_EVENTFD, eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
    if (fd >= 0)
        ap_fd_own(fd);
    return fd;
}

/* EAGAIN means 2^64 - 2 signals that nobody has read (a poller never reads): starts over,
 * because a sleeper needs an edge. An open event descriptor has no other error. */
void ap_sys_signal(int efd)
{
    uint64_t one = 1;
    ssize_t rc;
    for (;;) {
        RETRY(rc, AP_CALL_SIGNAL, write(efd, &one, sizeof one));
        if (rc != -EAGAIN)
            return;
        ap_sys_drain(efd);
    }
}

/* EAGAIN: nothing is there. After any other error it is still readable, and the loop
 * comes again. */
void ap_sys_drain(int efd)
{
    uint64_t count;
    ssize_t rc;
    RETRY(rc, AP_CALL_DRAIN, read(efd, &count, sizeof count));
    (void)rc;
}

int ap_sys_sleep(int efd, int other, int64_t until)
{
    struct pollfd at[] = {{.fd = efd, .events = POLLIN}, {.fd = other, .events = POLLIN}};
    int64_t left = until == AP_FOREVER ? 0 : until - ap_now();
    if (left < 0)
        left = 0;
    struct timespec timeout = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
    int injected = ap_fault_error(AP_CALL_SLEEP);
    int n = injected ? -1 : ppoll(at, 2, until == AP_FOREVER ? NULL : &timeout, NULL);
    if (n < 0) {
        int error = injected ? injected : errno;
        return error == EINTR ? 0 : -error; /* the caller recomputes its timeout */
    }
    return (at[0].revents ? AP_SLEEP_WOKEN : 0) | (at[1].revents ? AP_SLEEP_OTHER : 0);
}

bool ap_sys_one_core(void)
{
    cpu_set_t cores; /* EINVAL: the machine has more than this has room for */
    return sched_getaffinity(0, sizeof cores, &cores) == 0 && CPU_COUNT(&cores) == 1;
}

/* ---- sockets ---------------------------------------------------------- */

/* The socket's pending error (> 0), which asking clears; 0 if none. Being unable to ask is
 * an error too. */
int ap_sys_socket_error(int fd)
{
    int error = 0, rc;
    socklen_t size = sizeof error;
    RETRY(rc, AP_CALL_SOCKOPT, getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size));
    return rc < 0 ? -rc : error;
}

void ap_sys_drain_error_queue(int fd)
{
    char control[512];
    struct msghdr message = {.msg_control = control, .msg_controllen = sizeof control};
    for (int i = 0; i < 64; i++) {
        ssize_t rc;
        message.msg_controllen = sizeof control;
        RETRY(rc, AP_CALL_ERRQUEUE, recvmsg(fd, &message, MSG_ERRQUEUE | MSG_DONTWAIT));
        if (rc < 0)
            return;
    }
}

int ap_sys_unread(int fd)
{
    int n = 0, rc;
    RETRY(rc, AP_CALL_IOCTL, ioctl(fd, FIONREAD, &n));
    return rc < 0 ? rc : n;
}

/* Not SIOCOUTQ, which also counts what is only waiting to be acknowledged (measured: 40 ms
 * for every close). */
int ap_sys_unsent(int fd)
{
    int n = 0, rc;
    RETRY(rc, AP_CALL_IOCTL, ioctl(fd, SIOCOUTQNSD, &n));
    return rc < 0 ? rc : n;
}

int ap_sys_shutdown(int fd, int how)
{
    int rc;
    RETRY(rc, AP_CALL_SHUTDOWN, shutdown(fd, how));
    return rc;
}

/* If this fails, the close is an ordinary one. */
void ap_sys_linger_now(int fd)
{
    struct linger now = {.l_onoff = 1, .l_linger = 0};
    int rc;
    RETRY(rc, AP_CALL_SOCKOPT, setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now));
    (void)rc;
}

int ap_sys_nodelay(int fd)
{
    int on = 1, rc;
    RETRY(rc, AP_CALL_SOCKOPT, setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on));
    return rc;
}

/* Not retried: on Linux the descriptor is gone whatever close returns, and the number may
 * already be someone else's. */
void ap_sys_close(int fd)
{
    ap_fd_disown(fd);
    int rc = close(fd);
    if (ap_fault_error(AP_CALL_CLOSE))
        rc = -1;
    (void)rc;
}

/* ---- memory, threads -------------------------------------------------- */

void *ap_sys_alloc(size_t size)
{
    return ap_fault_error(AP_CALL_ALLOC) ? NULL : calloc(1, size);
}

void *ap_sys_alloc_dirty(size_t size)
{
    return ap_fault_error(AP_CALL_ALLOC) ? NULL : malloc(size);
}

void *ap_sys_map(size_t size)
{
    if (ap_fault_error(AP_CALL_MAP))
        return NULL;
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

/* ENOMEM: cutting a piece out of a larger mapping would make too many mappings
 * (vm.max_map_count). Its addresses are lost then, but not the memory behind them. */
void ap_sys_unmap(void *memory, size_t size)
{
    if (ap_fault_error(AP_CALL_UNMAP) || munmap(memory, size) < 0)
        madvise(memory, size, MADV_DONTNEED);
}

int ap_sys_atfork(void (*before)(void), void (*in_parent)(void), void (*in_child)(void))
{
    int error = ap_fault_error(AP_CALL_ATFORK);
    return error ? -error : -pthread_atfork(before, in_parent, in_child);
}

void ap_sys_thread_name(const char *name)
{
    pthread_setname_np(pthread_self(), name);
}

/* Signals are blocked before the thread exists, so that not even its first instruction
 * can take one from Python's main thread. */
int ap_sys_thread(pthread_t *thread, void *(*run)(void *), void *arg)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = ap_fault_error(AP_CALL_THREAD);
    if (!error)
        error = pthread_create(thread, NULL, run, arg);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -error;
}
