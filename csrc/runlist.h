/* A driver's run list: slots with work left, served round robin.
 *
 * All of it is the driver's.
 */
#ifndef ANYPOLL_RUNLIST_H
#define ANYPOLL_RUNLIST_H

#include "poller.h"
#include "slot.h"

/* Puts the slot behind the others, unless it is on the list. */
void ap_run_later(ap_poller *poller, ap_slot *slot);
/* Serves at most budget slots, each of them once. Returns how many. */
int ap_run(ap_poller *poller, int budget);
/* Does what is asked for in the inbox. */
void ap_run_inbox(ap_poller *poller);
/* Lets go of all that is queued for the driver; it has ended. */
void ap_run_clear(ap_poller *poller);

/* Gives free memory back, if that is due. */
void ap_run_sweep(ap_poller *poller);
/* Blocks are in use or coming back: it will be due. */
void ap_run_sweep_later(ap_poller *poller);

#endif
