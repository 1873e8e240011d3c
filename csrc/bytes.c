/* A growing buffer of bytes, consumed from its front.
 *
 * For what is between OpenSSL and a socket: mostly nothing, for the kernel takes what is made, and
 * OpenSSL what has come. So it keeps no memory when it is empty.
 */
#include "bytes.h"

#include "sysio.h"

#include <stdlib.h>

#define LEAST 512

static bool reserve(ap_bytes *bytes, size_t more)
{
    size_t size = ap_bytes_size(bytes);
    if (bytes->start > 0 && size + more <= bytes->capacity && bytes->end + more > bytes->capacity) {
        memmove(bytes->data, bytes->data + bytes->start, size);
        bytes->start = 0;
        bytes->end = size;
    }
    if (bytes->end + more <= bytes->capacity)
        return true;
    size_t capacity = bytes->capacity ? bytes->capacity * 2 : LEAST;
    while (capacity < size + more)
        capacity *= 2;
    uint8_t *data = ap_sys_alloc_dirty(capacity);
    if (!data)
        return false;
    if (size)
        memcpy(data, bytes->data + bytes->start, size);
    free(bytes->data);
    *bytes = (ap_bytes){.data = data, .end = size, .capacity = capacity};
    return true;
}

bool ap_bytes_append(ap_bytes *bytes, const void *data, size_t size)
{
    if (!reserve(bytes, size))
        return false;
    if (size)
        memcpy(bytes->data + bytes->end, data, size);
    bytes->end += size;
    return true;
}

void ap_bytes_consume(ap_bytes *bytes, size_t size)
{
    bytes->start += size;
    if (bytes->start == bytes->end)
        ap_bytes_clear(bytes);
}

void ap_bytes_clear(ap_bytes *bytes)
{
    free(bytes->data);
    *bytes = (ap_bytes){0};
}
