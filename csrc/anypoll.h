/* The native core's public interface: what Python may call.
 *
 * Every C file includes this header. Run through the preprocessor with
 * ANYPOLL_CDEF defined, it is also the cdef that cffi compiles, so a signature
 * that differs from its definition does not compile.
 *
 * Conventions. A function returns >= 0, or -errno, or one of the AP_E* codes
 * below; on failure, out-parameters are untouched. errno never crosses this
 * boundary. Nothing here prints, aborts or exits. Times are nanoseconds of
 * CLOCK_MONOTONIC; a deadline of 0 means none.
 *
 * Threads. "loop" means the thread of the event loop whose hub the object was
 * opened with; "any" means any thread at any time. A call on an object that
 * was inherited through fork() returns -ECHILD and touches nothing.
 */
#ifndef ANYPOLL_H
#define ANYPOLL_H

#ifdef ANYPOLL_CDEF
#define AP_API
#define AP_MUST_CHECK
#else
#include <stddef.h>
#include <stdint.h>
#define AP_API __attribute__((visibility("hidden")))
#define AP_MUST_CHECK __attribute__((warn_unused_result))
#endif

typedef struct ap_poller ap_poller;
typedef struct ap_hub ap_hub;
typedef struct ap_conn ap_conn;
typedef struct ap_listener ap_listener;
typedef struct ap_account ap_account;
typedef struct ap_block ap_block;

/* Codes other than -errno. They lie below every errno. */
enum {
    AP_EEOF = -5001,    /* the peer has ended its side, and too little is buffered */
    AP_EQUEUED = -5002, /* like -EAGAIN (the wait is armed), and some of the output passed
                         * with the call was queued: keep it until AP_MAIL_SENT */
    AP_EDELIM = -5003,  /* no delimiter within the first max_bytes */
    AP_EIDLE = -5004,   /* the idle timeout has ended the connection */
    AP_ELATE = -5005,   /* the call's deadline has passed; -ETIMEDOUT is the socket's */
    AP_ETLS = -5006,    /* the TLS session has failed: ap_conn_tls_status says why */
    AP_ECUT = -5007,    /* the peer has ended the connection, but not the TLS session */
    AP_EPOLLER = -7000  /* AP_EPOLLER - errno: the poller has failed with that errno;
                         * AP_EPOLLER - ECANCELED: it has ended as requested */
};

/* Kinds of sockets: TCP, UNIX streams, and UNIX message sockets (SOCK_SEQPACKET). */
enum { AP_TCP = 1, AP_UNIX = 2, AP_SEQPACKET = 3 };

/* Descriptors that one message can carry: the kernel's SCM_MAX_FD. */
enum { AP_FDS_MOST = 253 };

/* Bits of a token: why the loop is notified about a slot. */
enum {
    AP_MAIL_READ = 1,     /* the armed read wait is over: look again */
    AP_MAIL_WRITE = 2,    /* the armed write wait is over: look again */
    AP_MAIL_SENT = 4,     /* queued output is no longer referenced */
    AP_MAIL_TRIM = 8,     /* the empty block was taken back: drop the wrapper */
    AP_MAIL_ACCEPT = 16,  /* accepted descriptors, or an error, are waiting to be taken */
    AP_MAIL_STARVED = 32, /* a listener has paused for lack of resources; once per episode */
    AP_MAIL_IDLE = 64,    /* the idle timeout has ended the connection */
    AP_MAIL_FDS = 128,    /* descriptors go with bytes that were shown: ap_conn_report */
    AP_MAIL_GONE = 256,   /* the peer has gone: ap_conn_watch_peer; once */
    AP_MAIL_FAILED = 512  /* the poller has failed, and the slot with it */
};

/* Flags of ap_conn_read and ap_conn_find. */
enum {
    AP_NOWAIT = 1,  /* do not arm a wait: -EAGAIN only says that too little is buffered */
    AP_SCATTER = 2, /* the bytes need not be contiguous */
    AP_STRAIGHT = 4 /* of ap_conn_read: the caller can receive into memory of its own */
};

/* In the result of ap_conn_read: the window lies in a block not handed out
 * yet; fetch it with ap_conn_block. */
enum { AP_NEW_BLOCK_SHIFT = 40 };

