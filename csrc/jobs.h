/* Long computations for slots, in a thread of the poller's own. */
#ifndef ANYPOLL_JOBS_H
#define ANYPOLL_JOBS_H

#include "poller.h"

/* The slot's operation `job` will be called, when its turn comes; once more, if it is running now.
 * begun: before those that have not.
 * Under the slot's mutex, by whoever has a reference; the slot may be closed.
 * 0; -ECANCELED after ap_poller_stop; -EAGAIN, -EPERM: there can be no thread. */
AP_MUST_CHECK int ap_jobs_push(ap_slot *slot, bool begun);

/* Pushes are accepted (again). */
void ap_jobs_allow(ap_poller *poller);
/* Refuses pushes, forgets what is queued, and joins the thread once it has finished the job that
 * it runs. The caller has a reference to the poller, and none of its locks. */
void ap_jobs_stop(ap_poller *poller);

#endif
