/* TLS handshakes: computed in a thread that neither a loop nor a driver waits for. */
#ifndef ANYPOLL_TLS_SHAKE_H
#define ANYPOLL_TLS_SHAKE_H

#include "connection.h"

/* Whether there is a step to be made. */
bool ap_tls_wants_step(const ap_conn *conn);
/* Makes it, in the thread for such; or here, if there can be none: then the connection is unlocked
 * meanwhile, and may be closed. */
void ap_tls_step_later(ap_conn *conn);
/* An operation of the slot's; see jobs.h. */
void ap_tls_job(ap_slot *slot);

#endif
