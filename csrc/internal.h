/* Structs of the core, and who may touch what.
 *
 * Every field has the letter of its owner:
 *   (c) constant while the slot is open: any thread reads, nobody writes
 *   (m) under the slot's mutex
 *   (d) the driver only: whoever holds the poller's lease
 *   (l) the loop's thread only
 *   (h) under the hub's mutex
 *   (s) under the mutex of the slot table
 *   (a) atomic; the comment says which order pairs with what
 *   (o) the thread that owns the pool: the driver for a poller's, the loop for a hub's
 *
 * Lock order: lease, slot, hub. The account's mutex lies outside of the slot's.
 * The table's and the pools' atomics are leaves. Nobody takes a slot's mutex
 * under a hub's: a dying hub unlinks its slots under its mutex and closes them
 * after it.
 */
#ifndef ANYPOLL_INTERNAL_H
#define ANYPOLL_INTERNAL_H

#include "anypoll.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define AP_BOUND (256u * 1024)          /* bytes moved under one hold of a slot's mutex */
#define AP_SCRATCH (64u * 1024)         /* where input of unknown size is read to first */
#define AP_BLOCK_MIN (2u * 1024)        /* smallest block, header included */
#define AP_BLOCK_LARGE (32u * 1024)     /* from here on blocks are mapped one by one */
#define AP_BLOCK_MAX (8u * 1024 * 1024) /* largest block that input is read to */
#define AP_WINDOW (64u * 1024)
#define AP_DELIMITER_INLINE 16
#define AP_ACCEPT_BATCH 64
#define AP_TRIM_AFTER ((int64_t)1000 * 1000 * 1000)
#define AP_ACCEPT_PAUSE ((int64_t)100 * 1000 * 1000)
#define AP_FOREVER INT64_MAX

/* ---- debug assertions -------------------------------------------------
 * They abort, so they exist only in builds made for tests (AP_DEBUG). */
#ifdef AP_DEBUG
#include <assert.h>
#define AP_ASSERT(condition) assert(condition)
#else
#define AP_ASSERT(condition) ((void)0)
#endif

#define AP_ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define AP_CONTAINER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

/* ---- counters ---------------------------------------------------------
 * Relaxed: they order nothing, and a reader may see them a little late. */
typedef _Atomic uint64_t ap_counter;