/* Bits of ap_conn_status. */
enum {
    AP_IS_CLOSED = 1,   /* closed by its owner (or by the end of its loop) */
    AP_IS_BROKEN = 2,   /* known to be dead: an RST, a failed write, an idle end */
    AP_IS_EOF = 4,      /* the peer's FIN was read */
    AP_IS_IDLE_END = 8, /* broken by the idle timeout */
    AP_IS_SHUT = 16,    /* ap_conn_shutdown was called */
    AP_IS_GONE = 32,    /* the peer has gone, by a FIN or an RST, whether that was read or not */
    AP_IS_FAILED = 64,  /* broken as AP_ETLS says */
    AP_IS_CUT = 128     /* broken as AP_ECUT says */
};

/* One entry of the mailbox as the loop sees it. */
typedef struct {
    uint64_t id;   /* generation << 32 | slot, as from ap_conn_id */
    uint32_t bits; /* AP_MAIL_* */
    int32_t value; /* AP_MAIL_FAILED: AP_EPOLLER - errno. AP_MAIL_STARVED: the errno. AP_MAIL_READ:
                    * the end of the window, if the awaited bytes lie in the block shown last;
                    * otherwise 0 */
} ap_token;

/* A readable window of a block. Offsets count from the block's own address,
 * so the buffer of the owning pointer is the memory they index. */
typedef struct {
    ap_block *block;
    uint32_t size;  /* of the whole block, header included */
    uint32_t start; /* the first unread byte */
    uint32_t end;   /* after the last byte that may be looked at */
} ap_view;

typedef struct {
    const void *data;
    size_t size;
} ap_piece;

/* An accepted descriptor. address is in network order, port in host order. For a
 * UNIX socket there is only the family, and port says whether the peer has a name. */
typedef struct {
    int32_t fd;
    uint16_t family;
    uint16_t port;
    uint32_t scope;
    uint8_t address[16];
} ap_accepted;

typedef struct {
    uint64_t connections; /* open slots assigned to this poller, including listeners */
    uint64_t waits;       /* epoll_wait calls that blocked */
    uint64_t polls;       /* all epoll_wait calls */
    uint64_t events;
    uint64_t reads;
    uint64_t writes;
    uint64_t again; /* EAGAIN from reads, writes and accepts */
    uint64_t accepts;
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t wakeups;           /* eventfd writes to hubs */
    uint64_t wakeups_coalesced; /* tokens that needed none */
    uint64_t stale_tokens;      /* events and tokens of slots reused meanwhile */
    uint64_t stalls;            /* writes that took less than was offered */
    uint64_t timeouts;
    uint64_t slots; /* in use, including closed ones that are still referenced */
    uint64_t looks; /* of ap_hub_look, those that were made */
    uint64_t spins;
    uint64_t hits; /* looks that have found something, by themselves or by a spin */
    uint64_t blocks_in_use;
    uint64_t blocks_free;
    uint64_t bytes_in_use;
    uint64_t bytes_free;
    uint64_t bytes_pinned; /* in blocks that only views keep alive */
} ap_poller_stats;

typedef struct {
    uint64_t bytes_received;
    uint64_t bytes_sent;
    uint64_t reads;
    uint64_t writes;
    uint64_t wakeups;
    uint64_t buffered_input;
    uint64_t buffered_output;
    uint64_t pinned;       /* bytes of blocks the reader has left but views still hold */
    int64_t created_at;    /* CLOCK_MONOTONIC, ns */
    int64_t last_activity; /* likewise, at the coarse clock's resolution */
} ap_conn_stats;

/* ---- pollers ---------------------------------------------------------- */

/* Creates a poller (epoll and event descriptors, no thread yet).
 * Thread: any. Returns 0; -EMFILE, -ENFILE, -ENOMEM. */
AP_API int ap_poller_new(ap_poller **out) AP_MUST_CHECK;

/* Starts the thread that drives the poller, with all signals blocked.
 * Thread: any, once. Returns 0; -EAGAIN if no thread can be created; AP_EPOLLER. */
AP_API int ap_poller_start(ap_poller *poller) AP_MUST_CHECK;

/* Drives the poller once: drains its inbox, fires what is due, waits at most
 * timeout_ms (-1: until something happens) and serves at most budget slots.
 * Thread: any; -EBUSY while another thread drives. Returns the slots served;
 * -errno of epoll_wait; AP_EPOLLER once the poller has ended. */
