/* Race tests: several threads at once.
 *
 * The threads are the poller's, the loop's (the test's own), peers, and one that drops references
 * as a garbage collector does.
 *
 * Each connection carries a pattern of its own, so that a byte of another one is noticed (L14). A
 * loop that waits has every link armed, so a wake-up that is lost ends the test.
 */
#include "fixture.h"

#include <pthread.h>

static uint64_t seed_of(uint64_t n)
{
    uint64_t seed = n * 0x9e3779b97f4a7c15u + 1;
    for (int i = 0; i < 4; i++)
        random_next(&seed);
    return seed;
}

static void spawn(pthread_t *thread, void *(*run)(void *), void *arg)
{
    CHECK(pthread_create(thread, NULL, run, arg) == 0);
}

static void pause_a_little(uint64_t *seed)
{
    uint64_t n = random_below(seed, 8);
    if (n == 0)
        sched_yield();
    for (volatile uint64_t i = 0; i < (n << random_below(seed, 8)); i++)
        ;
}

/* As want_until, of a connection that another thread may close at any time: also between the two
 * calls that make one. */
static int64_t want_until_closing(struct link *l, size_t n, int64_t deadline)
{
    int64_t result = ap_conn_read(l->conn, l->pos, n, 0, deadline, NULL, 0);
    if (result < 0 || !(result >> AP_NEW_BLOCK_SHIFT))
        return result < 0 ? result : 0;
    ap_view view;
    int rc = ap_conn_block(l->conn, l->pos, &view);
    if (rc < 0)
        return rc;
    if (rc == 1) {
        if (l->block)
            ap_block_unref(l->block);
        l->block = view.block;
    }
    l->pos = view.start;
    return 0;
}

/* ---- storms: many short connections, numbers and slots reused at once -- */

#define LINKS 12
#define PEERS 2
#define ANSWER 1000 /* bytes that the loop sends on each connection */
#define ANSWERS ((uint64_t)1 << 40)

enum ending { CLOSE_AT_ONCE, SHUT_AND_LISTEN, RESET, ENDINGS };

struct job {
    int fd;
    uint64_t stream;
    size_t total;
    enum ending ending;
};

struct storm {
    struct world *w;
    int kind;
    int jobs[2]; /* a pipe: its end is the end of the storm */
};

static void listen_to_the_end(const struct job *job)
{
    char buffer[2 * ANSWER];
    size_t heard = 0;
    ssize_t got;
    while ((got = recv(job->fd, buffer, sizeof buffer, 0)) > 0) {
        pattern_check(buffer, job->stream + ANSWERS, heard, (size_t)got);
        heard += (size_t)got;
    }
    CHECK(got == 0 || errno == ECONNRESET);
    CHECK(heard <= ANSWER);
}

static void play_peer(const struct job *job, uint64_t *seed)
{
    uint8_t *bytes = pattern_make(job->stream, 0, job->total);
    fcntl(job->fd, F_SETFL, 0);
    for (size_t done = 0; done < job->total;) {
        size_t n = 1 + random_below(seed, 3000);
        n = n < job->total - done ? n : job->total - done;
        ssize_t sent = send(job->fd, bytes + done, n, MSG_NOSIGNAL);
        if (sent < 0)
            break; /* the loop has closed it */
        done += (size_t)sent;
        pause_a_little(seed);
    }
    free(bytes);
    if (job->ending == SHUT_AND_LISTEN) {
        shutdown(job->fd, SHUT_WR);
        listen_to_the_end(job);
    }
    if (job->ending == RESET)
        close_reset(job->fd);
    else
        close(job->fd);
}

static void *peer_thread(void *arg)
{
    struct storm *s = arg;
    struct job job;
    uint64_t seed = seed_of((uintptr_t)&job);
    while (read(s->jobs[0], &job, sizeof job) == sizeof job)
        play_peer(&job, &seed);
    return NULL;
}

struct visitor {
    struct link l;
    struct job job;
    size_t got;
    bool done;
};