static inline void ap_count(ap_counter *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline void ap_uncount(ap_counter *counter, uint64_t n)
{
    atomic_fetch_sub_explicit(counter, n, memory_order_relaxed);
}

static inline uint64_t ap_counted(const ap_counter *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

/* ---- faults.c --------------------------------------------------------- */

#define AP_FAULT_SHORT (-1)
/* What is to become of this call: 0, it is made; an errno to fail with; or
 * AP_FAULT_SHORT, it transfers at most *limit bytes. */
int ap_fault_next(int call, size_t *limit);
/* The same of a call that transfers nothing: the errno, or 0. */
int ap_fault_error(int call);

/* ---- sysio.c ---------------------------------------------------------- */

/* *offered: what iov holds; on return, what the kernel was offered of it. */
AP_MUST_CHECK ssize_t ap_sys_recv(int fd, const struct iovec *iov, size_t count, size_t *offered);
AP_MUST_CHECK ssize_t ap_sys_send(int fd, const struct iovec *iov, size_t count, size_t *offered);

/* Descriptors that a message carried: ours. */
typedef struct {
    int count;
    bool truncated; /* the message was longer than what it was received into */
    int fds[AP_FDS_MOST];
} ap_rights;
/* The same with descriptors, for UNIX sockets only. */
AP_MUST_CHECK ssize_t ap_sys_recv_rights(int fd, const struct iovec *iov, size_t count,
                                         size_t *offered, ap_rights *rights);
AP_MUST_CHECK ssize_t ap_sys_send_rights(int fd, const char *data, size_t *offered, const int *fds,
                                         int count);
/* The length of the next message, which stays where it is. */
AP_MUST_CHECK ssize_t ap_sys_next_length(int fd);
/* Whether the peer has ended its side and nothing waits any more. */
bool ap_sys_at_end(int fd);
AP_MUST_CHECK int ap_sys_accept(int fd, ap_accepted *out);
AP_MUST_CHECK int ap_sys_epoll_create(void);
AP_MUST_CHECK int ap_sys_epoll_ctl(int epfd, int op, int fd, uint32_t events, uint64_t data);
struct epoll_event;
AP_MUST_CHECK int ap_sys_epoll_wait(int epfd, struct epoll_event *events, int max, int timeout_ms);
AP_MUST_CHECK int ap_sys_eventfd(void);
void ap_sys_signal(int efd);
void ap_sys_drain(int efd);
int ap_sys_socket_error(int fd);
void ap_sys_drain_error_queue(int fd);
/* Whether the peer has ended its side, or the connection was reset, read or not. */
bool ap_sys_hung_up(int fd);
/* Whether a message waits, perhaps an empty one; of one that the end follows it says no. */
bool ap_sys_message_waits(int fd);
/* Bytes that wait to be received, or to be sent for the first time; or -errno. */
AP_MUST_CHECK int ap_sys_unread(int fd);
AP_MUST_CHECK int ap_sys_unsent(int fd);
AP_MUST_CHECK int ap_sys_shutdown(int fd, int how);
/* Makes the close a RST. */
void ap_sys_linger_now(int fd);
void ap_sys_close(int fd);
AP_MUST_CHECK void *ap_sys_alloc(size_t size);
AP_MUST_CHECK void *ap_sys_map(size_t size);
void ap_sys_unmap(void *memory, size_t size);
AP_MUST_CHECK int ap_sys_atfork(void (*in_child)(void));
AP_MUST_CHECK int ap_sys_thread(pthread_t *thread, void *(*run)(void *), void *arg);
int64_t ap_now(void);
int64_t ap_now_coarse(void);

/* Descriptors that the core owns, for the child of a fork. */
void ap_fd_own(int fd);
void ap_fd_disown(int fd);

/* ---- fork.c ----------------------------------------------------------- */

extern _Atomic uint32_t ap_epoch; /* (a) relaxed; only a child's atfork handler writes it */

static inline uint32_t ap_epoch_now(void)
{
    return atomic_load_explicit(&ap_epoch, memory_order_relaxed);
}

int ap_fork_watch(void);

/* ---- pool.c: the allocator of blocks ---------------------------------- */

typedef struct ap_pool ap_pool;
typedef struct ap_slab ap_slab;

struct ap_block {
    _Atomic uint32_t refs; /* (a) acq_rel on the way down: the last one frees */
    uint32_t size;         /* (c) header included */
    uint32_t start;        /* (m) first unread byte, as an offset from the block */
    uint32_t end;          /* (m) behind the last byte received */
    uint32_t epoch;        /* (c) */
    uint8_t size_class;    /* (c) */
    struct ap_block *next; /* (m) in a chain; (o) in a free list; (a) among the returned */
    ap_pool *home;         /* (c) */
    ap_slab *slab;         /* (c) NULL if mapped by itself */
    struct ap_conn *left;  /* written before the chain's reference is dropped, read by whoever
                            * drops the last one: the connection that counts it as pinned */
};

#define AP_BLOCK_HEADER ((uint32_t)((sizeof(struct ap_block) + 15) & ~(size_t)15))

ap_pool *ap_pool_new(void);
/* The owner leaves; the pool goes with its last block. */
void ap_pool_unref(ap_pool *pool);
AP_MUST_CHECK ap_block *ap_pool_take(ap_pool *pool, size_t room);
/* Gives what others returned back to the system, as far as it is not needed. */
void ap_pool_trim(ap_pool *pool);
void ap_pool_statistics(ap_pool *pool, ap_poller_stats *out);
/* In the child of a fork: the parent's pools are not counted there. */
void ap_pools_reset(void);
static inline void ap_block_ref(ap_block *block)
{
    /* relaxed: whoever takes a reference holds one, so the block cannot go */
    atomic_fetch_add_explicit(&block->refs, 1, memory_order_relaxed);
}
/* Drops the reference of a chain: what remains is pinned by views, and counted
 * for conn (which may be NULL) as long as it is. */
void ap_block_leave(ap_block *block, ap_conn *conn);

static inline uint8_t *ap_block_at(ap_block *block, uint32_t offset)
{
    return (uint8_t *)block + offset;
}
static inline uint32_t ap_block_room(const ap_block *block)
{
    return block->size - block->end;
}

/* ---- chain.c: unread input -------------------------------------------- */

typedef struct {
    ap_block *head; /* the oldest unread byte is in it */
    ap_block *tail; /* received bytes are appended to it */
    size_t size;    /* unread bytes */
} ap_chain;

void ap_chain_append(ap_chain *chain, ap_block *block);
void ap_chain_consume(ap_chain *chain, size_t n, ap_conn *conn);
void ap_chain_drop(ap_chain *chain, ap_conn *conn);
size_t ap_chain_copy(const ap_chain *chain, size_t skip, uint8_t *out, size_t n);
/* Finds the delimiter at or behind *searched and within max_bytes. Returns the
 * length through it, or 0 and moves *searched. */
size_t ap_chain_find(const ap_chain *chain, const uint8_t *delimiter, size_t size, size_t max_bytes,
                     size_t *searched);

/* ---- timer.c ---------------------------------------------------------- */

#define AP_WHEEL_LEVELS 8
#define AP_WHEEL_SLOTS 64

typedef struct ap_timer {
    struct ap_timer *prev, *next; /* (d) prev is NULL when not filed */
    uint64_t tick;                /* (d) when it is due */
} ap_timer;

typedef struct {
    uint64_t now;                                    /* (d) the last tick that was run */
    uint64_t used[AP_WHEEL_LEVELS];                  /* (d) a bit per slot that is not empty */
    ap_timer slots[AP_WHEEL_LEVELS][AP_WHEEL_SLOTS]; /* (d) heads of rings */
    size_t filed;                                    /* (d) */
} ap_wheel;

void ap_wheel_init(ap_wheel *wheel, int64_t now);
void ap_wheel_file(ap_wheel *wheel, ap_timer *timer, int64_t deadline);
void ap_wheel_unfile(ap_wheel *wheel, ap_timer *timer);
/* The earliest moment at which something may be due; AP_FOREVER if nothing is filed. */
int64_t ap_wheel_next(const ap_wheel *wheel);
/* Takes one timer that is due at now, or NULL. */
ap_timer *ap_wheel_expire(ap_wheel *wheel, int64_t now);
static inline bool ap_timer_filed(const ap_timer *timer)
{
    return timer->prev != NULL;
}

/* ---- who reads and allocates: the driver or the loop ------------------- */

typedef struct {
    ap_pool *pool;    /* (o) */
    uint8_t *scratch; /* (o) AP_SCRATCH bytes */
} ap_context;

AP_MUST_CHECK int ap_context_init(ap_context *context);
void ap_context_free(ap_context *context);

/* ---- slot.c ----------------------------------------------------------- */

enum ap_slot_kind { AP_SLOT_FREE, AP_SLOT_CONN, AP_SLOT_LISTENER };

/* Readiness that edge-triggered epoll reported and that is remembered. */
enum {
    AP_READABLE = 1,
    AP_WRITABLE = 2,
    AP_RDHUP = 4,
    AP_HUP = 8,
    AP_ERR = 16,
    AP_PRI = 32,
    AP_ERR_SEEN = 64, /* AP_ERR, but it stays when the error was dealt with */
    AP_NO_SHORT_READ = AP_RDHUP | AP_HUP | AP_ERR_SEEN | AP_PRI
};

/* Bits of the inbox: what a slot wants of its driver. */
enum {
    AP_BOX_QUEUED = 1,
    AP_BOX_WORK = 2,     /* serve the slot: due now */
    AP_BOX_DEADLINE = 4, /* file the slot's timer: due at that deadline */
    AP_BOX_CLOSED = 8,   /* forget the slot: never due */
    AP_BOX_SWEEP = 16    /* blocks are coming back: due some time later */
};
#define AP_MAIL_QUEUED (1u << 31)

typedef struct ap_slot ap_slot;
struct ap_slot {
    uint32_t index;              /* (c) for ever */
    _Atomic uint32_t generation; /* (a) written under (m); relaxed reads are rechecked there */
    uint32_t epoch;              /* (c) */
    uint8_t kind;                /* (m) enum ap_slot_kind */
    bool closed;                 /* (m) */
    uint8_t ready;               /* (m) AP_READABLE ... */
    bool disowned;               /* (m) closing fd is Python's business */
    bool watched;                /* (m) epoll knows it */
    bool orphaned;               /* (m) its poller has failed; see ending.c */
    int fd;                      /* (m) -1 once closed */
    _Atomic int32_t refs;        /* (a) acq_rel down: the handle, the driver, the mailbox, a kill */
    uint64_t id;                 /* (c) */
    ap_poller *poller;           /* (c) */
    ap_hub *hub;                 /* (c) */
    pthread_mutex_t mutex;       /* initialised once for all generations */
#ifdef AP_DEBUG
    _Atomic(uintptr_t) owner; /* (a) relaxed: the thread that holds mutex */
#endif
    ap_slot *run_next; /* (d) */
    bool on_run;       /* (d) */
    bool forgotten;    /* (d) closed: the driver's reference goes when it leaves the run list */
    ap_timer timer;    /* (d) */
    int64_t timer_at;  /* (m) the moment the timer is or will be filed for; AP_FOREVER: none */

    ap_slot *_Atomic box_next;    /* (a) release in the push, read by the taker of the list */
    _Atomic uint32_t box_bits;    /* (a) see poller.c */
    ap_slot *_Atomic mail_next;   /* (a) likewise */
    _Atomic uint32_t mail_bits;   /* (a) see hub.c */
    ap_slot *hub_prev, *hub_next; /* (h) the hub's open slots */
    bool hub_linked;              /* (h) */
    ap_slot *free_next;           /* (s) */
};

int ap_slot_take(int kind, ap_poller *poller, ap_hub *hub, int fd, ap_slot **out) AP_MUST_CHECK;
ap_slot *ap_slot_at(uint32_t index);
void ap_slot_ref(ap_slot *slot);
void ap_slot_unref(ap_slot *slot);
void ap_slot_table_reset(void);
/* Has epoll watch the slot, under its mutex. 0; -errno; AP_EPOLLER. */
AP_MUST_CHECK int ap_slot_watch(ap_slot *slot, uint32_t events);
/* Every slot there is, open or not, without its mutex. */
void ap_slot_each(void (*visit)(ap_slot *slot, void *arg), void *arg);

static inline void ap_slot_lock(ap_slot *slot)
{
    pthread_mutex_lock(&slot->mutex);
#ifdef AP_DEBUG
    atomic_store_explicit(&slot->owner, (uintptr_t)pthread_self(), memory_order_relaxed);
#endif
}

static inline void ap_slot_unlock(ap_slot *slot)
{
#ifdef AP_DEBUG
    atomic_store_explicit(&slot->owner, 0, memory_order_relaxed);
#endif
    pthread_mutex_unlock(&slot->mutex);
}

#ifdef AP_DEBUG
#define AP_ASSERT_LOCKED(slot) \
    assert(atomic_load_explicit(&(slot)->owner, memory_order_relaxed) == (uintptr_t)pthread_self())
#else
#define AP_ASSERT_LOCKED(slot) ((void)0)
#endif

static inline uint64_t ap_slot_tag(const ap_slot *slot)
{
    uint64_t generation = atomic_load_explicit(&slot->generation, memory_order_relaxed);
    return generation << 32 | slot->index;
}

/* Locks the slot if it is open. 0; -ECHILD; -EBADF. */
AP_MUST_CHECK int ap_slot_enter(ap_slot *slot);

/* The part of closing that connections and listeners share, under the slot's
 * mutex: out of epoll, the generation bumped. Returns the descriptor. */
int ap_slot_close_locked(ap_slot *slot);
/* The rest of it, without the mutex: out of the hub, and the descriptor closed
 * last, since that may block (SO_LINGER). Returns the descriptor, if kept, or 0. */
int ap_slot_closed(ap_slot *slot, int fd, bool reset, bool keep_fd);

/* ---- poller.c --------------------------------------------------------- */

struct ap_poller {
    int epfd;                      /* (c) */
    int efd;                       /* (c) */
    uint32_t epoch;                /* (c) */
    _Atomic int32_t refs;          /* (a) acq_rel: the creator, and each open slot */
    pthread_mutex_t lease;         /* held by the driver, only ever tried */
    pthread_t thread;              /* (c) once started */
    _Atomic bool started;          /* (a) relaxed: start and stop come from one place */
    _Atomic bool stopping;         /* (a) release in stop; acquire in the thread */
    ap_slot *_Atomic inbox;        /* (a) see ap_poller_push */
    _Atomic int64_t blocked_until; /* (a) see ap_poller_push; 0: running */
    ap_slot *run_head, **run_tail; /* (d) slots with work left */
    ap_wheel wheel;                /* (d) */
    ap_context context;            /* (d) */
    int64_t now;                   /* (d) when epoll_wait last returned */
    bool busy;                     /* (d) the last epoll_wait found something */
    int64_t sweep_at;              /* (d) when to trim the pool; AP_FOREVER: nothing to do */
    int failures;                  /* (d) of epoll_wait, in a row */
    _Atomic int state;             /* (a) see ending.c: AP_ACTIVE ..., or why it has ended */
    ap_counter connections, waits, polls, events, reads, writes, again, accepts, bytes_received,
        bytes_sent, wakeups, wakeups_coalesced, stale_tokens, stalls, timeouts, slots;
};

#ifdef AP_DEBUG
extern _Thread_local ap_poller *ap_driving;
#define AP_ASSERT_DRIVER(poller) assert(ap_driving == (poller))
#else
#define AP_ASSERT_DRIVER(poller) ((void)0)
#endif

/* Queues the slot for its driver, and wakes the driver if it would sleep
 * beyond due. Under the slot's mutex. */
void ap_poller_push(ap_slot *slot, uint32_t bits, int64_t due);
void ap_poller_ref(ap_poller *poller);
/* Lets go of what is queued for the driver; it has ended. */
void ap_poller_clear(ap_poller *poller);

/* ---- ending.c --------------------------------------------------------- */

enum ap_poller_state { AP_ACTIVE, AP_DRAINING, AP_ENDING };

/* seq_cst; the reasons are in ending.c */
static inline int ap_state(ap_poller *poller)
{
    return atomic_load_explicit(&poller->state, memory_order_seq_cst);
}
static inline bool ap_has_ended(ap_poller *poller)
{
    return ap_state(poller) < 0;
}
/* Counts one connection more, unless the poller has ended. 0; AP_EPOLLER. */
AP_MUST_CHECK int ap_poller_admit(ap_poller *poller);
void ap_poller_dismiss(ap_poller *poller);
/* What the driver does with the result of a wait: a poller that fails ends. */
void ap_poller_judge(ap_poller *poller, int result);
/* Ends a poller that was to end with its last connection. */
void ap_poller_end_drained(ap_poller *poller);

/* ---- hub.c ------------------------------------------------------------ */

struct ap_hub {
    int efd;              /* (h) written; the loop, which ends first, reads it freely */
    uint32_t epoch;       /* (c) */
    _Atomic int32_t refs; /* (a) acq_rel: the loop, each open slot */
    pthread_mutex_t mutex;
    bool dead;                  /* (h) */
    ap_slot *open;              /* (h) */
    ap_slot *_Atomic mailbox;   /* (a) see ap_hub_post */
    _Atomic uint32_t signalled; /* (a) see ap_hub_post */
    ap_slot *taken;             /* (l) the rest of a list that was taken */
    int batch;                  /* (l) how many tokens the last list gave */
    ap_context context;         /* (l) */
};

void ap_hub_ref(ap_hub *hub);
/* Tells the loop. Under the mutex of an open slot: ap_hub_kill relies on it. */
void ap_hub_post(ap_slot *slot, uint32_t bits);
AP_MUST_CHECK int ap_hub_link(ap_slot *slot);
void ap_hub_unlink(ap_slot *slot);

/* ---- connection.c, read.c, input.c, output.c, unix.c --------------------------- */

enum ap_want { AP_WANT_NOTHING, AP_WANT_BYTES, AP_WANT_DELIMITER, AP_WANT_MESSAGE, AP_WANT_END };

/* Descriptors that came with input. */
typedef struct ap_fds {
    struct ap_fds *next; /* (m) among the doomed */
    int count;           /* (m) */
    int numbers[];       /* (m) */
} ap_fds;

struct ap_conn {
    ap_slot slot;
    uint8_t type; /* (c) AP_TCP, AP_UNIX or AP_SEQPACKET */

    /* input, all (m) */
    ap_chain input;
    ap_block *shown;    /* the block that was handed out; always input.head or NULL */
    uint32_t window;    /* what is shown beyond a request: bounds unreported consumption */
    uint64_t consumed;  /* bytes, since the beginning */
    uint32_t high, low; /* water marks */
    uint32_t grow;      /* size of the next block */
    uint32_t base;      /* at least; also that of the first one */
    uint32_t recent;    /* bytes that the last read brought */
    int read_end;       /* 0, AP_EEOF, AP_EIDLE or -errno: nothing more will come */
    bool paused;        /* above high water, until below low */
    bool discarding;    /* what arrives is thrown away */
    bool was_reset;     /* RST noticed behind input that nobody reads */
    ap_fds *carried;    /* came with the bytes from carried_from to carried_to */
    uint64_t carried_from, carried_to; /* positions in the stream */
    ap_fds *doomed;                    /* to be closed without the mutex: ap_conn_unlock */

    /* the read wait, all (m) */
    uint8_t want; /* enum ap_want */
    bool want_expired;
    size_t want_bytes; /* bytes, or max_bytes of a delimiter */
    int64_t want_deadline;
    uint8_t delimiter_inline[AP_DELIMITER_INLINE];
    uint8_t *delimiter; /* delimiter_inline or allocated */
    size_t delimiter_size;
    uint64_t searched; /* position in the stream up to which it is known to be absent */
    int64_t trim_at;   /* when to take an empty block back; AP_FOREVER: never */
    bool lent;         /* the loop has the wrapper of a block, which may have left the chain */

    /* request mode, all (m): how things were when the last call began */
    bool any_more;         /* a wait for one byte more may read on beyond high water */
    uint64_t request_at;   /* what was consumed; of messages: how many were received */
    uint64_t request_seen; /* what had arrived; of messages: the bytes of those that waited */

    /* the peer, all (m); see ap_conn_learn */
    bool watching_peer; /* AP_MAIL_GONE is wanted */
    bool peer_gone;     /* it is known to have gone, whoever has learned it */
    bool cut;           /* what the socket shows from now on is this side's own doing */

    /* output, all (m) */
    struct iovec *out; /* queued pieces: first our own copies, then Python's memory */
    ap_block *own;     /* what the first own_count pieces lie in */
    uint32_t own_count;
    size_t own_bytes;
    uint32_t out_first, out_count, out_capacity;
    size_t out_bytes;
    size_t given_up;   /* of those that are not our own copies, the first: nobody waits for them */
    int write_error;   /* 0, AP_EIDLE or -errno */
    bool held;         /* between ap_conn_hold and ap_conn_requeue */
    bool owed;         /* AP_MAIL_SENT must follow */
    bool shut;         /* SHUT_WR was done */
    bool watching_out; /* not on AP_TCP: EPOLLOUT is in the mask */
    int send_error;    /* the errno of sendmsg (on AP_SEQPACKET also of recvmsg), which has
                        * taken the socket's error */
    bool drain_armed, drain_writable, drain_expired;
    int64_t drain_deadline;

    /* time and counts, (m) where not atomic */
    int64_t idle, idle_from, created_at;
    _Atomic int64_t last_activity; /* (a) relaxed: for statistics */
    ap_counter reads, writes, bytes_received, bytes_sent, wakeups;
    ap_counter pinned; /* bytes of left blocks; each holds a reference to the slot */
};

static inline ap_conn *ap_conn_of(ap_slot *slot)
{
    return AP_CONTAINER(slot, ap_conn, slot);
}

void ap_fds_close(ap_fds *fds);

/* In place of ap_slot_unlock, wherever descriptors may have been doomed: close(2)
 * may block. */
static inline void ap_conn_unlock(ap_conn *conn)
{
    ap_fds *doomed = conn->doomed;
    if (doomed)
        conn->doomed = NULL;
    ap_slot_unlock(&conn->slot);
    if (doomed)
        ap_fds_close(doomed);
}

/* What the driver does for a slot, under its mutex. True: work is left. */
bool ap_conn_serve(ap_context *context, ap_conn *conn);
void ap_conn_expire(ap_conn *conn, int64_t now);
/* Its poller has failed: it is broken. */
void ap_conn_fail(ap_conn *conn, int error);
int64_t ap_conn_next_deadline(const ap_conn *conn);
uint32_t ap_conn_resolve(ap_conn *conn, uint32_t bits, int32_t *value);
void ap_conn_drop(ap_conn *conn);
/* After anything that may say that the peer has gone: remembers it, and tells the hub, once. */
void ap_conn_learn(ap_conn *conn);
/* This side is about to end the socket, or will not look at it any more. */
void ap_conn_cut(ap_conn *conn);
/* Whether an error of the socket (-errno) says that nobody is at the other end any more. */
bool ap_is_of_peer(int error);
/* Makes sure that the slot is looked at when deadline has come. */
void ap_conn_note_deadline(ap_conn *conn, int64_t deadline);
void ap_conn_note_activity(ap_conn *conn);

/* The caller holds the mutex. */
bool ap_input_wanted(ap_conn *conn);
bool ap_input_read(ap_context *context, ap_conn *conn);
bool ap_input_over(ap_conn *conn);
bool ap_input_idle(const ap_conn *conn);
void ap_input_probe(ap_conn *conn);
void ap_input_consume(ap_conn *conn, size_t n);
void ap_input_arm(ap_conn *conn, enum ap_want want, size_t n, int64_t deadline);
void ap_input_drop(ap_conn *conn);
/* recvmsg said EAGAIN. */
void ap_input_nothing(ap_conn *conn);
/* recvmsg said 0: AP_EEOF, or the error that somebody else was told. */
int ap_input_end(const ap_conn *conn);
void ap_input_note(ap_conn *conn, size_t got);
/* A last block that was read to its end, and that no view needs, begins anew. */
void ap_input_rewind(ap_conn *conn);

/* Consumes up to pos in the block that is shown; what is unread behind it. */
void ap_read_to(ap_conn *conn, uint32_t pos);
size_t ap_read_left(const ap_conn *conn, uint32_t pos);
/* The end of the window, if n bytes lie in the block that was shown; else 0. */
uint32_t ap_read_shown(const ap_conn *conn, size_t n);
/* Nothing will do but waiting: sends the output that came along, and arms. */
int64_t ap_read_wait(ap_conn *conn, enum ap_want want, size_t n, int flags, int64_t deadline,
                     const char *output, size_t output_size);

uint32_t ap_output_events(const ap_conn *conn);
bool ap_output_write(ap_conn *conn);
bool ap_output_over(const ap_conn *conn);
int64_t ap_output_send(ap_conn *conn, const ap_piece *pieces, int count);
/* Copies a little output, for the driver to send. False: do it otherwise. */
bool ap_output_hand_over(ap_conn *conn, const char *data, size_t size);
void ap_output_fail(ap_conn *conn, int error);
/* The same after a system call, whose error is the socket's: the input ends too. */
void ap_output_break(ap_conn *conn, int error);
/* The kernel took n bytes of the offered. */
void ap_output_took(ap_conn *conn, size_t n, size_t offered);
/* The kernel took nothing: EAGAIN. */
void ap_output_again(ap_conn *conn);
void ap_output_drop(ap_conn *conn);

/* Descriptors that came with the last got bytes of the input. False: no memory; they are closed. */
bool ap_fds_carry(ap_conn *conn, const ap_rights *rights, ssize_t got);
/* Those that are carried will not be asked for any more. */
void ap_fds_doom(ap_conn *conn);
/* The loop is shown bytes up to end in the first block: it has to report how far it comes. */
void ap_fds_shown(ap_conn *conn, uint32_t end);

/* ---- listener.c ------------------------------------------------------- */

struct ap_account {
    _Atomic int32_t refs;    /* (a) acq_rel */
    _Atomic int32_t credits; /* (a) acq_rel: one is taken before each accept4 */
    _Atomic bool starving;   /* (a) relaxed: an episode is on, and one listener has told it */
    uint32_t epoch;          /* (c) */
    pthread_mutex_t mutex;
    ap_listener *listeners; /* under mutex */
};

struct ap_listener {
    ap_slot slot;
    ap_account *account;       /* (c) */
    ap_listener *account_next; /* under the account's mutex */
    ap_accepted *queue;        /* (m) accepted and not yet taken */
    uint32_t first, count, capacity;
    int error;            /* (m) of accept4, to be reported once */
    int64_t paused_until; /* (m) 0: not paused */
    int starved_error;    /* (m) */
};

bool ap_listener_serve(ap_listener *listener);
void ap_listener_expire(ap_listener *listener, int64_t now);
void ap_listener_fail(ap_listener *listener, int error);
int64_t ap_listener_next_deadline(const ap_listener *listener);
uint32_t ap_listener_resolve(ap_listener *listener, uint32_t bits, int32_t *value);
void ap_listener_drop(ap_listener *listener);

#endif
