/* sysio.c: results are -errno, interruptions are retried, and the seam does what it says. */
#include "fixture.h"

#include <pthread.h>
#include <sys/eventfd.h>

static int fds[2];
static size_t offered; /* by the last transfer */

static void open_pair(void)
{
    sockets_of(AP_UNIX, fds);
}

static void close_pair(void)
{
    close(fds[0]);
    close(fds[1]);
}

static ssize_t send_text(const char *text)
{
    struct iovec iov = {.iov_base = (char *)text, .iov_len = strlen(text)};
    offered = iov.iov_len;
    return ap_sys_send(fds[1], &iov, 1, &offered);
}

static ssize_t receive_text(char *out, size_t size)
{
    struct iovec iov = {.iov_base = out, .iov_len = size};
    offered = size;
    return ap_sys_recv(fds[0], &iov, 1, &offered);
}

TEST(sysio_transfers_return_bytes_or_errno)
{
    char out[8];
    open_pair();
    CHECK_EQ(receive_text(out, 8), -EAGAIN);
    CHECK_EQ(send_text("hello"), 5);
    CHECK_EQ(receive_text(out, 8), 5);
    CHECK_BYTES(out, "hello", 5);
    shutdown(fds[1], SHUT_WR);
    CHECK_EQ(receive_text(out, 8), 0);
    CHECK_EQ(send_text("x"), -EPIPE); /* and no SIGPIPE */
    CHECK_EQ(ap_sys_recv(-1, NULL, 0, &offered), -EBADF);
    close_pair();
}

/* L21 */
TEST(sysio_interruptions_are_retried)
{
    char out[8];
    open_pair();
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, EINTR, 0, 100, 0));
    CHECK_EQ(send_text("abc"), 3);
    CHECK_OK(ap_fault_set(AP_CALL_READ, EINTR, 0, 100, 0));
    CHECK_EQ(receive_text(out, 8), 3);
    CHECK_BYTES(out, "abc", 3);
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_CREATE, EINTR, 0, 10, 0));
    CHECK_OK(ap_fault_set(AP_CALL_EVENTFD, EINTR, 0, 10, 0));
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_CTL, EINTR, 0, 10, 0));
    int epfd = ap_sys_epoll_create(), efd = ap_sys_eventfd();
    CHECK_OK(epfd);
    CHECK_OK(efd);
    CHECK_OK(ap_sys_epoll_ctl(epfd, EPOLL_CTL_ADD, efd, EPOLLIN, 1));
    ap_fault_clear();
    ap_sys_close(efd);
    ap_sys_close(epfd);
    close_pair();
}

TEST(sysio_fault_skips_then_fails_so_often)
{
    open_pair();
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, ECONNRESET, 2, 3, 0));
    for (int i = 0; i < 2; i++)
        CHECK_EQ(send_text("x"), 1);
    for (int i = 0; i < 3; i++)
        CHECK_EQ(send_text("x"), -ECONNRESET);
    CHECK_EQ(send_text("x"), 1);
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, EAGAIN, 0, -1, 0));
    for (int i = 0; i < 50; i++)
        CHECK_EQ(send_text("x"), -EAGAIN);
    ap_fault_clear();
    CHECK_EQ(send_text("x"), 1);
    CHECK_EQ(ap_fault_set(AP_CALLS, EIO, 0, 1, 0), -EINVAL);
    CHECK_EQ(ap_fault_set(-1, EIO, 0, 1, 0), -EINVAL);
    close_pair();
}

TEST(sysio_fault_shortens_transfers)
{
    char out[8];
    open_pair();
    CHECK_OK(ap_fault_set(AP_CALL_WRITE, 0, 0, 1, 2));
    CHECK_EQ(send_text("abcdef"), 2);
    CHECK_EQ(offered, 2); /* so that nobody waits for an edge that does not come */
    CHECK_EQ(send_text("cdef"), 4);
    CHECK_OK(ap_fault_set(AP_CALL_READ, 0, 0, 2, 1));
    CHECK_EQ(receive_text(out, 8), 1);
    CHECK_EQ(offered, 1);
    CHECK_EQ(receive_text(out + 1, 7), 1);
    CHECK_EQ(receive_text(out + 2, 6), 4);
    CHECK_BYTES(out, "abcdef", 6);
    ap_fault_clear();
    close_pair();
}

TEST(sysio_every_call_can_fail)
{
    pthread_t thread;
    struct epoll_event event;
    ap_accepted accepted;
    for (int call = 0; call < AP_CALLS; call++)
        CHECK_OK(ap_fault_set(call, EMFILE, 0, -1, 0));
    CHECK_EQ(ap_sys_accept(0, &accepted), -EMFILE);
    CHECK_EQ(ap_sys_epoll_create(), -EMFILE);
    CHECK_EQ(ap_sys_epoll_ctl(0, EPOLL_CTL_ADD, 0, 0, 0), -EMFILE);
    CHECK_EQ(ap_sys_epoll_wait(0, &event, 1, -1), -EMFILE);
    CHECK_EQ(ap_sys_eventfd(), -EMFILE);
    CHECK(ap_sys_alloc(1) == NULL);
    CHECK(ap_sys_map(4096) == NULL);
    CHECK_EQ(ap_sys_thread(&thread, NULL, NULL), -EMFILE);
    CHECK_EQ(ap_sys_atfork(NULL, NULL, NULL), -EMFILE);
    CHECK_EQ(ap_sys_shutdown(0, SHUT_WR), -EMFILE);
    CHECK_EQ(ap_sys_unread(0), -EMFILE);
    CHECK_EQ(ap_sys_unsent(0), -EMFILE);
    CHECK_EQ(ap_sys_socket_error(0), EMFILE);
    CHECK(!ap_sys_at_end(0));
    ap_fault_clear();
}