static void visitor_open(struct storm *s, struct visitor *v, uint64_t stream, uint64_t *seed)
{
    int fds[2];
    sockets_of(s->kind, fds);
    *v = (struct visitor){.l = link_fd(s->w, s->kind, 16 * KB, fds[0], -1)};
    v->job = (struct job){.fd = fds[1], .stream = stream};
    v->job.total = random_below(seed, random_below(seed, 4) ? 3000 : 40000);
    v->job.ending = (enum ending)random_below(seed, ENDINGS);
    uint8_t *answer = pattern_make(stream + ANSWERS, 0, ANSWER);
    bool early = random_below(seed, 2);
    if (!early) {
        link_register(&v->l);
        CHECK(ap_conn_write(v->l.conn, (char *)answer, ANSWER) <= 0);
    }
    CHECK_EQ(write(s->jobs[1], &v->job, sizeof v->job), sizeof v->job);
    if (early) { /* L02: data comes before, while and after it is registered */
        link_register(&v->l);
        CHECK(ap_conn_write(v->l.conn, (char *)answer, ANSWER) <= 0);
    }
    free(answer);
}

/* A RST, or on UNIX a close with our answer unread, takes bytes along. */
static void visitor_ended(struct storm *s, const struct visitor *v, int64_t rc)
{
    bool abrupt = v->job.ending != SHUT_AND_LISTEN;
    CHECK(rc == AP_EEOF || (abrupt && (rc == -ECONNRESET || rc == -EPIPE)));
    if (rc == AP_EEOF && (s->kind == AP_UNIX || !abrupt))
        CHECK_EQ(v->got, v->job.total);
}

/* Reads what is there; true while the link is armed. */
static bool visitor_read(struct storm *s, struct visitor *v, uint64_t *seed)
{
    for (;;) {
        size_t left = v->job.total - v->got, n = 1 + random_below(seed, 2000);
        n = left == 0 ? 1 : n < left ? n : left;
        int64_t deadline = random_below(seed, 4) ? 0 : ap_now() + 100 * 1000 * MS;
        int64_t rc = want_until(&v->l, n, deadline);
        if (rc == -EAGAIN)
            return random_below(seed, 40) != 0; /* else it is closed with the wait armed */
        if (rc < 0) {
            visitor_ended(s, v, rc);
            return false;
        }
        CHECK(left > 0);
        pattern_check(link_at(&v->l), v->job.stream, v->got, n);
        v->l.pos += (uint32_t)n;
        v->got += n;
    }
}

static void storm(int kind, int connections)
{
    struct storm s = {.w = world_open(), .kind = kind};
    struct visitor visitors[LINKS];
    pthread_t peers[PEERS];
    uint64_t seed = seed_of((uint64_t)kind), opened = 0;
    CHECK(pipe2(s.jobs, O_CLOEXEC) == 0);
    world_start(s.w);
    for (int i = 0; i < PEERS; i++)
        spawn(&peers[i], peer_thread, &s);
    for (int i = 0; i < LINKS; i++)
        visitor_open(&s, &visitors[i], ++opened, &seed);
    int open_now = LINKS;
    int64_t over = ap_now() + 2 * LITMUS;
    while (open_now > 0) {
        bool changed = false;
        for (int i = 0; i < LINKS; i++) {
            struct visitor *v = &visitors[i];
            if (v->done || visitor_read(&s, v, &seed))
                continue;
            link_close(&v->l);
            v->done = opened >= (uint64_t)connections || ap_now() > over;
            open_now -= v->done;
            if (!v->done)
                visitor_open(&s, v, ++opened, &seed);
            changed = true;
        }
        struct pollfd door = {.fd = ap_hub_fd(s.w->hub), .events = POLLIN};
        if (!changed && poll(&door, 1, 20000) != 1)
            CHECK_FAIL("no wake-up, with %d links armed", open_now);
        collect(s.w);
    }
    close(s.jobs[1]);
    for (int i = 0; i < PEERS; i++)
        pthread_join(peers[i], NULL);
    close(s.jobs[0]);
    world_close(s.w);
}

