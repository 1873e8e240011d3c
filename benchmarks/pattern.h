/* Verifiable payloads: they differ per connection and per request, at the price of one copy.
 *
 * One random pattern is made at the start. A payload is a piece of it, at an offset that depends on
 * its stamp, with the stamp itself in front: a mixed-up, lost or repeated answer differs from what
 * is expected in nearly every byte, and the expectation is compared with memcmp.
 */
#ifndef BENCH_PATTERN_H
#define BENCH_PATTERN_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN_OFFSETS = 4096 }; /* few enough that the pattern of small payloads stays in L1 */

/* splitmix64: a bijection, so different inputs have different stamps. */
static inline uint64_t pattern_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline uint64_t pattern_stamp(uint32_t connection, uint64_t sequence)
{
    return pattern_mix((uint64_t)connection << 40 | sequence);
}

/* For payloads of `size` bytes; NULL without memory. */
static inline uint8_t *pattern_create(size_t size)
{
    uint8_t *pattern = malloc(size + PATTERN_OFFSETS);
    for (size_t i = 0; pattern != NULL && i < size + PATTERN_OFFSETS; i++)
        pattern[i] = (uint8_t)pattern_mix(i);
    return pattern;
}

static inline void pattern_write(const uint8_t *pattern, uint64_t stamp, uint8_t *out, size_t size)
{
    memcpy(out, pattern + stamp % PATTERN_OFFSETS, size);
    memcpy(out, &stamp, size < sizeof stamp ? size : sizeof stamp);
}

#endif
