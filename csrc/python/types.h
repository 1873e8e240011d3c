/* The structs of the native types. native.h has their files and functions. */
#ifndef ANYPOLL_PYTHON_TYPES_H
#define ANYPOLL_PYTHON_TYPES_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "anypoll.h"

#include <stdbool.h>
#include <string.h>

#define SHUT (-1)            /* a window's end that no request can satisfy */
#define CLAIMED 1            /* the caller of flush() is the sender already */
#define BATCH 128            /* tokens taken at once */
#define VECTORED (16 * 1024) /* from this size on output is sent by itself, piece by piece */

typedef struct Core Core;
typedef struct Reader Reader;
typedef struct Operation Operation;
typedef struct Requests Requests;
typedef struct Workers Workers;

typedef struct {
    PyObject_HEAD ap_block *block; /* a reference of the core's */
    uint32_t size, first, last;    /* what the next buffer shows */
} Block;

struct Reader {
    PyObject_HEAD PyObject *source; /* a Core, or what else has fill() and find() */
    Core *core;                     /* the same, if it is one that is read here; borrowed */
    PyObject *view;                 /* a Block or a memoryview: the window lies in it */
    long long start, end;
    long budget; /* calls that may follow one another without a checkpoint */
    long long limit;
};

typedef struct {
    PyObject_HEAD PyObject *pieces; /* a list: pending output */
    PyObject *tail;                 /* and what follows it, joined: bytes with room; or NULL */
    Py_ssize_t used;                /* of the tail */
    long long size;                 /* of both, in bytes */
    PyObject *reserved;             /* a list: the open reservation */
    long long reserved_size;
    long long high_water;
    PyObject *sink; /* a Core, or what else has flush(); NULL in a LinkBuffer */
    char shut;
} Writer;

typedef struct Hub Hub;
typedef struct Drive Drive;
typedef struct walk walk;

struct Core {
    PyObject_HEAD ap_conn *conn; /* owned */
    unsigned long long number;
    int kind;
    int failure;
    long budget;
    long long straight; /* bytes that a receive() holds which has not returned yet */
    char closed, draining, reading, writing, flushing;
    char over; /* the descriptor is closed, or given away */
    char held;
    Hub *hub;
    Reader *reader;
    Writer *writer;
    PyObject *limits, *read_timeout, *write_timeout, *idle_timeout;
    PyObject *handle;                     /* for cffi, once it was asked for */
    PyObject *poller, *peer, *raw, *name; /* Python's alone, as are these: */
    PyObject *requests, *watcher, *callbacks;
    PyObject *session;  /* what OpenSSL works with for it; or None */
    PyObject *trap;     /* what Trio's scheduler is given while an operation waits */
    Operation *waiting; /* armed, and listed with the hub */
    Core *next, *prev;  /* in the hub's list */
};

struct Hub {
    PyObject_HEAD ap_hub *hub; /* Python holds the handle */
    char dead;
    char trio;              /* the loop is a Trio run */
    unsigned long thread;   /* the loop's */
    int depth;              /* calls of dispatch() in progress */
    PyObject *loop;         /* a weak reference; asyncio only */
    PyObject *outputs;      /* a dict by number: memory that the core is still sending */
    Drive *stepping;        /* whose handler runs; borrowed */
    PyObject *current_task; /* the loop's function */
    PyObject *tasks;        /* its dict of current tasks, if known: hub_current_task() */
    PyObject *look;         /* the loop's function: raises in a cancelled scope */
    PyObject *states;       /* AnyIO's states of tasks, by weak references; or None */
    PyObject *shielded;     /* Trio's trap for a round of the scheduler that is not cancelled */
    PyObject *reschedule, *value; /* Trio's function, and what tasks are sent */
    PyObject *slots;              /* descriptors of Trio's and AnyIO's attributes; slot_get() */
    PyObject *runner, *wait_trap, *instruments;             /* of Trio's inside; see */
    PyObject *abort_succeeded, *abort_failed, *unprotected; /* drive_trio.c */
    PyObject *stepper;                                      /* Trio: the method _step_on */
    walk *walk;                                             /* for it */
    PyObject *entered; /* asyncio: the task that the walk has made the current one */
    Core **cores;      /* by the index of their slots; borrowed */
    uint32_t room;
    Drive *resting, *last_resting; /* in their order; the list holds them strongly; see rest.c */
    uint32_t rounds_asked, rounds_begun;
    char can_rest;    /* somebody resumes those that rest */
    bool round_due;   /* those that rest now have not asked for theirs yet */
    PyObject *rester; /* Trio: the task that resumes them, while it waits; or None */
    Core *waiting;    /* those with an armed operation; the list holds both strongly */
    Requests *idle;   /* connections in request mode that wait; the list holds them strongly */
    size_t armed;     /* how many wait, in both lists */
    uint32_t jobs;    /* that workers have begun; wraps around */
    Workers *due;     /* look at their queues in the next round; the list holds them strongly */
    bool crowded;     /* the last turn has left something to others that the loop runs */
    PyObject *queue;  /* a weak reference to what the loop will run at once; or None */
    PyObject *frame;  /* of Trio's loop; or None */
};

typedef struct {
    PyObject_HEAD Reader *reader;
} Stream;

/* ---- what asyncio's tasks take for a future: the head of operations and drives ---- */