/* L12, L13, L14, L17, L23, L32: close storms from both sides. */
TEST(races_storm_of_unix_connections)
{
    storm(AP_UNIX, ROUNDS(20000));
}

TEST(races_storm_of_tcp_connections)
{
    storm(AP_TCP, ROUNDS(8000));
}

/* ---- every verb against every other ----------------------------------- */

#define FEW 6

struct brawl {
    struct world *w;
    struct link links[FEW];
    _Atomic bool over;
    uint64_t seed;
};

static char junk[512 * 1024]; /* constant: whatever is queued stays valid */

static void *brawl_peer(void *arg)
{
    struct brawl *b = arg;
    uint64_t seed = seed_of(b->seed + 1);
    char buffer[4096];
    for (int i = 0; i < 150; i++) {
        int fd = b->links[random_below(&seed, FEW)].peer;
        switch (random_below(&seed, 10)) {
        case 0: shutdown(fd, SHUT_WR); break;
        case 1: shutdown(fd, SHUT_RDWR); break;
        case 2:
        case 3:
        case 4:
            while (recv(fd, buffer, sizeof buffer, MSG_DONTWAIT) > 0)
                ;
            break;
        case 5: send(fd, "!", 1, MSG_OOB | MSG_NOSIGNAL | MSG_DONTWAIT); break;
        default: send(fd, junk, random_below(&seed, 30000), MSG_NOSIGNAL | MSG_DONTWAIT); break;
        }
        pause_a_little(&seed);
    }
    return NULL;
}

/* Closing is for any thread. */
static void *brawl_closer(void *arg)
{
    struct brawl *b = arg;
    uint64_t seed = seed_of(b->seed + 2);
    ap_poller_stats s;
    for (int i = 0; i < FEW; i++) {
        for (uint64_t k = random_below(&seed, 60); k > 0; k--)
            pause_a_little(&seed);
        CHECK_OK(ap_poller_statistics(b->w->poller, &s));
        int rc = ap_conn_close(b->links[i].conn, (int)random_below(&seed, 2), 0);
        CHECK(rc == 0 || rc == -EBADF);
    }
    return NULL;
}

static void brawl_output(struct link *l, uint64_t *seed)
{
    switch (random_below(seed, 4)) {
    case 0: ap_conn_write(l->conn, junk, random_below(seed, sizeof junk)); break;
    case 1: ap_conn_drain(l->conn, (int)random_below(seed, 2), ap_now() + 2 * MS); break;
    case 2: ap_conn_disarm_write(l->conn); break;
    default: {
        int64_t left = ap_conn_hold(l->conn);
        ap_piece rest = {junk, left > 0 ? (size_t)left : 0};
        if (left >= 0 && (size_t)left <= sizeof junk)
            ap_conn_requeue(l->conn, &rest, left > 0);
        else if (left > 0) {
            rest.size = sizeof junk;
            ap_conn_requeue(l->conn, &rest, 1);
        }
    }
    }
}

static void brawl_input(struct link *l, uint64_t *seed)
{
    size_t n = 1 + random_below(seed, random_below(seed, 5) ? 5000 : 600000);
    int64_t deadline = random_below(seed, 2) ? 0 : ap_now() + (int64_t)random_below(seed, 3) * MS;
    switch (random_below(seed, 8)) {
    case 0: ap_conn_find(l->conn, l->pos, "zzz", 3, n, 0, deadline, NULL, 0); break;
    case 1: ap_conn_disarm_read(l->conn); break;
    case 2: link_drop_block(l); break;
    case 3: ap_conn_set_idle(l->conn, (int64_t)random_below(seed, 3) * MS); break;
    case 4: ap_conn_status(l->conn); break;
    case 5: ap_conn_linger(l->conn, l->pos, deadline); break;
    default:
        if (want_until_closing(l, n, deadline) == 0) {
            volatile uint8_t byte = link_at(l)[n - 1];
            (void)byte;
            l->pos += (uint32_t)n;
        }
    }
}

