/* A hub: an event loop's mailbox with an event descriptor, the one way pollers reach the loop. */
#ifndef ANYPOLL_HUB_H
#define ANYPOLL_HUB_H

#include "context.h"
#include "slot.h"

#include <pthread.h>

/* How a loop that drives waits without sleeping; loan.c has the rules. */
typedef struct {
    int64_t began;  /* (l) the turn of the loop */
    int64_t ended;  /* (l) the last spin */
    bool found;     /* (l) by that */
    bool alone;     /* (l) there is one core: nothing comes while the loop runs */
    uint32_t doubt; /* (l) how much more often it was in vain of late than not */
    uint32_t pause; /* (l) chances to be passed up */
} ap_spin;

struct ap_hub {
    int efd;              /* (h) written; the loop, which ends first, reads it freely */
    uint32_t epoch;       /* (c) */
    _Atomic int32_t refs; /* (a) acq_rel: the loop, each open slot */
    pthread_mutex_t mutex;
    bool dead;                  /* (h) */
    ap_slot *open;              /* (h) */
    ap_slot *_Atomic mailbox;   /* (a) see ap_hub_post */
    _Atomic uint32_t signalled; /* (a) see ap_hub_post */
    ap_slot *taken;             /* (l) the rest of a list that was taken */
    int batch;                  /* (l) how many tokens the last list yielded */
    ap_context context;         /* (l) */
    ap_spin spin;
};

void ap_hub_ref(ap_hub *hub);
/* Notifies the loop. Under the mutex of an open slot: ap_hub_kill relies on it. */
void ap_hub_post(ap_slot *slot, uint32_t bits);
/* Until the tokens are taken, which the caller does next, nobody signals the hub. Thread: loop. */
void ap_hub_hush(ap_hub *hub);
/* Whether ap_hub_take_hushed will find anything. Thread: loop. */
bool ap_hub_has_mail(ap_hub *hub);
/* As ap_hub_take, after that. */
int ap_hub_take_hushed(ap_hub *hub, ap_token *tokens, int max);
/* Adds the slot to the open slots of its hub, which closes them when it dies. 0; -EBADF: it
 * is dead. */
AP_MUST_CHECK int ap_hub_link(ap_slot *slot);
void ap_hub_unlink(ap_slot *slot);

#endif
