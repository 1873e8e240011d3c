/* Fork handling: the child closes the descriptors it inherited, and starts afresh.
 *
 * Nothing else may be done with them (epoch.c). The child finds the descriptors in a
 * bitmap (owned.c), and forgets the parent's slots and pools.
 */
#include "anypoll.h"

#include "openssl.h"
#include "owned.h"
#include "pool.h"
#include "slot.h"
#include "sysio.h"

int ap_fork_child(void)
{
    ap_fd_disown_all(ap_sys_close);
    ap_slot_table_reset();
    ap_pools_reset();
    ap_tls_reset();
    return 0;
}

/* Only if it is (still) the core's: in a child the number may be someone else's. */
int ap_fd_close(int fd)
{
    if (!ap_fd_disown(fd))
        return -EBADF;
    ap_sys_close(fd);
    return 0;
}
