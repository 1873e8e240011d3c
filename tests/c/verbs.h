/* verbs.h - the calls that a connection takes, each in its simplest form: what it does when it is
 * open, closed, or another process's. */
#ifndef VERBS_H
#define VERBS_H

#include "fixture.h"

/* Whatever is called: a result that is >= 0, or the error. */
#define EACH_VERB(V)                                           \
    V(register, ap_conn_register(&c, &result, 1) ? result : 0) \
    V(read, ap_conn_read(c, 0, 1, 0, 0, NULL, 0))              \
    V(find, ap_conn_find(c, 0, "\n", 1, 100, 0, 0, NULL, 0))   \
    V(request, ap_conn_request(c, 0, 0, NULL, 0))              \
    V(read_straight, ap_conn_read_straight(c, 0, &byte, 1))    \
    V(block, ap_conn_block(c, 0, &view))                       \
    V(rewind, ap_conn_rewind(c, NULL, &pos))                   \
    V(consume, ap_conn_consume(c, 0, 0))                       \
    V(buffered, ap_conn_buffered(c, 0))                        \
    V(disarm_read, ap_conn_disarm_read(c))                     \
    V(disarm_write, ap_conn_disarm_write(c))                   \
    V(write, ap_conn_write(c, "x", 1))                         \
    V(send_nothing, ap_conn_send(c, NULL, 0))                  \
    V(drain, ap_conn_drain(c, 0, 0))                           \
    V(hold, ap_conn_hold(c))                                   \
    V(requeue, ap_conn_requeue(c, NULL, 0))                    \
    V(give_up, ap_conn_give_up(c))                             \
    V(queued, ap_conn_queued(c))                               \
    V(awaited, ap_conn_awaited(c))                             \
    V(report, ap_conn_report(c, 0))                            \
    V(set_block, ap_conn_set_block(c, AP_BLOCK_MIN))           \
    V(set_idle, ap_conn_set_idle(c, 0))                        \
    V(fd, ap_conn_fd(c, 0))                                    \
    V(linger, ap_conn_linger(c, 0, 0))                         \
    V(shutdown, ap_conn_shutdown(c))                           \
    V(watch_peer, ap_conn_watch_peer(c))                       \
    V(detach, ap_conn_detach(c, 0))                            \
    V(close, ap_conn_close(c, 0, 0))

#define VERB_NUMBER(name_, call_) VERB_##name_,
enum verb { EACH_VERB(VERB_NUMBER) VERBS };

#define VERB_NAME(name_, call_) #name_,
static const char *const verb_names[] = {EACH_VERB(VERB_NAME)};

static inline int64_t verb_call(enum verb verb, ap_conn *c)
{
    int result;
    uint32_t pos = 0;
    char byte;
    ap_view view;
    switch (verb) {
#define VERB_CASE(name_, call_) \
    case VERB_##name_: return call_;
        EACH_VERB(VERB_CASE)
    default: return -ENOSYS;
    }
}

/* Every verb in turn gives this error. */
static inline void verbs_all_fail(ap_conn *c, int64_t error)
{
    for (enum verb verb = 0; verb < VERBS; verb++) {
        int64_t got = verb_call(verb, c);
        if (got != error)
            CHECK_FAIL("%s: %lld, not %lld", verb_names[verb], (long long)got, (long long)error);
    }
}

#endif