static void brawl(int kind, uint64_t seed)
{
    struct brawl b = {.w = world_open(), .seed = seed};
    pthread_t peer, closer;
    for (int i = 0; i < FEW; i++)
        b.links[i] = link_open(b.w, kind, 32 * KB);
    world_start(b.w);
    spawn(&peer, brawl_peer, &b);
    spawn(&closer, brawl_closer, &b);
    for (int i = 0; i < 200; i++) {
        struct link *l = &b.links[random_below(&seed, FEW)];
        if (random_below(&seed, 3))
            brawl_input(l, &seed);
        else
            brawl_output(l, &seed);
        if (random_below(&seed, 4) == 0)
            collect(b.w);
    }
    pthread_join(closer, NULL);
    pthread_join(peer, NULL);
    for (int i = 0; i < FEW; i++)
        link_close(&b.links[i]);
    world_close(b.w);
}

/* L39 */
TEST(races_every_verb_at_once)
{
    RACE(i, 1200)
    brawl(i % 2 ? AP_TCP : AP_UNIX, seed_of((uint64_t)i + 1000));
}

/* ---- views that die in another thread --------------------------------- */

#define VIEWS 128

struct view {
    ap_block *block;
    uint32_t pos;
    size_t n;
    uint64_t from;
};

struct viewers {
    struct view views[VIEWS];
    _Atomic size_t put, got; /* a ring of one producer and one consumer */
    _Atomic bool over;
};

static void *collector(void *arg)
{
    struct viewers *v = arg;
    for (;;) {
        bool over = atomic_load(&v->over);
        size_t got = atomic_load(&v->got);
        if (got == atomic_load(&v->put)) {
            if (over)
                return NULL;
            sched_yield();
            continue;
        }
        struct view view = v->views[got % VIEWS];
        pattern_check(ap_block_at(view.block, view.pos), 5, view.from, view.n);
        ap_block_unref(view.block);
        atomic_store(&v->got, got + 1);
    }
}

static void keep_view(struct viewers *v, struct link *l, size_t n, uint64_t from)
{
    size_t put = atomic_load(&v->put);
    if (put - atomic_load(&v->got) == VIEWS)
        return;
    ap_block_ref(l->block);
    v->views[put % VIEWS] = (struct view){l->block, l->pos, n, from};
    atomic_store(&v->put, put + 1);
}

struct speaker {
    int fd;
    size_t total;
};

static void *speak(void *arg)
{
    struct speaker *s = arg;
    uint64_t seed = seed_of(77);
    fcntl(s->fd, F_SETFL, 0);
    for (size_t done = 0; done < s->total;) {
        size_t n = 1 + random_below(&seed, random_below(&seed, 3) ? 2000 : 100000);
        n = n < s->total - done ? n : s->total - done;
        uint8_t *bytes = pattern_make(5, done, n);
        for (size_t sent = 0; sent < n;) {
            ssize_t part = send(s->fd, bytes + sent, n - sent, MSG_NOSIGNAL);
            CHECK(part > 0);
            sent += (size_t)part;
        }
        free(bytes);
        done += n;
    }
    return NULL;
}

/* Blocks are returned, and rewound, while the driver appends; what a view shows never changes. */
LINK_TEST(races_views_die_in_another_thread, STREAMS, 64 * KB)
{
    static struct viewers v;
    memset(&v, 0, sizeof v);
    struct speaker s = {.fd = l->peer, .total = SANITIZED ? 5 * MB : 100 * MB};
    pthread_t threads[2];
    uint64_t seed = seed_of(9);
    world_start(w);
    spawn(&threads[0], collector, &v);
    spawn(&threads[1], speak, &s);
    for (size_t read = 0; read < s.total;) {
        size_t n = 1 + random_below(&seed, 20000);
        n = n < s.total - read ? n : s.total - read;
        CHECK_EQ(want_wait(l, n), 0);
        keep_view(&v, l, n, read);
        l->pos += (uint32_t)n;
        read += n;
        if (random_below(&seed, 4) == 0)
            link_drop_block(l);
    }
    link_close(l);
    atomic_store(&v.over, true);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
}

