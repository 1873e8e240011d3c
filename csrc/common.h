/* Definitions shared by the whole core: field ownership, lock order, macros, counters.
 *
 * Every struct field is marked with the letter of its owner:
 *   (c) constant while the slot is open: any thread reads, nobody writes
 *   (m) under the slot's mutex
 *   (d) the driver only: whoever holds the poller's lease
 *   (l) the loop's thread only
 *   (h) under the hub's mutex
 *   (s) under the mutex of the slot table
 *   (j) under the mutex of the poller's jobs
 *   (a) atomic; the comment says which order pairs with what
 *   (o) the thread that owns the pool: the driver for a poller's, the loop for a hub's
 *
 * Locks are taken in this order: lease, account, slot, hub. The mutexes of the slot
 * table, of the list of pools, of a poller's jobs and of the binding to OpenSSL are
 * leaves, as is the gate (gate.c), and atomics need no order. Nobody takes a slot's mutex
 * while holding a hub's: a dying hub unlinks its slots under its mutex, and closes them
 * afterwards.
 *
 * docs/internals/README.md shows which file may include which, and
 * scripts/check-includes.py enforces it.
 */
#ifndef ANYPOLL_COMMON_H
#define ANYPOLL_COMMON_H

#include "anypoll.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- debug assertions -------------------------------------------------
 * They abort, so they exist only in builds made for tests (AP_DEBUG). */
#ifdef AP_DEBUG
#include <assert.h>
#define AP_ASSERT(condition) assert(condition)
#else
#define AP_ASSERT(condition) ((void)0)
#endif

#define AP_ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#define AP_CONTAINER(pointer, type, member) ((type *)((char *)(pointer) - offsetof(type, member)))

/* ---- counters ---------------------------------------------------------
 * Relaxed: they order nothing, and a reader may see them a little late. */
typedef _Atomic uint64_t ap_counter;

static inline void ap_count(ap_counter *counter, uint64_t n)
{
    atomic_fetch_add_explicit(counter, n, memory_order_relaxed);
}

static inline void ap_uncount(ap_counter *counter, uint64_t n)
{
    atomic_fetch_sub_explicit(counter, n, memory_order_relaxed);
}

static inline uint64_t ap_counted(const ap_counter *counter)
{
    return atomic_load_explicit(counter, memory_order_relaxed);
}

#endif