AP_API int ap_poller_step(ap_poller *poller, int timeout_ms, int budget);

/* Ends and joins the thread, if there is one. Connections stay open, but
 * nothing moves any more. Thread: any but the poller's own. Returns 0. */
AP_API int ap_poller_stop(ap_poller *poller);

/* on: lets the poller and its thread end as soon as it has no connection and no listener; those
 * that it has are served, and more may be opened. Not on: it stays after all. Thread: any.
 * Returns 0; AP_EPOLLER if it has ended. */
AP_API int ap_poller_drain(ap_poller *poller, int on);

/* 0: it is running. 1: it will end with its last connection. AP_EPOLLER: it has ended. */
AP_API int ap_poller_state(ap_poller *poller);

/* Drops the caller's reference; the memory goes with the last slot and block. */
AP_API void ap_poller_unref(ap_poller *poller);

/* Makes the driver run once, so that retired memory is recycled now. */
AP_API int ap_poller_nudge(ap_poller *poller);

/* Lends the poller to an event loop, which watches ap_poller_fd and then calls ap_hub_drive; its
 * thread guards meanwhile. NULL ends the loan at once, and the thread drives again. So does
 * ap_poller_stop. Thread: any; with a hub its loop's. Returns 0; AP_EPOLLER if it has ended. */
AP_API int ap_poller_lend(ap_poller *poller, ap_hub *hub);

/* The descriptor that is readable while there is something to drive for. */
AP_API int ap_poller_fd(ap_poller *poller);

AP_API int ap_poller_statistics(ap_poller *poller, ap_poller_stats *out);

/* The blocks of the process: of pollers, of hubs, and of those that have ended. Sets only those
 * fields. Thread: any. Returns 0. */
AP_API int ap_memory_statistics(ap_poller_stats *out);

/* ---- hubs ------------------------------------------------------------- */

/* Creates a hub for one event loop. Thread: any. Returns 0; -errno. */
AP_API int ap_hub_new(ap_hub **out) AP_MUST_CHECK;

/* The descriptor that is readable while tokens wait. */
AP_API int ap_hub_fd(ap_hub *hub);

/* Takes up to max tokens, oldest first. Every wait they report is over and
 * disarmed. Thread: loop. Returns their number; if that is max, call again. */
AP_API int ap_hub_take(ap_hub *hub, ap_token *tokens, int max);

/* Has the descriptor readable again, for tokens that were left. Thread: loop. */
AP_API int ap_hub_again(ap_hub *hub);
/* Steps the poller without blocking, and then takes tokens as ap_hub_take does, but the poller
 * did not have to make the hub's descriptor readable for them. Thread: loop. Returns their number,
 * 0 also while another thread steps; if that is max, call ap_hub_take. -EPERM: the poller is not
 * lent to this hub (any more). */
AP_API int ap_hub_drive(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max);

/* Whether the poller is still lent to this hub: a step that fails ends the loan. Thread: any. */
AP_API int ap_hub_drives(const ap_hub *hub, ap_poller *poller);

/* For how many nanoseconds a loop that drives waits for more without sleeping, when all that the
 * tokens asked for is done. For the whole process; 0, as it is at first: not at all. Thread: any.
 * Returns 0; -EINVAL. */
AP_API int ap_spin_limit(int64_t nanoseconds);

/* Looks again in the same turn of the loop, if that is likely to find something. As ap_hub_drive;
 * 0: the loop is to go on. -EAGAIN: nothing has come yet, and ap_hub_spin is to follow. */
AP_API int ap_hub_look(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max);

/* Goes on looking for a bounded time. Thread: loop, but others may run Python. As ap_hub_drive. */
AP_API int ap_hub_spin(ap_hub *hub, ap_poller *poller, ap_token *tokens, int max);

/* The loop's thread may run Python again after ap_hub_spin: was it worthwhile? Thread: loop. */
AP_API void ap_hub_spun(ap_hub *hub, ap_poller *poller);

/* Returns the hub's free memory to the system. Thread: loop. */
AP_API int ap_hub_trim(ap_hub *hub);

/* The blocks of the hub; sets only those fields. Thread: any. */
AP_API int ap_hub_statistics(ap_hub *hub, ap_poller_stats *out);

