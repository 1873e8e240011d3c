/* System call wrappers: they retry on EINTR, return -errno, and let tests inject faults. */
#ifndef ANYPOLL_SYSIO_H
#define ANYPOLL_SYSIO_H

#include "common.h"

#include <pthread.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>

/* *offered: the size of iov; on return, how much of it the kernel was offered. */
AP_MUST_CHECK ssize_t ap_sys_recv(int fd, const struct iovec *iov, size_t count, size_t *offered);
AP_MUST_CHECK ssize_t ap_sys_send(int fd, const struct iovec *iov, size_t count, size_t *offered);

/* Descriptors that a message carried, which are now ours. */
typedef struct {
    int count;
    bool truncated; /* the message was longer than its buffer */
    int fds[AP_FDS_MOST];
} ap_rights;
/* The same with descriptors, for UNIX sockets only. */
AP_MUST_CHECK ssize_t ap_sys_recv_rights(int fd, const struct iovec *iov, size_t count,
                                         size_t *offered, ap_rights *rights);
AP_MUST_CHECK ssize_t ap_sys_send_rights(int fd, const char *data, size_t *offered, const int *fds,
                                         int count);
/* The length of the next message, which stays in the kernel. */
AP_MUST_CHECK ssize_t ap_sys_next_length(int fd);
/* Whether the peer has ended its side and nothing is waiting any more. */
bool ap_sys_at_end(int fd);

/* The accepted descriptor is non-blocking, close-on-exec, and owned. */
AP_MUST_CHECK int ap_sys_accept(int fd, ap_accepted *out);

AP_MUST_CHECK int ap_sys_epoll_create(void);
AP_MUST_CHECK int ap_sys_epoll_ctl(int epfd, int op, int fd, uint32_t events, uint64_t data);
struct epoll_event;
AP_MUST_CHECK int ap_sys_epoll_wait(int epfd, struct epoll_event *events, int max, int timeout_ms);
AP_MUST_CHECK int ap_sys_eventfd(void);
/* Make an event descriptor readable, and read it. */
void ap_sys_signal(int efd);
void ap_sys_drain(int efd);
enum { AP_SLEEP_WOKEN = 1, AP_SLEEP_OTHER = 2 };
/* Sleeps until a moment (AP_FOREVER: without end), or until efd is readable (AP_SLEEP_WOKEN), or
 * other, which may be -1 (AP_SLEEP_OTHER). Returns those; -errno. */
AP_MUST_CHECK int ap_sys_sleep(int efd, int other, int64_t until);

/* Whether the calling thread has to share one core with everybody else. */
bool ap_sys_one_core(void);

/* SO_ERROR (> 0), which asking clears; 0: none. */
int ap_sys_socket_error(int fd);
void ap_sys_drain_error_queue(int fd);
/* At this moment, whatever epoll has told. */
bool ap_sys_readable(int fd);
bool ap_sys_writable(int fd);
/* Whether the peer has ended its side, or the connection was reset, read or not. */
bool ap_sys_hung_up(int fd);
/* Whether a message waits, even an empty one; false for one that is followed by the end. */
bool ap_sys_message_waits(int fd);
/* Bytes waiting to be received, or to be sent for the first time; or -errno. */
AP_MUST_CHECK int ap_sys_unread(int fd);
AP_MUST_CHECK int ap_sys_unsent(int fd);
AP_MUST_CHECK int ap_sys_shutdown(int fd, int how);
/* Makes the close send an RST. */
void ap_sys_linger_now(int fd);
AP_MUST_CHECK int ap_sys_nodelay(int fd);
void ap_sys_close(int fd);

/* Zeroed; NULL: no memory. */
AP_MUST_CHECK void *ap_sys_alloc(size_t size);
/* The same with any contents. */
AP_MUST_CHECK void *ap_sys_alloc_dirty(size_t size);
AP_MUST_CHECK void *ap_sys_map(size_t size);
void ap_sys_unmap(void *memory, size_t size);

AP_MUST_CHECK int ap_sys_atfork(void (*before)(void), void (*in_parent)(void),
                                void (*in_child)(void));
/* The thread takes no signals. It may name itself, in 15 bytes: what top and debuggers show. */
void ap_sys_thread_name(const char *name);
AP_MUST_CHECK int ap_sys_thread(pthread_t *thread, void *(*run)(void *), void *arg);

#endif
