/* A poller's thread: it drives, or guards a loop that drives. */
#ifndef ANYPOLL_GUARD_H
#define ANYPOLL_GUARD_H

#include "poller.h"

/* How long a loop may take to come for an event before the guard does, in nanoseconds. */
#define AP_GRACE ((int64_t)5 * 1000 * 1000)

/* A connection has some output queued, or none any more. */
void ap_guard_output(ap_poller *poller, bool queued);

#endif
