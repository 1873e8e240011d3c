/* A benchmark server on bare epoll, the upper bound: nothing between it and the system calls.
 *
 * One thread, level-triggered epoll. A connection has one buffer. What was received goes to its
 * end; the answer is its beginning: everything that has arrived (echo), or the frames that are
 * complete (rpc), sent with one call per batch. As long as an answer is not out, nothing more is
 * read, so a client that does not read cannot make the buffer grow.
 */
#define _GNU_SOURCE

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { HEADER_SIZE = 4, EVENT_BATCH = 256, FIRST_CAPACITY = 64 << 10, FRAME_LIMIT = 64 << 20 };

/* data[0, sent) has gone out, data[sent, ready) is the rest of the answer, data[ready, filled) is
 * the beginning of a frame. */
struct connection {
    int fd;
    bool writing;
    uint8_t *data;
    size_t capacity, sent, ready, filled;
};

static bool framed = true;
static int epoll_fd;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void close_connection(struct connection *conn)
{
    close(conn->fd);
    free(conn->data);
    free(conn);
}

static void accept_connection(int listener)
{
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return;
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct connection *conn = calloc(1, sizeof *conn);
    if (conn == NULL || (conn->data = malloc(FIRST_CAPACITY)) == NULL)
        die("malloc");
    conn->fd = fd;
    conn->capacity = FIRST_CAPACITY;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
}

static size_t frame_size(const uint8_t *header)
{
    uint32_t length;
    memcpy(&length, header, HEADER_SIZE);
    return HEADER_SIZE + (size_t)ntohl(length);
}

/* Moves `ready` behind the last complete frame; false for a frame that is too large. */
static bool find_frames(struct connection *conn)
{
    if (!framed) {
        conn->ready = conn->filled;
        return true;
    }
    while (conn->filled - conn->ready >= HEADER_SIZE) {
        size_t size = frame_size(conn->data + conn->ready);
        if (size > FRAME_LIMIT)
            return false;
        if (size > conn->filled - conn->ready)
            break;
        conn->ready += size;
    }
    return true;
}

static void watch(struct connection *conn, bool writing)
{
    if (conn->writing == writing)
        return;
    conn->writing = writing;
    struct epoll_event event = {.events = writing ? EPOLLOUT : EPOLLIN, .data.ptr = conn};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_MOD, conn->fd, &event) < 0)
        die("epoll_ctl");
}

/* Returns false when the connection is dead. */
static bool send_answer(struct connection *conn)
{
    while (conn->sent < conn->ready) {
        ssize_t n = send(conn->fd, conn->data + conn->sent, conn->ready - conn->sent, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return false;
        if (n < 0)
            break;
        conn->sent += (size_t)n;
    }
    watch(conn, conn->sent < conn->ready);
    if (conn->sent < conn->ready)
        return true;
    memmove(conn->data, conn->data + conn->ready, conn->filled - conn->ready);
    conn->filled -= conn->ready;
    conn->sent = conn->ready = 0;
    return true;
}

static bool read_request(struct connection *conn)
{
    if (conn->filled == conn->capacity) { /* all of it the beginning of one frame */
        conn->capacity *= 2;
        conn->data = realloc(conn->data, conn->capacity);
        if (conn->data == NULL)
            die("realloc");
    }
    ssize_t n = recv(conn->fd, conn->data + conn->filled, conn->capacity - conn->filled, 0);
    if (n <= 0)
        return n < 0 && errno == EAGAIN;
    conn->filled += (size_t)n;
    return find_frames(conn) && send_answer(conn);
}

static int open_listener(void)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 ||
        listen(fd, 4096) < 0 || getsockname(fd, (struct sockaddr *)&address, &length) < 0)
        die("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0)
        die("epoll_ctl");
    printf("PORT %d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

static void serve(int listener)
{
    struct epoll_event events[EVENT_BATCH];
    for (;;) {
        int n = epoll_wait(epoll_fd, events, EVENT_BATCH, -1);
        for (int i = 0; i < n; i++) {
            struct connection *conn = events[i].data.ptr;
            if (conn == NULL)
                accept_connection(listener);
            else if (!(conn->writing ? send_answer(conn) : read_request(conn)))
                close_connection(conn);
        }
    }
}

/* The options of the other servers, in the same form; --loop means nothing here. */
static void parse_arguments(int argc, char **argv)
{
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--workload") == 0)
            framed = strcmp(argv[i + 1], "echo") != 0;
        else if (strcmp(argv[i], "--lifetime") == 0)
            alarm((unsigned)atoi(argv[i + 1]));
    }
}

int main(int argc, char **argv)
{
    parse_arguments(argc, argv);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (epoll_fd < 0)
        die("epoll_create1");
    serve(open_listener());
}