/* The loop has ended: closes all its connections and listeners (if disowned,
 * the descriptor stays open); signallers find it dead. Idempotent. Thread: any, once the loop no
 * longer runs. */
AP_API int ap_hub_kill(ap_hub *hub);

/* Drops the caller's reference. */
AP_API void ap_hub_unref(ap_hub *hub);

/* ---- connections ------------------------------------------------------ */

/* Takes a connected, non-blocking stream or message socket into a slot. It is not watched
 * before ap_conn_register. high_water bounds what is read ahead, in bytes.
 * Owns fd from success on. Thread: loop. Returns 0; -ENOMEM, -EBADF (the hub is dead), AP_EPOLLER.
 */
AP_API int ap_conn_new(ap_poller *poller, ap_hub *hub, int fd, int kind, uint32_t high_water,
                       ap_conn **out) AP_MUST_CHECK;

/* Watches count connections; results[i] is 0 or -errno.
 * Thread: loop. Returns how many failed. */
AP_API int ap_conn_register(ap_conn **conns, int *results, int count) AP_MUST_CHECK;

/* The identity in tokens, constant for the life of the handle. Thread: any. */
AP_API uint64_t ap_conn_id(ap_conn *conn);

/* All calls with a parameter pos first consume: pos is the caller's position in
 * the window it was handed last. */

/* Wants n unread bytes, contiguous unless AP_SCATTER. If they are not there, a
 * readable socket is read at once; if that is not enough, the given output is
 * sent (here, or a copy by the poller; what is not taken at once is queued) and
 * the wait is armed.
 * Thread: loop. Returns the end of the window, with bit AP_NEW_BLOCK_SHIFT set
 * if its block is new (n == 0 or AP_SCATTER: 0 or more); -EAGAIN or AP_EQUEUED;
 * AP_EEOF; AP_ELATE; -EBADF when closed; -ENOMEM; the socket's error. With AP_STRAIGHT
 * and n > 0 also 0: nothing is buffered, and the socket is readable; now call
 * ap_conn_read_straight. What was shown is not kept: the caller lets go of it. */
AP_API int64_t ap_conn_read(ap_conn *conn, uint32_t pos, size_t n, int flags, int64_t deadline,
                            const char *output, size_t output_size);

/* Receives up to size bytes into memory, as one call of recv does, or takes what is buffered.
 * Thread: loop. Returns the bytes; -EAGAIN: there are none; the others as ap_conn_read. */
AP_API int64_t ap_conn_read_straight(ap_conn *conn, uint32_t pos, char *memory, size_t size);

/* Makes n bytes the first unread ones again: those that ap_conn_read_straight returned last.
 * Thread: loop. 0; -EBADF; -ENOMEM: they are lost, and nothing can be read any more. */
AP_API int ap_conn_put_back(ap_conn *conn, const char *memory, size_t n);

/* The same without flags, deadline and output, as most requests are. */
AP_API int64_t ap_conn_want(ap_conn *conn, uint32_t pos, size_t n);

/* Wants the delimiter within the first max_bytes unread bytes. The search
 * resumes where the last one for the same delimiter stopped.
 * Thread: loop. Returns the number of bytes through the delimiter, which are
 * then contiguous, with bit AP_NEW_BLOCK_SHIFT as in ap_conn_read; otherwise as
 * ap_conn_read, or AP_EDELIM. */
AP_API int64_t ap_conn_find(ap_conn *conn, uint32_t pos, const char *delimiter, size_t size,
                            size_t max_bytes, int flags, int64_t deadline, const char *output,
                            size_t output_size);

/* Request mode: the next call, or a wait for it. A call is due when anything is
 * unread; but if the last call consumed nothing (and fresh is not set), only
 * when more has come than was there when it began. The output is treated as in
 * ap_conn_read. A connection that waits with nothing unread keeps no block, and its window
 * is closed: what was shown will be shown anew.
 * Thread: loop. Returns as ap_conn_read: the window on the unread bytes; 0 if the
 * last call consumed nothing; -EAGAIN or AP_EQUEUED (armed); AP_EEOF if no call
 * will ever be due; the others. */
AP_API int64_t ap_conn_request(ap_conn *conn, uint32_t pos, int fresh, const char *output,
                               size_t output_size);

