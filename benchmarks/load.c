/* A load generator: one thread, epoll, every byte that comes back is verified.
 *
 * It is compiled twice: with LOAD_TLS it speaks TLS. What differs is how a connection's bytes
 * travel, its channel, in plain.h and tls.h.
 *
 * Model. Each connection owns a ring of `outstanding` frames. A frame is written into the ring once
 * and stays there until its answer has come, so the ring is at the same time the output queue and
 * the expectation: the bytes [sent, filled) are still to be written, the bytes [received, sent) are
 * what the server owes us, in this order. Sending is one writev of at most two pieces, verifying is
 * at most two memcmps, however many frames a batch holds, and neither looks at frame boundaries.
 * The server may cut the stream as it likes; that is why echo and rpc differ only in what a frame
 * looks like.
 *
 * Closed loop: a frame is begun when its slot becomes free, so the load follows the server. The
 * latency of a frame runs from the batch it was begun in to the batch that completed it.
 *
 * Open loop (--rate): a timer begins the frames, one per tick. A frame whose time has come always
 * finds a free slot, or the run fails: no latency is hidden because a slow server delays the
 * requests that would have shown it.
 *
 * A run is warm-up, measurement, drain. Only frames that complete during the measurement count, but
 * every frame that was begun is waited for and verified; a connection that is silent while others
 * go on is found in the drain. Broken connections are counted, closed and not replaced.
 *
 * Counted (--counted): the warm-up and each measurement end after a number of frames, not by time,
 * and with nothing in flight. Then the generator waits to be told whether to measure once more, so
 * that whoever observes the server can begin and end exactly with the measured frames: connecting
 * is before, closing after them.
 */
#define _GNU_SOURCE

#include "histogram.h"
#include "options.h"
#include "pattern.h"
#ifdef LOAD_TLS
#include "tls.h"
#else
#include "plain.h"
#endif

#include <errno.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER_SIZE = 4,
    EVENT_BATCH = 256,
    TICK_MS = 20,            /* how late the end of a phase may be noticed on a silent server */
    OPEN_TICK_MS = 1000,     /* the same with --rate, whose timer wakes us; this one should not */
    RECEIVE_LIMIT = 1 << 20, /* larger reads only spoil the cache */
    REPORTED_ERRORS = 5,
};

enum phase { WARMUP, MEASURE, DRAIN };

/* Positions are bytes since the connection was opened, `begun` and `done` are frames. */
struct connection {
    struct channel channel; /* closed unless is_open; it may keep something for the next one */
    int fd;                 /* the channel's */
    uint32_t index;
    bool is_open, wants_write;
    uint64_t begun, done;
    uint64_t filled, sent, received;
    uint64_t sequence; /* frames of this index, also over reconnects */
    uint8_t *ring;
    uint64_t *started; /* one time per slot of the ring */
};

struct run {
    struct options options;
    int epoll;
    int timer; /* of --rate, else -1 */
    enum phase phase;
    size_t frame, ring_size, receive_size;
    uint8_t *pattern, *receive_buffer;
    struct connection *connections;
    uint64_t in_flight, errors;
    uint64_t allowed;  /* frames that may still be begun in this phase */
    uint64_t answered; /* since the measurement began, those of the drain included */
    uint64_t begun;    /* by the timer of --rate */
    uint64_t events;   /* of the sockets: what counts as progress */
    uint64_t measure_at, drain_at, measured_ns;
    double cpu_seconds;
    struct histogram latencies;
};

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static double own_cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static void *allocate(size_t count, size_t size)
{
    void *memory = calloc(count, size);
    if (memory == NULL)
        die("out of memory");
    return memory;
}

/* ---- frames ---- */

static void write_frame(const struct run *run, struct connection *conn, uint8_t *out)
{
    if (run->options.framed) {
        uint32_t length = htonl((uint32_t)run->options.size);
        memcpy(out, &length, HEADER_SIZE);
        out += HEADER_SIZE;
    }
    uint64_t stamp = pattern_stamp(conn->index, conn->sequence++);
    pattern_write(run->pattern, stamp, out, run->options.size);
}

static bool may_begin(const struct run *run, const struct connection *conn)
{
    const struct options *opt = &run->options;
    return run->phase != DRAIN && run->allowed > 0 && conn->begun - conn->done < opt->outstanding &&
           (opt->requests == 0 || conn->begun < opt->requests);
}

