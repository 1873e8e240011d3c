/* Descriptor passing (SCM_RIGHTS): descriptors received with a UNIX stream's bytes, until taken.
 *
 * A plain recv would close descriptors that come between the bytes, so a stream is
 * read with room for as many as a message can carry. One recvmsg stops after a
 * message with descriptors but prepends earlier bytes to it (measured), so the
 * descriptors belong to the whole span of bytes of that call: carried_from to
 * carried_to. A call that asks for descriptors and takes any byte of the span gets
 * them; any other call that consumes its last byte closes them. While some are
 * carried, input is paused, so there are never more: a peer must not be able to
 * fill our descriptor table. The exception is a wait for bytes beyond the span,
 * which would not end otherwise. If it brings others, the first ones are closed:
 * whoever waits for bytes across a message with descriptors does not want them.
 *
 * The loop moves through its window without telling C. So when it is shown the last
 * byte of the span, it gets a token with it (AP_MAIL_FDS), and then reports.
 *
 * Descriptors are closed without the slot's mutex: close(2) may block.
 */
#include "fds.h"

#include "connection.h"
#include "hub.h"
#include "inbox.h"
#include "slot.h"
#include "sysio.h"

#include <stdlib.h>

void ap_fds_close(ap_fds *fds)
{
    while (fds) {
        ap_fds *next = fds->next;
        for (int i = 0; i < fds->count; i++)
            ap_sys_close(fds->numbers[i]);
        free(fds);
        fds = next;
    }
}

void ap_fds_doom(ap_conn *conn)
{
    AP_ASSERT_LOCKED(&conn->slot);
    ap_fds *fds = conn->carried;
    if (!fds)
        return;
    conn->carried = NULL;
    fds->next = conn->doomed;
    conn->doomed = fds;
    if (conn->slot.ready & AP_READABLE) /* input resumes */
        ap_inbox_push(&conn->slot, AP_BOX_WORK, AP_DUE_NOW);
}

bool ap_fds_carry(ap_conn *conn, const ap_rights *rights, ssize_t got)
{
    size_t size = sizeof(ap_fds) + (size_t)rights->count * sizeof(int);
    ap_fds *fds = got > 0 ? ap_sys_alloc(size) : NULL;
    if (!fds) {
        for (int i = 0; i < rights->count; i++)
            ap_sys_close(rights->fds[i]);
        return false;
    }
    ap_fds_doom(conn); /* of a span beyond which someone waits */
    fds->count = rights->count;
    memcpy(fds->numbers, rights->fds, (size_t)rights->count * sizeof(int));
    conn->carried = fds;
    conn->carried_to = conn->consumed + conn->input.size;
    conn->carried_from = conn->carried_to - (uint64_t)got;
    return true;
}

void ap_fds_shown(ap_conn *conn, uint32_t end)
{
    if (conn->carried && conn->consumed + (end - conn->input.head->start) >= conn->carried_to)
        ap_hub_post(&conn->slot, AP_MAIL_FDS);
}