/* Fills view with the window at the first unread byte. If its block was not
 * handed out yet, the caller gets a reference and owes one ap_block_unref:
 * the result is then 1, or 0 if the caller already has the block.
 * Thread: loop. -ENODATA if nothing is unread; -EBADF. */
AP_API int ap_conn_block(ap_conn *conn, uint32_t pos, ap_view *view) AP_MUST_CHECK;

/* The caller has read the block up to *pos, and has no views of it. If nothing else is unread,
 * the block is filled from its start again, and stays the one that was handed out; *pos is the
 * new position then. Or it is given back, if it is large. Consumes nothing otherwise.
 * Thread: loop. Returns 1 if the block was rewound; 2 if it was given back, and the caller is to
 * let go of it, too; 0; -EBADF. */
AP_API int ap_conn_rewind(ap_conn *conn, const ap_block *block, uint32_t *pos) AP_MUST_CHECK;

/* How many bytes a window shows beyond the request, initially 64 KiB. */
AP_API int ap_conn_set_window(ap_conn *conn, uint32_t size);

/* The size of the first block of input, and the minimum for later ones, header included; at most
 * the high water mark. Call it before there is any input. Returns 0; -EINVAL. */
AP_API int ap_conn_set_block(ap_conn *conn, uint32_t size);

/* Consumes n more unread bytes, across blocks, and forgets that a window was
 * handed out: the next one is new. Returns 0; -EINVAL if there are fewer. */
AP_API int ap_conn_consume(ap_conn *conn, uint32_t pos, size_t n) AP_MUST_CHECK;

/* The unread bytes, including those read ahead. */
AP_API int64_t ap_conn_buffered(ap_conn *conn, uint32_t pos);

/* The same, plus the bytes that have arrived but were not read from the socket yet. */
AP_API int64_t ap_conn_arrived(ap_conn *conn, uint32_t pos);

/* Takes back the wait armed by ap_conn_read, ap_conn_find or ap_conn_linger
 * (which the next such call does too); the write wait, for all who wait. */
AP_API int ap_conn_disarm_read(ap_conn *conn);
AP_API int ap_conn_disarm_write(ap_conn *conn);

/* Sends pieces in order, after what is queued: one system call now, the rest
 * by the poller. Thread: loop. Returns the bytes now queued: 0 means that the
 * kernel has everything; above 0 the pieces must stay until AP_MAIL_SENT.
 * -EBADF when closed, -EPIPE after ap_conn_shutdown, -ENOMEM, the socket's error. */
AP_API int64_t ap_conn_send(ap_conn *conn, const ap_piece *pieces, int count);
AP_API int64_t ap_conn_write(ap_conn *conn, const char *data, size_t size);

/* The bytes queued and not yet taken by the kernel. */
AP_API int64_t ap_conn_queued(ap_conn *conn);

/* Nobody waits any more for what is queued by reference now: it goes out by itself.
 * Thread: loop. Returns 0; -EBADF. */
AP_API int ap_conn_give_up(ap_conn *conn);

/* The bytes queued, without those given up. Thread: loop. */
AP_API int64_t ap_conn_awaited(ap_conn *conn);

/* Waits until queued output is gone; with until_writable also until the socket
 * would take more. Several tasks may wait: the earliest of their deadlines ends
 * the wait for all, and each calls again.
 * Thread: loop. Returns 0; -EAGAIN (armed); AP_ELATE; errors. */
AP_API int ap_conn_drain(ap_conn *conn, int until_writable, int64_t deadline);

/* Stops the poller from sending and returns how many queued bytes are left (of
 * those given by reference; copies stay before them). ap_conn_requeue then
 * replaces them with pieces. In between, the caller may copy or free the
 * memory. Thread: loop. */
AP_API int64_t ap_conn_hold(ap_conn *conn);
AP_API int64_t ap_conn_requeue(ap_conn *conn, const ap_piece *pieces, int count);

/* ---- UNIX sockets ----------------------------------------------------- */

/* Reports the loop's position, so that descriptors whose bytes were consumed
 * are closed. Thread: loop. Returns 1 if some still wait for their bytes to be
 * taken or consumed, otherwise 0; -EBADF. */