/* An event descriptor that takes no more is emptied, so that the sleeper gets an edge. */
TEST(sysio_signal_of_a_full_event_descriptor)
{
    struct epoll_event event;
    uint64_t most = UINT64_MAX - 1;
    int efd = ap_sys_eventfd(), epfd = ap_sys_epoll_create();
    CHECK_OK(ap_sys_epoll_ctl(epfd, EPOLL_CTL_ADD, efd, EPOLLIN | EPOLLET, 1));
    CHECK_EQ(write(efd, &most, sizeof most), sizeof most);
    CHECK_EQ(ap_sys_epoll_wait(epfd, &event, 1, 0), 1);
    CHECK_EQ(ap_sys_epoll_wait(epfd, &event, 1, 0), 0);
    ap_sys_signal(efd);
    CHECK_EQ(ap_sys_epoll_wait(epfd, &event, 1, 0), 1);
    ap_sys_close(efd);
    ap_sys_close(epfd);
}

/* The number may be somebody else's already. */
TEST(sysio_close_is_not_repeated)
{
    open_pair();
    CHECK_OK(ap_fault_set(AP_CALL_CLOSE, EINTR, 0, -1, 0));
    ap_sys_close(fds[0]);
    CHECK_EQ(ap_fault_hits(AP_CALL_CLOSE), 1);
    CHECK_EQ(fcntl(fds[0], F_GETFD), -1);
    ap_fault_clear();
    close(fds[1]);
}

/* Addresses that cannot be given back keep no memory. */
TEST(sysio_unmap_that_fails_gives_the_pages_back)
{
    uint8_t *memory = ap_sys_map(64 * KB);
    memset(memory, 1, 64 * KB);
    CHECK_OK(ap_fault_set(AP_CALL_UNMAP, ENOMEM, 0, 1, 0));
    ap_sys_unmap(memory, 64 * KB);
    CHECK_EQ(memory[0], 0);
    ap_sys_unmap(memory, 64 * KB);
    ap_fault_clear();
}

/* The caller computes its timeout anew. */
TEST(sysio_interrupted_wait_finds_nothing)
{
    struct epoll_event event;
    int epfd = ap_sys_epoll_create();
    CHECK_OK(ap_fault_set(AP_CALL_EPOLL_WAIT, EINTR, 0, 1, 0));
    CHECK_EQ(ap_sys_epoll_wait(epfd, &event, 1, -1), 0);
    ap_fault_clear();
    ap_sys_close(epfd);
}

static bool has_flag(int fd, int command, int flag)
{
    return (fcntl(fd, command) & flag) != 0;
}

/* O20 */
TEST(sysio_descriptors_are_close_on_exec_and_nonblocking)
{
    struct sockaddr_in address;
    int listening = listen_tcp(4, &address), peer = connect_tcp(&address);
    ap_accepted accepted;
    int rc = -EAGAIN;
    for (int64_t end = ap_now() + PATIENCE; rc == -EAGAIN && ap_now() < end;)
        rc = ap_sys_accept(listening, &accepted);
    CHECK_OK(rc);
    int made[] = {accepted.fd, ap_sys_epoll_create(), ap_sys_eventfd()};
    for (int i = 0; i < 3; i++) {
        CHECK(has_flag(made[i], F_GETFD, FD_CLOEXEC));
        if (i != 1) /* an epoll descriptor is never read */
            CHECK(has_flag(made[i], F_GETFL, O_NONBLOCK));
        ap_sys_close(made[i]);
    }
    CHECK_EQ(accepted.family, AF_INET);
    CHECK_EQ(accepted.address[0], 127);
    CHECK(accepted.port != 0);
    close(listening);
    close(peer);
}

/* An epoll_wait may not keep a signal away from Python's main thread. */
static void *report_mask(void *arg)
{
    pthread_sigmask(SIG_SETMASK, NULL, arg);
    return NULL;
}

TEST(sysio_threads_block_all_signals)
{
    sigset_t mask, mine;
    pthread_t thread;
    CHECK_OK(ap_sys_thread(&thread, report_mask, &mask));
    pthread_join(thread, NULL);
    int signals[] = {SIGINT, SIGTERM, SIGCHLD, SIGALRM, SIGUSR1, SIGHUP};
    for (size_t i = 0; i < AP_ARRAY_SIZE(signals); i++)
        CHECK(sigismember(&mask, signals[i]));
    pthread_sigmask(SIG_SETMASK, NULL, &mine);
    CHECK(!sigismember(&mine, SIGINT));
}

TEST(sysio_signal_and_drain)
{
    int efd = ap_sys_eventfd();
    ap_sys_drain(efd); /* nothing there: does not block */
    ap_sys_signal(efd);
    ap_sys_signal(efd);
    CHECK(peek_events(efd, POLLIN));
    ap_sys_drain(efd);
    CHECK(!peek_events(efd, POLLIN));
    ap_sys_close(efd);
}

/* A blocking descriptor does not stop a poller. */
TEST(sysio_transfers_do_not_block)
{
    char out[8];
    open_pair();
    for (int i = 0; i < 2; i++)
        CHECK_OK(fcntl(fds[i], F_SETFL, 0));
    CHECK_EQ(receive_text(out, 8), -EAGAIN);
    while (send_text("some more bytes until the buffer is full") > 0)
        ;
    CHECK_EQ(send_text("x"), -EAGAIN);
    close_pair();
}
