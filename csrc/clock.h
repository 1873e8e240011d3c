/* The monotonic clock, in nanoseconds. */
#ifndef ANYPOLL_CLOCK_H
#define ANYPOLL_CLOCK_H

#include "common.h"

#include <time.h>

#define AP_FOREVER INT64_MAX /* a moment that never comes */

static inline int64_t ap_clock_read(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t ap_now(void)
{
    return ap_clock_read(CLOCK_MONOTONIC);
}

/* Cheaper, and behind by up to a kernel tick (1 to 10 ms). */
static inline int64_t ap_now_coarse(void)
{
    return ap_clock_read(CLOCK_MONOTONIC_COARSE);
}

#endif