AP_API int ap_conn_report(ap_conn *conn, uint32_t pos);

/* Moves up to size unread bytes (256 KiB at most) into buffer, but none beyond
 * those that descriptors came with. If it moves any of these, or if size is 0
 * and the next byte is one, it moves the descriptors into fds, and the caller
 * owns them: *count is the room, and on return their number. Others are closed.
 * Afterwards no window is handed out.
 * Thread: loop. Returns the number of bytes; -EBADF; -EBUSY with a TLS session. */
AP_API int64_t ap_conn_take_fds(ap_conn *conn, uint32_t pos, char *buffer, size_t size, int *fds,
                                int *count);

/* Sends as much of data as one system call takes (a message: all), with copies
 * of the descriptors; the rest of a stream's data goes out without them.
 * Nothing is queued. Thread: loop. Returns the bytes taken; -EAGAIN with queued output or
 * without room (ap_conn_drain waits for both to end); -EBUSY: there is a TLS session, which
 * carries none; errors as ap_conn_send, and
 * those of the arguments (EMSGSIZE, EBADF, ETOOMANYREFS, ...), after which the
 * connection goes on, and -EBUSY with a TLS session. */
AP_API int64_t ap_conn_send_fds(ap_conn *conn, const char *data, size_t size, const int *fds,
                                int count);

/* Receives the next message of an AP_SEQPACKET connection, truncated to max
 * bytes, into a block that the caller then owns. Descriptors as in ap_conn_take_fds.
 * Thread: loop. Returns the number of bytes; -EAGAIN (a wait is armed); AP_EEOF,
 * also for an empty message without descriptors; AP_ELATE; -EBADF; -ENOMEM; the
 * socket's error. */
AP_API int64_t ap_conn_receive(ap_conn *conn, size_t max, int64_t deadline, ap_view *view, int *fds,
                               int *count);

/* ---- the end of a connection ------------------------------------------ */

/* shutdown(SHUT_WR). Idempotent. Thread: loop. Returns 0; -EBADF; -EBUSY with
 * queued output, or with a TLS session; the socket's error. */
AP_API int ap_conn_shutdown(ap_conn *conn);

/* After the last byte of a handler: SHUT_WR, then input is read and discarded
 * until the peer's FIN, because a close with unread input sends an RST, which
 * destroys what was sent. Thread: loop. Returns 0 when the socket can be closed
 * (at once, if nothing is unread and nothing unsent); -EAGAIN (armed);
 * AP_ELATE; -EBUSY with queued output. */
AP_API int ap_conn_linger(ap_conn *conn, uint32_t pos, int64_t deadline);

/* Asks for AP_MAIL_GONE, once, when the peer has ended its side or reset the
 * connection. This is noticed even behind unread and paused input, or by a failed
 * write or shutdown; an idle end does not count, nor an error of this side's own (ENOBUFS).
 * Thread: loop. Returns 0; -EBADF. */
AP_API int ap_conn_watch_peer(ap_conn *conn);

/* A real idle timeout: no byte in or out for that long. 0: none. */
AP_API int ap_conn_set_idle(ap_conn *conn, int64_t nanoseconds);

/* Ends the connection: unwatched, its generation bumped, its queues dropped,
 * and the descriptor closed last (reset: with an RST). With keep_fd it stays
 * open and is the caller's. Thread: any. Returns the descriptor, if kept, or
 * 0; -EBADF if it was already closed. */
AP_API int ap_conn_close(ap_conn *conn, int reset, int keep_fd);

/* Like ap_conn_close with keep_fd, but bytes read ahead stay for
 * ap_conn_rest. -EBUSY with queued output. */
AP_API int ap_conn_detach(ap_conn *conn, uint32_t pos);

/* Moves up to size bytes that were read ahead out of a detached connection. */
AP_API int64_t ap_conn_rest(ap_conn *conn, char *buffer, size_t size);

/* The descriptor, or -EBADF. With disown, the caller becomes responsible for
 * closing it in ap_conn_close(keep_fd) and after fork(). */
AP_API int ap_conn_fd(ap_conn *conn, int disown);

AP_API int ap_conn_status(ap_conn *conn);
AP_API int ap_conn_statistics(ap_conn *conn, uint32_t pos, ap_conn_stats *out);

