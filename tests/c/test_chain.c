/* chain.c against a flat array, with blocks of a few bytes. */
#include "fixture.h"

struct model {
    ap_pool *pool;
    ap_chain chain;
    uint8_t flat[4096];
    size_t first, end; /* unread bytes of flat */
};

static struct model *model_new(void)
{
    struct model *m = calloc(1, sizeof *m);
    CHECK(m != NULL);
    m->pool = ap_pool_new();
    CHECK(m->pool != NULL);
    return m;
}

static void model_free(struct model *m)
{
    ap_poller_stats s = {0};
    ap_chain_drop(&m->chain, NULL);
    CHECK_EQ(m->chain.size, 0);
    CHECK(m->chain.head == NULL && m->chain.tail == NULL);
    ap_pool_statistics(m->pool, &s);
    CHECK_EQ(s.blocks_in_use, 0);
    ap_pool_unref(m->pool);
    free(m);
}

/* A block that claims to have room for so many bytes only. */
static ap_block *tiny_block(struct model *m, uint32_t room)
{
    ap_block *block = ap_pool_take(m->pool, room);
    CHECK(block != NULL);
    block->end = block->start = block->size - room;
    return block;
}

static void append_bytes(struct model *m, const void *data, size_t n, uint32_t room)
{
    const uint8_t *bytes = data;
    memcpy(m->flat + m->end, bytes, n);
    m->end += n;
    while (n > 0) {
        ap_block *tail = m->chain.tail;
        if (!tail || ap_block_room(tail) == 0)
            ap_chain_append(&m->chain, tail = tiny_block(m, room));
        uint32_t part = ap_block_room(tail) < n ? ap_block_room(tail) : (uint32_t)n;
        memcpy(ap_block_at(tail, tail->end), bytes, part);
        tail->end += part;
        m->chain.size += part;
        bytes += part;
        n -= part;
    }
}

static void consume(struct model *m, size_t n)
{
    ap_chain_consume(&m->chain, n, NULL);
    m->first += n;
}

static void compare(struct model *m)
{
    uint8_t copy[4096];
    size_t size = m->end - m->first;
    CHECK_EQ(m->chain.size, size);
    for (size_t skip = 0; skip <= size; skip += 1 + size / 3) {
        CHECK_EQ(ap_chain_copy(&m->chain, skip, copy, size - skip), size - skip);
        CHECK_BYTES(copy, m->flat + m->first + skip, size - skip);
    }
}

TEST(chain_is_a_queue_of_bytes)
{
    uint64_t seed = 3;
    for (int round = 0; round < ROUNDS(2000); round++) {
        struct model *m = model_new();
        for (int i = 0; i < 60 && m->end < 3900; i++) {
            uint8_t bytes[32];
            size_t n = random_below(&seed, sizeof bytes);
            for (size_t k = 0; k < n; k++)
                bytes[k] = (uint8_t)random_next(&seed);
            append_bytes(m, bytes, n, 1 + (uint32_t)random_below(&seed, 9));
            consume(m, random_below(&seed, m->end - m->first + 1));
            compare(m);
        }
        model_free(m);
    }
}

TEST(chain_copies_no_more_than_there_is)
{
    struct model *m = model_new();
    uint8_t copy[16];
    append_bytes(m, "abcdef", 6, 2);
    CHECK_EQ(ap_chain_copy(&m->chain, 4, copy, 16), 2);
    CHECK_BYTES(copy, "ef", 2);
    CHECK_EQ(ap_chain_copy(&m->chain, 6, copy, 16), 0);
    model_free(m);
}

/* The tail stays for what comes next; a full one that was read leaves. */
TEST(chain_keeps_an_empty_tail_with_room)
{
    struct model *m = model_new();
    append_bytes(m, "abc", 3, 8);
    consume(m, 3);
    CHECK(m->chain.head != NULL && m->chain.head == m->chain.tail);
    append_bytes(m, "defgh", 5, 8);
    CHECK(m->chain.head == m->chain.tail);
    consume(m, 5);
    CHECK(m->chain.head == NULL && m->chain.tail == NULL);
    model_free(m);
}

/* What was handed out stays as it was, whatever happens behind and before it. */
TEST(chain_never_moves_a_byte)
{
    struct model *m = model_new();
    append_bytes(m, "abcd", 4, 6);
    ap_block *block = m->chain.head;
    const uint8_t *view = ap_block_at(block, block->start);
    ap_block_ref(block);
    append_bytes(m, "efghijkl", 8, 6);
    consume(m, 12);
    append_bytes(m, "mnop", 4, 6);
    CHECK_BYTES(view, "abcdef", 6);
    ap_block_unref(block);
    model_free(m);
}

/* ---- searching -------------------------------------------------------- */

static size_t naive_find(const struct model *m, const uint8_t *delimiter, size_t size, size_t max)
{
    size_t have = m->end - m->first < max ? m->end - m->first : max;
    for (size_t at = 0; at + size <= have; at++) {
        if (memcmp(m->flat + m->first + at, delimiter, size) == 0)
            return at + size;
    }
    return 0;
}

/* Grows the chain piece by piece, searching after each, as a connection does. */
static void search_growing(uint64_t *seed, size_t size)
{
    struct model *m = model_new();
    uint8_t delimiter[5];
    size_t max = 10 + random_below(seed, 300), searched = 0, length = 0;
    for (size_t i = 0; i < size; i++)
        delimiter[i] = (uint8_t)('a' + random_below(seed, 2));
    while (!length && m->end < 400) {
        uint8_t bytes[12];
        size_t n = random_below(seed, sizeof bytes);
        for (size_t i = 0; i < n; i++) /* few letters: many false starts */
            bytes[i] = (uint8_t)('a' + random_below(seed, 8) / 7);
        append_bytes(m, bytes, n, 1 + (uint32_t)random_below(seed, 5));
        length = ap_chain_find(&m->chain, delimiter, size, max, &searched);
        CHECK_EQ(length, naive_find(m, delimiter, size, max));
        CHECK(searched <= m->end);
    }
    model_free(m);
}

TEST(chain_finds_delimiters_across_blocks)
{
    uint64_t seed = 11;
    for (int round = 0; round < ROUNDS(20000); round++)
        search_growing(&seed, 1 + (size_t)round % 5);
}

/* The limit counts the delimiter: its last byte must lie within max_bytes. */
TEST(chain_find_keeps_the_limit)
{
    for (uint32_t room = 1; room < 12; room++) {
        struct model *m = model_new();
        append_bytes(m, "0123456789\r\n", 12, room);
        size_t searched = 0;
        CHECK_EQ(ap_chain_find(&m->chain, (const uint8_t *)"\r\n", 2, 11, &searched), 0);
        CHECK_EQ(ap_chain_find(&m->chain, (const uint8_t *)"\r\n", 2, 12, &searched), 12);
        model_free(m);
    }
}

/* A long search is linear: what was searched is not searched again. */
TEST(chain_find_remembers_how_far_it_looked)
{
    struct model *m = model_new();
    size_t searched = 0;
    for (int i = 0; i < 1000; i++) {
        append_bytes(m, "xy", 2, 7);
        CHECK_EQ(ap_chain_find(&m->chain, (const uint8_t *)"\r\n", 2, SIZE_MAX, &searched), 0);
        CHECK_EQ(searched, m->end - 1);
    }
    append_bytes(m, "\r\n", 2, 7);
    CHECK_EQ(ap_chain_find(&m->chain, (const uint8_t *)"\r\n", 2, SIZE_MAX, &searched), 2002);
    model_free(m);
}
