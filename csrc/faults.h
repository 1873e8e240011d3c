/* Fault injection: system calls that tests make fail. anypoll.h has the tests' side. */
#ifndef ANYPOLL_FAULTS_H
#define ANYPOLL_FAULTS_H

#include "common.h"

#define AP_FAULT_SHORT (-1)
/* What to do with this call: 0: make it; an errno: fail with it; AP_FAULT_SHORT:
 * transfer at most *limit bytes. */
int ap_fault_next(int call, size_t *limit);
/* The same for a call that transfers nothing: the errno, or 0. */
int ap_fault_error(int call);

#endif