/* Returns the handle, closing the connection if it is open. Thread: any. */
AP_API void ap_conn_release(ap_conn *conn);

/* ---- TLS -------------------------------------------------------------- */

/* Flags of ap_conn_start_tls. */
enum {
    AP_TLS_SERVER = 1, /* the peer speaks first */
    AP_TLS_RAGGED = 2  /* its FIN is as good as a close_notify */
};

/* What a session does. */
enum {
    AP_TLS_NONE,
    AP_TLS_SHAKING, /* the handshake */
    AP_TLS_OPEN,    /* data goes in both directions */
    AP_TLS_ENDED,   /* the peer has sent a close_notify */
    AP_TLS_FAILED
};

typedef struct {
    int phase;             /* AP_TLS_NONE ... */
    int begun;             /* part of a record has come, but not all of it */
    int resumed;           /* the session was resumed, without certificates */
    int kind;              /* of AP_TLS_FAILED: SSL_ERROR_SSL or the like; 0: no memory */
    unsigned long code;    /* likewise: from OpenSSL's error queue */
    long verify;           /* likewise: X509_V_OK, or why the peer's certificate is refused */
    int64_t lasted;        /* the handshake, in nanoseconds; 0: it is not done */
    char reason[160];      /* likewise: OpenSSL's text for code */
    char certificate[160]; /* likewise: OpenSSL's text for verify */
} ap_tls_status;

/* Finds the OpenSSL that the shared object at path, which must have been loaded, calls: the file
 * of Python's module _ssl; or NULL, the program itself. version is what OpenSSL_version_num() says
 * to _ssl. Idempotent. Thread: any. Returns 0; -ENOENT: not loaded; -ENOSYS: a function is missing,
 * or this is a 32-bit system; -EPROTO: another version, one that is not known here (1.1.1 to 3.x
 * are), or not OpenSSL. */
AP_API int ap_tls_load(const char *path, unsigned long version) AP_MUST_CHECK;

/* Whether ssl, an SSL *, belongs to ctx, an SSL_CTX *, and that has these options, and of the
 * verify mode these two bits, SSL_VERIFY_PEER and SSL_VERIFY_FAIL_IF_NO_PEER_CERT. Both are
 * dereferenced. Thread: any, while nobody uses the two. Returns 1; 0; -ENOSYS: nothing is loaded.
 */
AP_API int ap_tls_check(const void *ssl, const void *ctx, unsigned long options, int verify_mode);

/* From now on the socket carries a TLS session, and all reads and writes are of plaintext. ssl is
 * an SSL object of OpenSSL's (ap_tls_load), new, with its role set; a reference is taken, and
 * nobody else may use it, but for ap_conn_hold_tls. What is unread is the session's. The handshake
 * begins. Thread: loop. Returns 0; -EBUSY: it has one, a wait is armed, or output is queued;
 * -EBADF; -ENOMEM; -ENOSYS. */
AP_API int ap_conn_start_tls(ap_conn *conn, uint32_t pos, void *ssl, int flags) AP_MUST_CHECK;

/* Waits for the end of the handshake; with until_pause also until nothing of it has begun and the
 * peer is to go on. Thread: loop. Returns 0: it is done; -EAGAIN (armed as a read wait is);
 * AP_ETLS; AP_ECUT; AP_EEOF; AP_ELATE; -EBADF; the socket's error. */
AP_API int ap_conn_shake(ap_conn *conn, int until_pause, int64_t deadline);

/* Ends this side with a close_notify; sending is over. Idempotent. Thread: loop. Returns the bytes
 * queued; -EBUSY: there is output that is not encrypted yet; -EPIPE after ap_conn_linger;
 * AP_ETLS; -EBADF; the socket's error. */
AP_API int64_t ap_conn_say_goodbye(ap_conn *conn);

/* Both sides have ended the session, and all is read and sent: the socket carries plain bytes
 * again, and what came after the peer's close_notify is unread. Thread: loop. Returns 0; -EBUSY if
 * that is not so; -EBADF; -ENOMEM. */
AP_API int ap_conn_end_tls(ap_conn *conn, uint32_t pos);

/* The SSL object may be asked, until it is released, and the session stands still meanwhile. Nests.
 * Waits for a step of the handshake that is being made. Thread: any, briefly. Returns 0; -EBUSY: it
 * has taken a second; -EBADF: the session is no longer used, so it may be asked anyway, and is not
 * to be released. */