/* The last view dies while the connection is closed and its slot freed. */
struct last_view {
    ap_block *block;
    _Atomic bool go;
};

static void *drop_last(void *arg)
{
    struct last_view *v = arg;
    while (!atomic_load_explicit(&v->go, memory_order_relaxed))
        ;
    ap_block_unref(v->block);
    return NULL;
}

TEST(races_last_view_against_close)
{
    struct world *w = world_open();
    world_start(w);
    RACE(i, 3000)
    {
        struct link l = link_open(w, AP_UNIX, HIGH);
        struct last_view v = {0};
        pthread_t thread;
        peer_say(&l, 1, 0, 100);
        CHECK_EQ(want_wait(&l, 100), 0);
        v.block = l.block;
        l.block = NULL;
        spawn(&thread, drop_last, &v);
        atomic_store_explicit(&v.go, true, memory_order_relaxed);
        if (i % 3 == 0) { /* detached: what was read ahead goes with the handle */
            int fd = ap_conn_detach(l.conn, 0);
            CHECK_OK(fd);
            close(fd);
        }
        link_close(&l);
        pthread_join(thread, NULL);
    }
    world_close(w);
}

/* ---- the end of a loop ------------------------------------------------ */

struct killing {
    struct world *w;
    struct link links[FEW];
    uint64_t seed;
};

static void *keep_sending(void *arg)
{
    struct killing *k = arg;
    uint64_t seed = k->seed;
    for (int i = 0; i < 200; i++) {
        send(k->links[random_below(&seed, FEW)].peer, junk, 1 + random_below(&seed, 100),
             MSG_NOSIGNAL | MSG_DONTWAIT);
        pause_a_little(&seed);
    }
    return NULL;
}

static void *close_some(void *arg)
{
    struct killing *k = arg;
    uint64_t seed = k->seed + 1;
    for (int i = 0; i < FEW; i += 2) {
        pause_a_little(&seed);
        ap_conn_close(k->links[i].conn, 0, 0);
    }
    return NULL;
}

static void kill_while_posting(struct world *w, uint64_t seed)
{
    struct killing k = {.w = w, .seed = seed};
    pthread_t threads[2];
    int fds[2];
    for (int i = 0; i < FEW; i++) {
        k.links[i] = link_open(w, i % 2 ? AP_TCP : AP_UNIX, HIGH);
        int64_t rc = want_until(&k.links[i], 1, ap_now() + (i % 3) * MS + 1);
        CHECK(rc == -EAGAIN || rc == AP_ELATE);
    }
    spawn(&threads[0], keep_sending, &k);
    spawn(&threads[1], close_some, &k);
    for (uint64_t i = random_below(&seed, 30); i > 0; i--) {
        collect(w);
        struct link *l = &k.links[random_below(&seed, FEW)];
        want_until_closing(l, 1, 0);
        pause_a_little(&seed);
    }
    CHECK_OK(ap_hub_kill(w->hub));
    sockets_of(AP_UNIX, fds); /* takes numbers that have become free */
    for (int i = 0; i < FEW; i++) {
        CHECK_EQ(ap_conn_status(k.links[i].conn) & AP_IS_CLOSED, AP_IS_CLOSED);
    }
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < FEW; i++)
        link_close(&k.links[i]);
    CHECK_EQ(unread_in_kernel(fds[0]), 0);
    CHECK_EQ(unread_in_kernel(fds[1]), 0);
    close(fds[0]);
    close(fds[1]);
    ap_hub_unref(w->hub);
    CHECK_OK(ap_hub_new(&w->hub));
}

TEST(races_hub_is_killed_while_others_post)
{
    struct world *w = world_open();
    world_start(w);
    RACE(i, 1500)
    kill_while_posting(w, seed_of((uint64_t)i));
    world_close(w);
}

/* ---- deadlines against data ------------------------------------------- */

struct tosser {
    int fd;
    _Atomic uint64_t sent;
    _Atomic bool over;
};

