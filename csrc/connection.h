/* A connection's state, and the queries about it.
 *
 * Two sides work on it, the driver (serve.c) and the loop, each under the slot's mutex.
 * The loop consumes and the driver only appends, so whatever the loop was handed stays
 * unchanged.
 *
 * The ways a connection can end are independent of one another:
 *   read_end     nothing more will be received: FIN (AP_EEOF), an error, or
 *                idleness. Buffered input stays readable.
 *   write_error  nothing more can be sent.
 *   shut         this side has sent its FIN.
 *   slot.closed  the owner has closed it: everything else is moot.
 * Half-close is not close: a read_end of AP_EEOF leaves writing unaffected.
 */
#ifndef ANYPOLL_CONNECTION_H
#define ANYPOLL_CONNECTION_H

#include "chain.h"
#include "slot.h"

#define AP_BOUND (256u * 1024) /* bytes moved under one hold of a slot's mutex */
#define AP_WINDOW (64u * 1024) /* shown beyond a request, initially */
#define AP_DELIMITER_INLINE 16

enum ap_want {
    AP_WANT_NOTHING,
    AP_WANT_BYTES,
    AP_WANT_DELIMITER,
    AP_WANT_READABLE,
    AP_WANT_END,
    AP_WANT_SESSION /* of TLS: the end of its handshake */
};

typedef struct ap_tls ap_tls;

struct ap_conn {
    ap_slot slot;
    uint8_t type; /* (c) AP_TCP, AP_UNIX or AP_SEQPACKET */
    ap_tls *tls;  /* (m) NULL: input and output are the socket's */

    /* input, all (m) */
    ap_chain input;
    ap_block *shown;        /* the block that was handed out; always input.head or NULL */
    uint32_t window;        /* shown beyond a request: bounds unreported consumption */
    uint64_t consumed;      /* bytes, since the beginning */
    uint32_t high, low;     /* water marks */
    uint32_t grow;          /* size of the next block */
    uint32_t base;          /* minimum block size; also that of the first block */
    uint32_t recent;        /* bytes that the last read brought */
    int read_end;           /* 0, AP_EEOF, AP_EIDLE or -errno: nothing more will come */
    bool paused;            /* above high water, until below low */
    bool discarding;        /* input is thrown away */
    bool straight;          /* the driver leaves it in the socket, for ap_conn_read_straight */
    bool was_reset;         /* RST noticed behind input that nobody reads */
    struct ap_fds *carried; /* came with the bytes from carried_from to carried_to */
    uint64_t carried_from, carried_to; /* positions in the stream */
    struct ap_fds *doomed;             /* to be closed without the mutex: ap_conn_unlock */

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
    bool lent;         /* the loop got a block since the last trim: it, or the pool, may have it */

    /* request mode, all (m): the state when the last call began */
    bool any_more;         /* a wait for one byte more may read on beyond high water */
    uint64_t request_at;   /* bytes consumed; for messages: how many were received */
    uint64_t request_seen; /* bytes arrived; for messages: the bytes of those waiting */

    /* the peer, all (m); see ap_conn_learn */
    bool watching_peer; /* AP_MAIL_GONE is wanted */
    bool peer_gone;     /* known to have gone, whoever learned it */
    bool cut;           /* from now on what the socket shows is this side's own doing */

    /* output, all (m) */
    struct iovec *out; /* queued pieces: first our own copies, then Python's memory */
    ap_block *own;     /* holds the first own_count pieces */
    uint32_t own_count;
    size_t own_bytes;
    uint32_t out_first, out_count, out_capacity;
    size_t out_bytes;
    size_t given_up;   /* of those that are not our own copies, the first: nobody waits for them */
    int write_error;   /* 0, AP_EIDLE or -errno */
    bool held;         /* between ap_conn_hold and ap_conn_requeue */
    bool owed;         /* AP_MAIL_SENT must follow */
    bool shut;         /* SHUT_WR was done */
    bool goodbye;      /* a close_notify was made: nothing follows it */
    bool watching_out; /* not on AP_TCP: EPOLLOUT is in the mask */
    int send_error;    /* the errno of sendmsg (on AP_SEQPACKET also of recvmsg), which has
                        * taken the socket's error */
    bool drain_armed, drain_writable, drain_expired;
    bool out_counted; /* in the poller's with_output */
    int64_t drain_deadline;

    /* time and counts, (m) where not atomic */
    int64_t idle, idle_from, created_at;
    _Atomic int64_t last_activity; /* (a) relaxed: for statistics */
    ap_counter reads, writes, bytes_received, bytes_sent, wakeups;
    ap_pins pins; /* of blocks left to views; each holds a reference to the slot */
};

static inline ap_conn *ap_conn_of(ap_slot *slot)
{
    return AP_CONTAINER(slot, ap_conn, slot);
}

/* Whether this side has ended. */
static inline bool ap_conn_is_shut(const ap_conn *conn)
{
    return conn->shut || conn->goodbye;
}

/* Makes sure that the slot is looked at when the deadline comes. */
void ap_conn_note_deadline(ap_conn *conn, int64_t deadline);
/* A byte has come or gone. */
void ap_conn_note_activity(ap_conn *conn);
/* After anything that may show that the peer has gone: remembers it, and tells the hub, once. */
void ap_conn_learn(ap_conn *conn);
/* After an error that may be the peer's doing: asks the socket. */
void ap_conn_ask(ap_conn *conn);
/* This side is about to end the socket, or to stop watching it. */
void ap_conn_cut(ap_conn *conn);
/* Whether a socket error (-errno) means that nobody is at the other end any more. */
bool ap_is_of_peer(int error);
/* The unread bytes, with the loop at pos in the block that is shown. */
size_t ap_conn_left(const ap_conn *conn, uint32_t pos);

#endif
