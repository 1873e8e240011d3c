/* A buffer chain: the blocks that hold unread input, oldest first. */
#ifndef ANYPOLL_CHAIN_H
#define ANYPOLL_CHAIN_H

#include "pool.h"

typedef struct {
    ap_block *head; /* holds the oldest unread byte */
    ap_block *tail; /* received bytes are appended here */
    size_t size;    /* unread bytes */
} ap_chain;

/* The caller adds the unread bytes of the block to size. */
void ap_chain_append(ap_chain *chain, ap_block *block);
/* Removed blocks are counted in pins for as long as views hold them: see ap_block_leave. */
void ap_chain_consume(ap_chain *chain, size_t n, ap_pins *pins);
/* The only block, without views, is read to its end, and begins anew. Returns how many bytes were
 * unread. */
size_t ap_chain_restart(ap_chain *chain);
void ap_chain_drop(ap_chain *chain, ap_pins *pins);
/* Copies up to n unread bytes after the first skip. Returns how many. */
size_t ap_chain_copy(const ap_chain *chain, size_t skip, uint8_t *out, size_t n);
/* Finds the delimiter at or after *searched and within max_bytes. Returns the
 * length through it, or 0 and advances *searched. */
size_t ap_chain_find(const ap_chain *chain, const uint8_t *delimiter, size_t size, size_t max_bytes,
                     size_t *searched);

#endif
