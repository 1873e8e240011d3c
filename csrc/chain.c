/* A buffer chain: the blocks that hold unread input, oldest first.
 *
 * Pure: no locks, no system calls. A byte once appended never moves, so a view
 * of it stays valid whatever happens to the chain: bytes are only added after
 * block->end, and consuming only moves block->start. ap_chain_restart is for a
 * block without views.
 */
#include "chain.h"

#include "pool.h"

void ap_chain_append(ap_chain *chain, ap_block *block)
{
    block->next = NULL;
    if (chain->tail)
        chain->tail->next = block;
    else
        chain->head = block;
    chain->tail = block;
}

/* A block that was read to its end is removed, unless it is the last and still
 * has room: then it stays for what arrives next. */
void ap_chain_consume(ap_chain *chain, size_t n, ap_pins *pins)
{
    AP_ASSERT(n <= chain->size);
    chain->size -= n;
    while (chain->head) {
        ap_block *block = chain->head;
        size_t have = block->end - block->start;
        if (n < have || (block == chain->tail && ap_block_room(block) > 0)) {
            block->start += (uint32_t)n;
            return;
        }
        n -= have;
        chain->head = block->next;
        if (!chain->head)
            chain->tail = NULL;
        ap_block_leave(block, pins);
    }
}

size_t ap_chain_restart(ap_chain *chain)
{
    AP_ASSERT(chain->head && chain->head == chain->tail);
    size_t n = chain->size;
    chain->head->start = chain->head->end = AP_BLOCK_HEADER;
    chain->size = 0;
    return n;
}

void ap_chain_drop(ap_chain *chain, ap_pins *pins)
{
    while (chain->head) {
        ap_block *block = chain->head;
        chain->head = block->next;
        ap_block_leave(block, pins);
    }
    chain->tail = NULL;
    chain->size = 0;
}

size_t ap_chain_copy(const ap_chain *chain, size_t skip, uint8_t *out, size_t n)
{
    size_t done = 0;
    for (ap_block *block = chain->head; block && done < n; block = block->next) {
        size_t have = block->end - block->start;
        if (skip >= have) {
            skip -= have;
            continue;
        }
        size_t take = have - skip < n - done ? have - skip : n - done;
        memcpy(out + done, ap_block_at(block, block->start) + skip, take);
        done += take;
        skip = 0;
    }
    return done;
}

/* Whether the delimiter is at offset at of block, continuing into the next ones. */
static bool matches(const ap_block *block, size_t at, const uint8_t *delimiter, size_t size)
{
    while (block && size > 0) {
        size_t have = block->end - block->start - at;
        size_t n = have < size ? have : size;
        if (memcmp(ap_block_at((ap_block *)block, block->start) + at, delimiter, n) != 0)
            return false;
        delimiter += n;
        size -= n;
        block = block->next;
        at = 0;
    }
    return size == 0;
}

/* Within one block memmem is faster than any loop of ours; only the last
 * size - 1 positions of a block need the slow comparison across blocks. */
size_t ap_chain_find(const ap_chain *chain, const uint8_t *delimiter, size_t size, size_t max_bytes,
                     size_t *searched)
{
    size_t limit = chain->size < max_bytes ? chain->size : max_bytes;
    size_t base = 0; /* bytes of the blocks before this one */
    for (ap_block *block = chain->head; block && *searched + size <= limit; block = block->next) {
        size_t have = block->end - block->start;
        size_t end = base + have < limit ? have : limit - base; /* of this block, to search */
        if (*searched < base + have) {
            size_t at = *searched - base;
            const uint8_t *data = ap_block_at(block, block->start);
            if (at + size <= end) {
                const uint8_t *hit = size == 1 ? memchr(data + at, delimiter[0], end - at)
                                               : memmem(data + at, end - at, delimiter, size);
                if (hit)
                    return base + (size_t)(hit - data) + size;
                at = end - size + 1;
            }
            for (; at < have && base + at + size <= limit; at++) {
                if (matches(block, at, delimiter, size))
                    return base + at + size;
            }
            *searched = base + at;
        }
        base += have;
    }
    return 0;
}