/* clang-format off */
#define FUTURE_HEAD                                                                     \
    PyObject_HEAD                                                                       \
    int8_t blocking;   /* asyncio's handshake: -1 None, 0 False, 1 True */              \
    bool cancelled;    /* by the task, which is told so when it asks for the result */  \
    bool asked;        /* the task has asked for the result since it was woken */           \
    PyObject *wake;    /* the task's wake-up, while it waits */                         \
    PyObject *context; /* what that runs in, or NULL */                                 \
    PyObject *message; /* of the cancellation */
/* clang-format on */

typedef struct {
    FUTURE_HEAD
} Future;

/* ---- what an operation does, and where it is; operation.c has the table ---- */

enum kind { FILL, PEEK, NEXT, SKIP, READ_BYTES, UNTIL, FIND, RECEIVE, SEND, FLUSH, KINDS };
enum state { NEW, INNER, ARMED, READY, YIELDED, OPEN, OVER };
/* what follows when an inner coroutine has ended; send.c has those from LOOKED on */
enum step { ASK = 1, SOURCE, CHECKED, LOOKED, DRAINED, SENT, FLUSHED, RESTED };

struct Operation {
    FUTURE_HEAD /* wake may be a drive, too, or a task of Trio's */
        uint8_t kind,
        state, step;
    uint8_t flags;      /* AP_SCATTER; of FLUSH: CLAIMED */
    bool suspended;     /* it has waited, or yielded */
    bool iterates;      /* RECEIVE: the end of the stream is that of an iteration */
    bool reading;       /* it holds core->reading */
    bool writing;       /* it holds core->writing */
    Reader *reader;     /* NULL if it sends */
    Core *core;         /* of the reader; NULL if that is no native one */
    PyObject *argument; /* the number as it was given, the delimiter, or what is to be sent */
    PyObject *limit;    /* max_bytes as it was given, or NULL */
    Py_ssize_t n, most; /* bytes wanted, and at most */
    int64_t deadline;
    int64_t end;        /* where the window ends now, as the token said; 0: unknown */
    PyObject *inner;    /* a coroutine of Python's that has to end first */
    PyObject *received; /* bytes straight from the socket, not returned yet */
};

/* ---- a handler and its task; drive.c has the table ------------------------ */

enum drive_state { D_NEW, D_RUNNING, D_PARKED, D_RESTING, D_IDLE, D_LEAVING, D_PASSING, D_OVER };

struct Drive {
    FUTURE_HEAD
    uint8_t state;
    bool must_cancel;  /* while the handler ran in the name of the task */
    bool has_run;      /* in this resumption */
    bool by_hub;       /* is being stepped by it, not by the task */
    bool is_protected; /* Trio: the task, from KeyboardInterrupt */
    bool ended;        /* LEAVING: outcome is the handler's result */
    Hub *hub;
    PyObject *inner; /* the handler's coroutine */
    PyObject *task;
    PyObject *outcome;     /* LEAVING: what the handler has yielded, or its result; or NULL */
    PyObject *exception;   /* LEAVING: what it has raised; or NULL */
    PyObject *interrupt;   /* LEAVING: what is to be thrown into it; or NULL */
    PyObject *abort;       /* Trio: the method _abort, once it was needed */
    PyObject *scopes;      /* asyncio: AnyIO's TaskState of the task, once it was needed */
    Drive *prev, *next;    /* RESTING: in the hub's list; IDLE: in that of its workers */
    uint32_t round;        /* RESTING: goes on in that one */
    bool by_task;          /* is resumed by its task, always */
    bool looking;          /* counts in pool->looking */
    Workers *pool;         /* a worker: whose jobs it does, one after another; or NULL */
    Requests *job;         /* whose step the coroutine is part of */
    PyObject *job_context; /* that runs in it */
};

/* ---- request mode; requests.c has the table -------------------------------- */

enum phase { P_BEGIN, P_BEFORE, P_CALL, P_END };

struct Requests {
    PyObject_HEAD Core *core;
    PyObject *conn;     /* the argument of calls */
    PyObject *function; /* what is called */
    PyObject *before;   /* what a worker calls first of all; or NULL */
    PyObject *owner;    /* decides what becomes of the connection */
    PyObject *call;     /* of the owner: calls the function; or None */
    PyObject *context;  /* steps run in copies of it */
    Workers *pool;
    Requests *next, *prev; /* in the hub's list of idle ones; next: in the queue of the pool */
    uint8_t phase;
    bool idle, queued;
    bool closing; /* an aclose() reads; whoever would become idle is parked */
    bool parked;
    char fresh;    /* the unread input is new to the function */
    char due;      /* as far as the core knows, a call has begun */
    char over;     /* no call will begin any more */
    char carries;  /* output of earlier calls is still pending */
    char taskless; /* it has begun, and no step is running */
};

struct Workers {
    PyObject_HEAD Hub *hub;
    PyObject *start;        /* starts a task that runs an async function; returns whether it can */
    Requests *ready, *last; /* the queue; holds them strongly */
    Drive *idle;            /* without a job; the list holds them strongly */
    int parked;             /* how many they are */
    int looking;    /* workers whose tasks will look at the queue, including those being started */
    int starting;   /* those whose tasks have not begun */
    bool is_due;    /* in the hub's list */
    bool is_walked; /* the hub will look at it again in this walk */
    Workers *next_due;
};

#endif