static void begin_frame(struct run *run, struct connection *conn, uint64_t now)
{
    uint64_t slot = conn->begun++ % run->options.outstanding;
    write_frame(run, conn, conn->ring + slot * run->frame);
    conn->started[slot] = now;
    conn->filled += run->frame;
    run->in_flight++;
    run->allowed--;
}

static void begin_frames(struct run *run, struct connection *conn, uint64_t now)
{
    while (run->timer < 0 && may_begin(run, conn))
        begin_frame(run, conn, now);
}

static void finish_frames(struct run *run, struct connection *conn, uint64_t now)
{
    for (; (conn->done + 1) * run->frame <= conn->received; conn->done++) {
        run->in_flight--;
        run->answered += run->phase != WARMUP;
        if (run->phase == MEASURE)
            histogram_record(&run->latencies,
                             now - conn->started[conn->done % run->options.outstanding]);
    }
}

/* The ring's bytes [from, to) as at most two pieces. */
static int ring_pieces(const struct run *run, const struct connection *conn, uint64_t from,
                       uint64_t to, struct iovec pieces[2])
{
    size_t length = (size_t)(to - from);
    size_t start = (size_t)(from % run->ring_size);
    size_t first = length < run->ring_size - start ? length : run->ring_size - start;
    pieces[0] = (struct iovec){conn->ring + start, first};
    pieces[1] = (struct iovec){conn->ring, length - first};
    return first < length ? 2 : 1;
}

/* ---- connections ---- */

static void close_connection(struct connection *conn)
{
    if (conn->is_open)
        channel_close(&conn->channel);
    conn->is_open = false;
}

static void fail_connection(struct run *run, struct connection *conn, const char *why)
{
    if (run->errors++ < REPORTED_ERRORS)
        fprintf(stderr, "load: connection %u, request %llu: %s\n", conn->index,
                (unsigned long long)conn->done, why);
    run->in_flight -= conn->begun - conn->done;
    close_connection(conn);
}

