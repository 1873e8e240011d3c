/* The chain of blocks that holds unread input. */
#ifndef ANYPOLL_CHAIN_H
#define ANYPOLL_CHAIN_H

#include "pool.h"

typedef struct {
    ap_block *head; /* the oldest unread byte is in it */
    ap_block *tail; /* received bytes are appended to it */
    size_t size;    /* unread bytes */
} ap_chain;

void ap_chain_append(ap_chain *chain, ap_block *block);
void ap_chain_consume(ap_chain *chain, size_t n, ap_pins *pins);
void ap_chain_drop(ap_chain *chain, ap_pins *pins);
size_t ap_chain_copy(const ap_chain *chain, size_t skip, uint8_t *out, size_t n);
/* Finds the delimiter at or behind *searched and within max_bytes. Returns the
 * length through it, or 0 and moves *searched. */
size_t ap_chain_find(const ap_chain *chain, const uint8_t *delimiter, size_t size, size_t max_bytes,
                     size_t *searched);

#endif
