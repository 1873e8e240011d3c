/* A poller's step. */
#ifndef ANYPOLL_DRIVER_H
#define ANYPOLL_DRIVER_H

#include "poller.h"

/* Slots that a step serves: bounds how long events, inbox and timers wait. */
#define AP_THREAD_BUDGET 1024
/* The same for a loop, which has other things to do. */
#define AP_LOOP_BUDGET 256

/* Brings a lent poller up to date for a caller who does not yield to the loop, as the thread would
 * have done. Without the mutex of any slot. Thread: any. */
void ap_driver_catch_up(ap_poller *poller);

/* The rest is for whoever holds the lease. As ap_poller_step. */
int ap_driver_step(ap_poller *poller, int timeout_ms, int budget);
/* Before the lease of a lent poller is let go. */
void ap_driver_rest(ap_poller *poller);
/* When something is due next; AP_FOREVER: nothing is. */
int64_t ap_driver_due(const ap_poller *poller);

#endif