static void open_connection(struct run *run, struct connection *conn)
{
    conn->begun = conn->done = conn->filled = conn->sent = conn->received = 0;
    conn->wants_write = false;
    conn->fd = connect_socket(&run->options.address);
    if (conn->fd < 0) {
        fail_connection(run, conn, strerror(errno));
        return;
    }
    channel_open(&conn->channel, conn->fd);
    conn->is_open = true;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = conn};
    if (epoll_ctl(run->epoll, EPOLL_CTL_ADD, conn->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static void watch_writing(struct run *run, struct connection *conn, bool wanted)
{
    if (conn->wants_write == wanted)
        return;
    conn->wants_write = wanted;
    struct epoll_event event = {.events = EPOLLIN | (wanted ? EPOLLOUT : 0u), .data.ptr = conn};
    if (epoll_ctl(run->epoll, EPOLL_CTL_MOD, conn->fd, &event) < 0)
        die("epoll_ctl: %s", strerror(errno));
}

static void send_frames(struct run *run, struct connection *conn)
{
    while (conn->sent < conn->filled) {
        struct iovec pieces[2];
        int count = ring_pieces(run, conn, conn->sent, conn->filled, pieces);
        ssize_t n = channel_send(&conn->channel, pieces, count);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN) {
            fail_connection(run, conn, channel_error());
            return;
        }
        if (n < 0)
            break;
        conn->sent += (uint64_t)n;
    }
    watch_writing(run, conn, conn->sent < conn->filled && channel_wants_room(&conn->channel));
}

/* Returns NULL, or what is wrong with the bytes. */
static const char *verify(struct run *run, struct connection *conn, size_t n)
{
    if (n > conn->sent - conn->received)
        return "more bytes than were asked for";
    struct iovec pieces[2];
    ring_pieces(run, conn, conn->received, conn->received + n, pieces);
    const uint8_t *got = run->receive_buffer;
    if (memcmp(got, pieces[0].iov_base, pieces[0].iov_len) != 0 ||
        memcmp(got + pieces[0].iov_len, pieces[1].iov_base, pieces[1].iov_len) != 0)
        return "an answer differs from its request";
    conn->received += n;
    return NULL;
}

/* Returns false when nothing was there, or the connection has failed. */
static bool receive_frames(struct run *run, struct connection *conn)
{
    bool found = false;
    do {
        ssize_t n = channel_receive(&conn->channel, run->receive_buffer, run->receive_size);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        const char *wrong = n < 0    ? channel_error()
                            : n == 0 ? "closed by the server"
                                     : verify(run, conn, (size_t)n);
        if (wrong != NULL) {
            fail_connection(run, conn, wrong);
            return false;
        }
        found = true;
    } while (channel_has_more(&conn->channel));
    return found;
}

static void replace_if_used_up(struct run *run, struct connection *conn)
{
    if (!run->options.reconnect || conn->done < run->options.requests || run->phase == DRAIN)
        return;
    close_connection(conn);
    open_connection(run, conn);
}

static void handle_event(struct run *run, struct connection *conn, uint32_t events)
{
    uint64_t now = now_ns();
    run->events++;
    if ((events & ~(uint32_t)EPOLLOUT) != 0 && receive_frames(run, conn)) {
        finish_frames(run, conn, now);
        replace_if_used_up(run, conn);
    }
    if (!conn->is_open)
        return;
    begin_frames(run, conn, now);
    send_frames(run, conn);
}

/* ---- the timer of --rate ---- */

static void start_timer(struct run *run)
{
    run->timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    uint64_t period = (uint64_t)(1e9 / run->options.rate);
    struct timespec ts = {(time_t)(period / 1000000000u), (long)(period % 1000000000u)};
    struct itimerspec ticks = {.it_interval = ts, .it_value = ts};
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (run->timer < 0 || timerfd_settime(run->timer, 0, &ticks, NULL) < 0 ||
        epoll_ctl(run->epoll, EPOLL_CTL_ADD, run->timer, &event) < 0)
        die("timerfd: %s", strerror(errno));
}

static void handle_ticks(struct run *run)
{
    uint64_t ticks = 0;
    if (read(run->timer, &ticks, sizeof ticks) < 0 && errno != EAGAIN)
        die("timerfd: %s", strerror(errno));
    for (uint64_t now = now_ns(); ticks > 0 && run->phase != DRAIN; ticks--) {
        struct connection *conn = &run->connections[run->begun++ % run->options.connections];
        if (!conn->is_open)
            continue;
        if (!may_begin(run, conn)) {
            fail_connection(run, conn, "too many unanswered requests at this rate");
            continue;
        }
        begin_frame(run, conn, now);
        send_frames(run, conn);
    }
}

/* ---- the run ---- */

static void begin_measurement(struct run *run, uint64_t now)
{
    run->phase = MEASURE;
    run->measure_at = now;
    run->drain_at =
        run->options.counted ? UINT64_MAX : now + (uint64_t)(run->options.seconds * 1e9);
    run->answered = 0;
    memset(&run->latencies, 0, sizeof run->latencies);
    run->cpu_seconds = own_cpu_seconds();
}

static void announce_measurement(void)
{
    puts("MEASURING");
    fflush(stdout);
}

static void end_measurement(struct run *run, uint64_t now)
{
    run->phase = DRAIN;
    run->measured_ns = now - run->measure_at;
    run->cpu_seconds = own_cpu_seconds() - run->cpu_seconds;
}

static void advance_phase(struct run *run, uint64_t now)
{
    if (run->phase == WARMUP && now >= run->measure_at) {
        announce_measurement();
        begin_measurement(run, now);
    }
    if (run->phase == MEASURE && now >= run->drain_at)
        end_measurement(run, now);
}

static void fail_unfinished(struct run *run)
{
    for (uint32_t i = 0; i < run->options.connections; i++) {
        struct connection *conn = &run->connections[i];
        if (conn->is_open && conn->done < conn->begun)
            fail_connection(run, conn, "stalled");
    }
}

static int wait_events(struct run *run, struct epoll_event *events, int timeout_ms)
{
    int n = epoll_wait(run->epoll, events, EVENT_BATCH, timeout_ms);
    if (n < 0 && errno != EINTR)
        die("epoll_wait: %s", strerror(errno));
    return n < 0 ? 0 : n;
}

static void open_all(struct run *run)
{
    for (uint32_t i = 0; i < run->options.connections; i++)
        open_connection(run, &run->connections[i]);
    uint64_t now = now_ns();
    run->measure_at =
        run->options.counted ? UINT64_MAX : now + (uint64_t)(run->options.warmup * 1e9);
    advance_phase(run, now);
    if (run->options.rate > 0)
        start_timer(run);
}

static void begin_all(struct run *run)
{
    run->allowed = run->options.counted ? run->options.counted : UINT64_MAX;
    for (uint32_t i = 0; i < run->options.connections; i++) {
        struct connection *conn = &run->connections[i];
        if (conn->is_open) {
            begin_frames(run, conn, now_ns());
            send_frames(run, conn);
        }
    }
}

static bool is_running(const struct run *run)
{
    bool open = run->timer >= 0 && run->phase != DRAIN && run->errors == 0;
    return open || run->in_flight > 0;
}

/* Until nothing is in flight and nothing more is to be begun. */
static void exchange(struct run *run)
{
    struct epoll_event events[EVENT_BATCH];
    begin_all(run);
    uint64_t seen = run->events, progress_at = now_ns();
    while (is_running(run)) {
        int n = wait_events(run, events, run->timer < 0 ? TICK_MS : OPEN_TICK_MS);
        uint64_t now = now_ns();
        advance_phase(run, now);
        for (int i = 0; i < n; i++)
            if (events[i].data.ptr == NULL)
                handle_ticks(run);
            else
                handle_event(run, events[i].data.ptr, events[i].events);
        if (run->events != seen) {
            seen = run->events;
            progress_at = now;
        } else if (now > progress_at + (uint64_t)(run->options.stall * 1e9)) {
            fail_unfinished(run);
        }
    }
}

/* Silence: nothing was asked, so any event is a byte too many or a close. */
static void stay_idle(struct run *run)
{
    struct epoll_event events[EVENT_BATCH];
    uint64_t end = now_ns() + (uint64_t)(run->options.idle * 1e9);
    for (uint64_t now = now_ns(); now < end; now = now_ns()) {
        int n = wait_events(run, events, (int)((end - now) / 1000000u) + 1);
        for (int i = 0; i < n; i++)
            fail_connection(run, events[i].data.ptr, "not silent while idle");
    }
}

static void print_result(const struct run *run)
{
    const struct histogram *hist = &run->latencies;
    double seconds = (double)run->measured_ns / 1e9;
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"rps\": %.1f, \"p50_us\": %.2f, "
           "\"p99_us\": %.2f, \"max_us\": %.2f, \"errors\": %llu, \"cpu_seconds\": %.6f, "
           "\"answered\": %llu}\n",
           (unsigned long long)hist->total, seconds,
           seconds > 0 ? (double)hist->total / seconds : 0.0,
           (double)histogram_quantile(hist, 0.50) / 1e3,
           (double)histogram_quantile(hist, 0.99) / 1e3, (double)hist->max / 1e3,
           (unsigned long long)run->errors, run->cpu_seconds, (unsigned long long)run->answered);
    fflush(stdout);
}

