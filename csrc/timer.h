/* A hierarchical timer wheel: deadlines to the millisecond, O(1) insertion and removal. */
#ifndef ANYPOLL_TIMER_H
#define ANYPOLL_TIMER_H

#include "common.h"

#define AP_WHEEL_LEVELS 8
#define AP_WHEEL_SLOTS 64

typedef struct ap_timer {
    struct ap_timer *prev, *next; /* (d) prev is NULL when not filed */
    uint64_t tick;                /* (d) when it is due */
} ap_timer;

typedef struct {
    uint64_t now;                                    /* (d) the last tick that was run */
    uint64_t used[AP_WHEEL_LEVELS];                  /* (d) a bit per non-empty slot */
    ap_timer slots[AP_WHEEL_LEVELS][AP_WHEEL_SLOTS]; /* (d) heads of rings; tick: the least in it */
    size_t filed;                                    /* (d) */
} ap_wheel;

void ap_wheel_init(ap_wheel *wheel, int64_t now);
void ap_wheel_file(ap_wheel *wheel, ap_timer *timer, int64_t deadline);
void ap_wheel_unfile(ap_wheel *wheel, ap_timer *timer);
/* The moment at which the earliest timer is due, or somewhat before if one was unfiled; AP_FOREVER
 * if nothing is filed. */
int64_t ap_wheel_next(const ap_wheel *wheel);
/* Removes and returns one timer that is due at now, or NULL. */
ap_timer *ap_wheel_expire(ap_wheel *wheel, int64_t now);
static inline bool ap_timer_filed(const ap_timer *timer)
{
    return timer->prev != NULL;
}

#endif
