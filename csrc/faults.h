/* Fault injection: system calls that tests make fail. anypoll.h has the tests' side. */
#ifndef ANYPOLL_FAULTS_H
#define ANYPOLL_FAULTS_H

#include "common.h"

#define AP_FAULT_SHORT (-1)
/* What is to become of this call: 0, it is made; an errno to fail with; or
 * AP_FAULT_SHORT, it transfers at most *limit bytes. */
int ap_fault_next(int call, size_t *limit);
/* The same of a call that transfers nothing: the errno, or 0. */
int ap_fault_error(int call);

#endif
