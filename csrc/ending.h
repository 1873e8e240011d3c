/* A poller's shutdown: a state machine that ends in drained or failed. */
#ifndef ANYPOLL_ENDING_H
#define ANYPOLL_ENDING_H

#include "poller.h"

/* Counts one more connection, unless the poller has ended. 0; AP_EPOLLER. */
AP_MUST_CHECK int ap_poller_admit(ap_poller *poller);
/* Counts one fewer. */
void ap_poller_dismiss(ap_poller *poller);
/* The rest is the driver's. Handles the result of a wait: a failed poller ends. */
void ap_poller_judge(ap_poller *poller, int result);
/* Ends a poller that was to end with its last connection. */
void ap_poller_end_drained(ap_poller *poller);

#endif
