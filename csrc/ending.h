/* How a poller ends. */
#ifndef ANYPOLL_ENDING_H
#define ANYPOLL_ENDING_H

#include "poller.h"

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

#endif
