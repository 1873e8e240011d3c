/* A driver's run list: slots with work left, served round robin.
 *
 * All of it is the driver's.
 */
#ifndef ANYPOLL_RUNLIST_H
#define ANYPOLL_RUNLIST_H

#include "poller.h"
#include "slot.h"

#define AP_RUN_BYTES (256u * 1024) /* read in one step of a loop, or few more */

/* Appends the slot, unless it is already on the list. */
void ap_run_later(ap_poller *poller, ap_slot *slot);
/* Serves at most budget slots, each of them once, until much was read. Returns how many. */
int ap_run(ap_poller *poller, int budget);
/* Does what the inbox asks for. */
void ap_run_inbox(ap_poller *poller);
/* Releases everything queued for the driver, which has ended. */
void ap_run_clear(ap_poller *poller);

/* Gives back free memory, if that is due. */
void ap_run_sweep(ap_poller *poller);
/* Plans that: blocks are in use or coming back. */
void ap_run_sweep_later(ap_poller *poller);

#endif