static void *toss(void *arg)
{
    struct tosser *t = arg;
    uint64_t seed = seed_of(31);
    while (!atomic_load(&t->over)) {
        for (uint64_t i = random_below(&seed, 60); i > 0; i--)
            pause_a_little(&seed);
        uint64_t at = atomic_load(&t->sent);
        uint8_t bytes[10];
        for (uint64_t i = 0; i < 10; i++)
            bytes[i] = pattern(6, at + i);
        if (send(t->fd, bytes, 10, MSG_NOSIGNAL | MSG_DONTWAIT) == 10)
            atomic_store(&t->sent, at + 10);
    }
    return NULL;
}

/* L02, L31, L41: a wait ends with the bytes or with the timeout, never without either. */
LINK_TEST(races_deadlines_against_data, UNIX, HIGH)
{
    struct tosser t = {.fd = l->peer};
    pthread_t thread;
    uint64_t seed = seed_of(32), read = 0, timeouts = 0;
    world_start(w);
    spawn(&thread, toss, &t);
    RACE(i, 20000)
    {
        size_t n = 1 + random_below(&seed, 30);
        int64_t deadline = ap_now() + 1 + (int64_t)random_below(&seed, 2000000);
        int64_t rc = want_until(l, n, deadline);
        if (rc == -EAGAIN) {
            await(w, l->id, AP_MAIL_READ);
            rc = want_until(l, n, deadline);
        }
        if (rc == AP_ELATE) {
            CHECK(ap_now() >= deadline);
            timeouts++;
            continue;
        }
        CHECK_EQ(rc, 0);
        pattern_check(link_at(l), 6, read, n);
        l->pos += (uint32_t)n;
        read += n;
    }
    atomic_store(&t.over, true);
    pthread_join(thread, NULL);
    CHECK_EQ(stats(w).timeouts, timeouts);
}

/* ---- output that is held while the driver sends ------------------------ */

struct listener_thread {
    int fd;
    size_t total;
};

static void *hear_all(void *arg)
{
    struct listener_thread *t = arg;
    static char buffer[32 * 1024];
    uint64_t seed = seed_of(41);
    fcntl(t->fd, F_SETFL, 0);
    for (size_t heard = 0; heard < t->total;) {
        ssize_t got = recv(t->fd, buffer, 1 + random_below(&seed, sizeof buffer), 0);
        CHECK(got > 0);
        pattern_check(buffer, 8, heard, (size_t)got);
        heard += (size_t)got;
    }
    return NULL;
}

/* A cancelled send takes its memory back at any moment: nothing is sent twice or left out. */
LINK_TEST(races_output_is_held_while_it_is_sent, STREAMS, HIGH)
{
    struct listener_thread t = {.fd = l->peer, .total = SANITIZED ? 4 * MB : 60 * MB};
    pthread_t thread;
    uint64_t seed = seed_of(42);
    world_start(w);
    spawn(&thread, hear_all, &t);
    for (size_t done = 0; done < t.total;) {
        size_t n = t.total - done < MB ? t.total - done : MB;
        uint8_t *data = pattern_make(8, done, n), *rest = NULL;
        int64_t left = ap_conn_write(l->conn, (char *)data, n);
        CHECK_OK(left);
        for (uint64_t i = random_below(&seed, 20); i > 0; i--)
            pause_a_little(&seed);
        if (left > 0 && random_below(&seed, 2)) {
            left = ap_conn_hold(l->conn);
            rest = malloc((size_t)left + 1);
            memcpy(rest, data + n - (size_t)left, (size_t)left);
            memset(data, 0, n);
            ap_piece piece = {rest, (size_t)left};
            CHECK_EQ(ap_conn_requeue(l->conn, &piece, left > 0), left);
        }
        while (ap_conn_drain(l->conn, 0, 0) == -EAGAIN)
            await(w, l->id, AP_MAIL_WRITE);
        free(rest);
        free(data);
        done += n;
    }
    pthread_join(thread, NULL);
}

/* ---- listeners -------------------------------------------------------- */

struct crowd {
    struct sockaddr_in address;
    _Atomic bool over;
    _Atomic int connected;
};

