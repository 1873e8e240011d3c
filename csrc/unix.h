/* Descriptors that travel with bytes. */
#ifndef ANYPOLL_UNIX_H
#define ANYPOLL_UNIX_H

#include "connection.h"
#include "sysio.h"

/* Descriptors that came with the last got bytes of the input. False: no memory; they are closed. */
bool ap_fds_carry(ap_conn *conn, const ap_rights *rights, ssize_t got);
/* Those that are carried will not be asked for any more. */
void ap_fds_doom(ap_conn *conn);
/* The loop is shown bytes up to end in the first block: it has to report how far it comes. */
void ap_fds_shown(ap_conn *conn, uint32_t end);

#endif
