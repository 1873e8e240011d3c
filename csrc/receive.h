/* What a system call that receives has brought. */
#ifndef ANYPOLL_RECEIVE_H
#define ANYPOLL_RECEIVE_H

#include "connection.h"

#include <sys/types.h>

/* All of it is under the slot's mutex. */

/* Receives into memory of the caller's. Returns the bytes; 0: none, or nothing more will come. */
size_t ap_receive(ap_conn *conn, void *memory, size_t size);
/* Draws the conclusions of a system call: the bytes, or -errno, of what was offered. Returns as
 * ap_receive. */
size_t ap_receive_conclude(ap_conn *conn, ssize_t got, size_t offered);
/* Handles EAGAIN from recvmsg. */
void ap_receive_nothing(ap_conn *conn);
/* Handles an error (-errno) of recvmsg, or of the socket. */
void ap_receive_fail(ap_conn *conn, int error);
/* Handles 0 from recvmsg: AP_EEOF, or the error that another call was told. */
int ap_receive_end(const ap_conn *conn);
/* Counts received bytes, and adapts the size of blocks. */
void ap_receive_note(ap_conn *conn, size_t got);

/* Restarts a last block that was read to its end, and that no view needs. */
void ap_receive_rewind(ap_conn *conn);
/* Appends a block to the chain; the caller counts its bytes. */
void ap_receive_append(ap_conn *conn, ap_block *block);

#endif
