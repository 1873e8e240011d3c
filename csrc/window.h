/* The read window: the part of the input that the loop may walk without a call. */
#ifndef ANYPOLL_WINDOW_H
#define ANYPOLL_WINDOW_H

#include "connection.h"

#define AP_CLOSED_MEANWHILE (-6000) /* and the mutex is not held; Python never sees it */

/* Consumes up to pos in the block that is shown. */
void ap_window_to(ap_conn *conn, uint32_t pos);
/* The end of a window that begins at the first unread byte, if n bytes are asked for. */
uint32_t ap_window_end(const ap_conn *conn, size_t n);
/* The same, if n bytes lie in the block that was shown; otherwise 0. */
uint32_t ap_window_shown(const ap_conn *conn, size_t n);
/* AP_NEW_BLOCK_SHIFT's bit, if the window lies in a block not shown yet. */
int64_t ap_window_new_block(const ap_conn *conn);
/* Makes the bytes of the block, which becomes the chain's, the first unread ones. */
void ap_window_put_front(ap_conn *conn, ap_block *block);
/* Moves the first n unread bytes into one block, at times without the mutex.
 * 0; -ENOMEM; AP_CLOSED_MEANWHILE. */
AP_MUST_CHECK int ap_window_join(ap_conn *conn, size_t n);

#endif
