/* Fault injection: system calls that tests make fail.
 *
 * A fault belongs to a kind of call, AP_CALL_*: it lets some calls pass, then fails
 * some, and counts those. Faults are process-wide: calls of all threads count.
 */
#include "faults.h"

typedef struct {
    _Atomic int error, skip, times, hits; /* (a) relaxed: a test arms them before the calls */
    _Atomic size_t limit;
} fault;

static _Atomic int faults_set;
static fault faults[AP_CALLS];

int ap_fault_set(int call, int error, int skip, int times, size_t limit)
{
    if (call < 0 || call >= AP_CALLS)
        return -EINVAL;
    fault *f = &faults[call];
    atomic_store_explicit(&f->error, error, memory_order_relaxed);
    atomic_store_explicit(&f->skip, skip, memory_order_relaxed);
    atomic_store_explicit(&f->limit, limit, memory_order_relaxed);
    atomic_store_explicit(&f->hits, 0, memory_order_relaxed);
    atomic_store_explicit(&f->times, times, memory_order_relaxed);
    atomic_store_explicit(&faults_set, 1, memory_order_release); /* pairs with ap_fault_next */
    return 0;
}

int ap_fault_hits(int call)
{
    if (call < 0 || call >= AP_CALLS)
        return -EINVAL;
    return atomic_load_explicit(&faults[call].hits, memory_order_relaxed);
}

void ap_fault_clear(void)
{
    atomic_store_explicit(&faults_set, 0, memory_order_relaxed);
    for (size_t i = 0; i < AP_CALLS; i++)
        atomic_store_explicit(&faults[i].times, 0, memory_order_relaxed);
}

/* Counts down *n unless it is 0; a negative value stays. True: it was not 0. */
static bool count_down(_Atomic int *n)
{
    int old = atomic_load_explicit(n, memory_order_relaxed);
    while (old > 0) {
        if (atomic_compare_exchange_weak_explicit(n, &old, old - 1, memory_order_relaxed,
                                                  memory_order_relaxed))
            return true;
    }
    return old < 0;
}

int ap_fault_next(int call, size_t *limit)
{
    /* acquire; pairs with the release in ap_fault_set */
    if (!atomic_load_explicit(&faults_set, memory_order_acquire))
        return 0;
    fault *f = &faults[call];
    if (!atomic_load_explicit(&f->times, memory_order_relaxed) || count_down(&f->skip) ||
        !count_down(&f->times))
        return 0;
    atomic_fetch_add_explicit(&f->hits, 1, memory_order_relaxed);
    *limit = atomic_load_explicit(&f->limit, memory_order_relaxed);
    int error = atomic_load_explicit(&f->error, memory_order_relaxed);
    return error ? error : AP_FAULT_SHORT;
}

int ap_fault_error(int call)
{
    size_t limit;
    int error = ap_fault_next(call, &limit);
    return error > 0 ? error : 0;
}
