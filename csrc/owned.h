/* A bitmap of the descriptors that the core owns. */
#ifndef ANYPOLL_OWNED_H
#define ANYPOLL_OWNED_H

#include "common.h"

void ap_fd_own(int fd);
/* False: it was not the core's. One too large for the bitmap may still be. */
bool ap_fd_disown(int fd);
/* Disowns all descriptors, and passes each to take. */
void ap_fd_disown_all(void (*take)(int fd));

#endif