AP_API int ap_conn_hold_tls(ap_conn *conn);
AP_API int ap_conn_release_tls(ap_conn *conn);

/* After the close: waits, for a second at most, until no thread is inside of OpenSSL for the
 * connection. What the SSL object works with may go then. Thread: any. Returns 0; -EBUSY: the
 * connection is open, or that has taken longer. */
AP_API int ap_conn_settle_tls(ap_conn *conn);

/* Thread: loop. Returns 0. After the close there is no session. */
AP_API int ap_conn_tls_status(ap_conn *conn, ap_tls_status *out);

/* ---- blocks ----------------------------------------------------------- */

AP_API void ap_block_unref(ap_block *block);

/* ---- accepting -------------------------------------------------------- */

/* Accept credits, shared by listeners. Thread of all calls: loop. */
AP_API int ap_account_new(ap_account **out) AP_MUST_CHECK;
AP_API void ap_account_unref(ap_account *account);

/* Adds credits, and accepts at once where connections wait. */
AP_API int ap_account_add(ap_account *account, int credits);

/* Takes back a credit. Returns 1, or 0 if it has been spent. */
AP_API int ap_account_take_back(ap_account *account);

/* Takes over a listening, non-blocking socket; like ap_conn_new, and watched at once. */
AP_API int ap_listener_new(ap_poller *poller, ap_hub *hub, int fd, ap_account *account,
                           ap_listener **out) AP_MUST_CHECK;
AP_API uint64_t ap_listener_id(ap_listener *listener);

/* Takes accepted descriptors. Thread: loop. Returns their number, 0 if none
 * wait; -EBADF when closed; an error of accept4 that must not be ignored. */
AP_API int ap_listener_take(ap_listener *listener, ap_accepted *out, int max);

/* As for connections; descriptors not taken are closed. */
AP_API int ap_listener_close(ap_listener *listener, int keep_fd);
AP_API int ap_listener_fd(ap_listener *listener, int disown);
AP_API void ap_listener_release(ap_listener *listener);

/* ---- process ---------------------------------------------------------- */

/* Call this once, in the child of a fork(): closes every descriptor the core
 * owned, and forgets all of the parent's objects. */
AP_API int ap_fork_child(void);

/* Closes a descriptor that the core accepted and that has not been opened yet.
 * -EBADF if it is not the core's. */
AP_API int ap_fd_close(int fd);

/* Sets TCP_NODELAY. 0, or -errno. */
AP_API int ap_fd_nodelay(int fd);

/* ---- fault injection, for tests --------------------------------------- */

enum {
    AP_CALL_READ,
    AP_CALL_WRITE,
    AP_CALL_ACCEPT,
    AP_CALL_EPOLL_CREATE,
    AP_CALL_EPOLL_CTL,
    AP_CALL_EPOLL_WAIT,
    AP_CALL_EVENTFD,
    AP_CALL_ALLOC,
    AP_CALL_MAP,
    AP_CALL_THREAD,
    AP_CALL_ATFORK,
    AP_CALL_SIGNAL, /* write(2) to an event descriptor */
    AP_CALL_DRAIN,  /* read(2) from one */
    AP_CALL_SHUTDOWN,
    AP_CALL_SOCKOPT, /* SO_ERROR, SO_LINGER, TCP_NODELAY */
    AP_CALL_IOCTL,   /* FIONREAD, SIOCOUTQNSD */
    AP_CALL_POLL,
    AP_CALL_ERRQUEUE, /* recvmsg(2) with MSG_ERRQUEUE */
    AP_CALL_CLOSE,    /* is still made: the descriptor is gone whatever it returns */
    AP_CALL_UNMAP,
    AP_CALL_SLEEP, /* ppoll(2) of a poller's thread that guards */
    AP_CALLS
};

/* After skip calls, the next times calls of that kind fail with error (> 0),
 * or, if error is 0, transfer at most limit bytes. times < 0: forever. */
AP_API int ap_fault_set(int call, int error, int skip, int times, size_t limit);
/* How many calls of that kind have failed since then. */
AP_API int ap_fault_hits(int call);
AP_API void ap_fault_clear(void);

#endif
