/* A growing buffer of bytes, consumed from its front. */
#ifndef ANYPOLL_BYTES_H
#define ANYPOLL_BYTES_H

#include "common.h"

typedef struct {
    uint8_t *data;
    size_t start, end, capacity;
} ap_bytes;

static inline size_t ap_bytes_size(const ap_bytes *bytes)
{
    return bytes->end - bytes->start;
}
static inline const uint8_t *ap_bytes_front(const ap_bytes *bytes)
{
    return bytes->data + bytes->start;
}

/* Appends a copy. False: no memory; nothing was appended. */
AP_MUST_CHECK bool ap_bytes_append(ap_bytes *bytes, const void *data, size_t size);
/* Removes the first bytes. An empty buffer has no memory. */
void ap_bytes_consume(ap_bytes *bytes, size_t size);
void ap_bytes_clear(ap_bytes *bytes);

#endif
