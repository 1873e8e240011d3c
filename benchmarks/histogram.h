/* A log-linear latency histogram, in nanoseconds.
 *
 * Constant memory, constant time to record, and a relative error below 1/64 at every magnitude, so
 * one run may span a microsecond and ten seconds.
 *
 * Values below 64 have a bucket each. Above that every power of two is cut into 64 equal buckets:
 * the six bits after the leading one select the bucket, the position of the leading one the row.
 */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

enum { HIST_BITS = 6, HIST_ROW = 1 << HIST_BITS, HIST_ROWS = 64 - HIST_BITS + 1 };

struct histogram {
    uint64_t counts[HIST_ROWS * HIST_ROW];
    uint64_t total;
    uint64_t max;
};

static inline unsigned histogram_bucket(uint64_t value)
{
    if (value < HIST_ROW)
        return (unsigned)value;
    unsigned shift = 63u - (unsigned)__builtin_clzll(value) - HIST_BITS;
    return (shift + 1) * HIST_ROW + (unsigned)(value >> shift) - HIST_ROW;
}

/* The middle of what falls into the bucket. */
static inline uint64_t histogram_value(unsigned bucket)
{
    if (bucket < HIST_ROW)
        return bucket;
    unsigned shift = bucket / HIST_ROW - 1;
    uint64_t low = (uint64_t)(bucket % HIST_ROW + HIST_ROW) << shift;
    return low + ((uint64_t)1 << shift) / 2;
}

static inline void histogram_record(struct histogram *hist, uint64_t value)
{
    hist->counts[histogram_bucket(value)]++;
    hist->total++;
    if (value > hist->max)
        hist->max = value;
}

/* The smallest recorded magnitude that at least `fraction` of all values do not exceed. */
static inline uint64_t histogram_quantile(const struct histogram *hist, double fraction)
{
    uint64_t wanted = (uint64_t)(fraction * (double)hist->total);
    uint64_t seen = 0;
    for (unsigned bucket = 0; bucket < HIST_ROWS * HIST_ROW; bucket++) {
        seen += hist->counts[bucket];
        if (seen > wanted)
            return histogram_value(bucket) < hist->max ? histogram_value(bucket) : hist->max;
    }
    return hist->max;
}

#endif