static void *knock_and_run(void *arg)
{
    struct crowd *c = arg;
    uint64_t seed = seed_of((uintptr_t)&seed);
    while (!atomic_load(&c->over)) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (fd < 0)
            continue;
        connect(fd, (struct sockaddr *)&c->address, sizeof c->address);
        struct pollfd at = {.fd = fd, .events = POLLOUT};
        poll(&at, 1, 100);
        if (random_below(&seed, 3) == 0)
            close_reset(fd); /* dies in the backlog, perhaps */
        else
            close(fd);
        atomic_fetch_add(&c->connected, 1);
    }
    return NULL;
}

/* Credits never go below zero nor above what was given, whoever accepts. */
TEST(races_credits_and_accepts)
{
    struct world *w = world_open();
    struct crowd c = {.over = false};
    pthread_t threads[2];
    ap_account *account;
    ap_listener *listener;
    uint64_t given = 0, taken = 0, back = 0, seed = seed_of(51);
    CHECK_OK(ap_account_new(&account));
    int fd = listen_tcp(64, &c.address);
    CHECK_OK(ap_listener_new(w->poller, w->hub, fd, account, &listener));
    world_start(w);
    for (int i = 0; i < 2; i++)
        spawn(&threads[i], knock_and_run, &c);
    int64_t over = ap_now() + 2 * LITMUS;
    while (taken < (uint64_t)ROUNDS(4000) && ap_now() < over) {
        ap_accepted got[4];
        int n = 1 + (int)random_below(&seed, 3);
        CHECK_OK(ap_account_add(account, n));
        given += (uint64_t)n;
        if (random_below(&seed, 4) == 0)
            back += (uint64_t)ap_account_take_back(account);
        breathe(w);
        collect(w);
        while ((n = ap_listener_take(listener, got, 4)) > 0) {
            for (int i = 0; i < n; i++)
                ap_fd_close(got[i].fd);
            taken += (uint64_t)n;
        }
        CHECK(stats(w).accepts + back <= given);
    }
    ap_listener_release(listener);
    uint64_t rest = 0;
    while (ap_account_take_back(account) == 1)
        rest++;
    CHECK_EQ(stats(w).accepts + back + rest, given);
    atomic_store(&c.over, true);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    ap_account_unref(account);
    world_close(w);
}

TEST(races_listener_closes_while_accepting)
{
    struct world *w = world_open();
    struct crowd c = {.over = false};
    pthread_t thread;
    uint64_t seed = seed_of(52);
    int fd = listen_tcp(64, &c.address);
    world_start(w);
    spawn(&thread, knock_and_run, &c);
    RACE(i, 1000)
    {
        ap_account *account;
        ap_listener *listener;
        int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        CHECK_OK(ap_account_new(&account));
        CHECK_OK(ap_listener_new(w->poller, w->hub, copy, account, &listener));
        CHECK_OK(ap_account_add(account, 3));
        for (uint64_t k = random_below(&seed, 20); k > 0; k--)
            pause_a_little(&seed);
        if (random_below(&seed, 2))
            CHECK_OK(ap_account_add(account, 3));
        ap_listener_release(listener);
        ap_account_unref(account);
        collect(w);
    }
    atomic_store(&c.over, true);
    pthread_join(thread, NULL);
    close(fd);
    world_close(w);
}

/* ---- the lease -------------------------------------------------------- */

/* A loop that steps the poller by itself while the thread is there: one of them drives. */
LINK_TEST(races_two_drivers, TCP, HIGH)
{
    struct speaker s = {.fd = l->peer, .total = SANITIZED ? 3 * MB : 50 * MB};
    pthread_t thread;
    world_start(w);
    spawn(&thread, speak, &s);
    for (size_t read = 0; read < s.total;) {
        size_t n = s.total - read < 10000 ? s.total - read : 10000;
        while (want(l, n) == -EAGAIN) {
            int rc = ap_poller_step(w->poller, 0, 10);
            CHECK(rc >= 0 || rc == -EBUSY);
            breathe(w);
            collect(w);
        }
        expect(l, 5, read, n);
        read += n;
    }
    pthread_join(thread, NULL);
}
