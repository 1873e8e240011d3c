/* Descriptor passing (SCM_RIGHTS): descriptors received with a UNIX stream's bytes, until taken. */
#ifndef ANYPOLL_FDS_H
#define ANYPOLL_FDS_H

#include "connection.h"
#include "slot.h"
#include "sysio.h"

/* Descriptors received with input. */
typedef struct ap_fds {
    struct ap_fds *next; /* (m) among the doomed */
    int count;           /* (m) */
    int numbers[];       /* (m) */
} ap_fds;

/* Closes a whole list, without the mutex. */
void ap_fds_close(ap_fds *fds);

/* Use it instead of ap_slot_unlock wherever descriptors may have been doomed: close(2)
 * may block. */
static inline void ap_conn_unlock(ap_conn *conn)
{
    ap_fds *doomed = conn->doomed;
    if (doomed)
        conn->doomed = NULL;
    ap_slot_unlock(&conn->slot);
    if (doomed)
        ap_fds_close(doomed);
}

/* Files the descriptors that came with the last got bytes. False: no memory; they are closed. */
bool ap_fds_carry(ap_conn *conn, const ap_rights *rights, ssize_t got);
/* Dooms the carried descriptors: nobody will ask for them any more. */
void ap_fds_doom(ap_conn *conn);
/* The loop is shown bytes up to end in the first block, and must report its position. */
void ap_fds_shown(ap_conn *conn, uint32_t end);

#endif