static void run_by_time(struct run *run)
{
    exchange(run);
    if (run->phase == MEASURE) /* all requests were made before the time was up */
        end_measurement(run, now_ns());
    print_result(run);
    if (run->options.idle > 0)
        stay_idle(run);
}

static bool is_told_to_go_on(void)
{
    int letter;
    do
        letter = getchar();
    while (letter != '\n' && letter != EOF);
    return letter == '\n';
}

static void run_counted(struct run *run)
{
    exchange(run);
    announce_measurement();
    while (is_told_to_go_on()) {
        begin_measurement(run, now_ns());
        exchange(run);
        end_measurement(run, now_ns());
        print_result(run);
    }
}

static void prepare(struct run *run)
{
    const struct options *opt = &run->options;
    channel_prepare(opt);
    run->frame = opt->size + (opt->framed ? HEADER_SIZE : 0);
    run->ring_size = run->frame * opt->outstanding;
    /* One byte more than can be owed, so that a byte too many is seen at once. */
    run->receive_size = (run->ring_size < RECEIVE_LIMIT ? run->ring_size : RECEIVE_LIMIT) + 1;
    run->receive_buffer = allocate(run->receive_size, 1);
    run->pattern = pattern_create(opt->size);
    if (run->pattern == NULL)
        die("out of memory");
    run->connections = allocate(opt->connections, sizeof *run->connections);
    for (uint32_t i = 0; i < opt->connections; i++) {
        struct connection *conn = &run->connections[i];
        conn->index = i;
        conn->ring = allocate(run->ring_size, 1);
        conn->started = allocate(opt->outstanding, sizeof *conn->started);
    }
    run->timer = -1;
    run->epoll = epoll_create1(EPOLL_CLOEXEC);
    if (run->epoll < 0)
        die("epoll_create1: %s", strerror(errno));
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

int main(int argc, char **argv)
{
    static struct run run; /* large: the histogram is part of it */
    run.options = parse_options(argc, argv);
    prepare(&run);
    open_all(&run);
    if (run.options.counted)
        run_counted(&run);
    else
        run_by_time(&run);
    for (uint32_t i = 0; i < run.options.connections; i++)
        close_connection(&run.connections[i]);
    return run.errors == 0 ? 0 : 1;
}
