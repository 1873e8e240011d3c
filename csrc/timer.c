/* A hierarchical timer wheel: deadlines to the millisecond, O(1) insertion and removal.
 *
 * Level 0 has a slot per tick (1.05 ms: 2^20 ns, so that a shift replaces a
 * division), each level above a slot per 64 of the level below. A bit per slot says
 * whether it is non-empty, so the next deadline is found by counting zeros. A timer
 * on a higher level is filed again when its slot comes up (at most AP_WHEEL_LEVELS
 * times in its life).
 *
 * Nobody has to wake for that alone: the head of a slot has the least tick of its timers (or
 * a lesser one, if that timer was unfiled), and until then nothing is due.
 *
 * Deadlines round up: a timer is never early, and late by at most one tick. Timers
 * are lazy: the wheel only says "look at this slot now", and the slot knows whether
 * anything is due. The idea is that of the kernel's timer wheel
 * (kernel/time/timer.c).
 */
#include "timer.h"

#include "clock.h"

#define TICK_SHIFT 20
#define LEVEL_SHIFT 6
#define SLOT_MASK (AP_WHEEL_SLOTS - 1)
#define LAST_TICK ((uint64_t)INT64_MAX >> TICK_SHIFT) /* of the clock: the wheel has no horizon */

_Static_assert(LAST_TICK >> (LEVEL_SHIFT * AP_WHEEL_LEVELS) == 0, "a level is missing");

void ap_wheel_init(ap_wheel *wheel, int64_t now)
{
    memset(wheel, 0, sizeof *wheel);
    wheel->now = (uint64_t)now >> TICK_SHIFT;
    for (int level = 0; level < AP_WHEEL_LEVELS; level++) {
        for (int i = 0; i < AP_WHEEL_SLOTS; i++) {
            ap_timer *head = &wheel->slots[level][i];
            head->prev = head->next = head;
        }
    }
}

/* The level is that of the highest base-64 digit in which tick and now differ. */
static int level_of(const ap_wheel *wheel, uint64_t tick)
{
    uint64_t differ = tick ^ wheel->now;
    return differ ? (63 - __builtin_clzll(differ)) / LEVEL_SHIFT : 0;
}

static void place(ap_wheel *wheel, ap_timer *timer)
{
    int level = level_of(wheel, timer->tick);
    unsigned slot = (timer->tick >> (level * LEVEL_SHIFT)) & SLOT_MASK;
    ap_timer *head = &wheel->slots[level][slot];
    if (head->next == head || timer->tick < head->tick)
        head->tick = timer->tick;
    timer->prev = head->prev;
    timer->next = head;
    head->prev->next = timer;
    head->prev = timer;
    wheel->used[level] |= (uint64_t)1 << slot;
    wheel->filed++;
}

void ap_wheel_file(ap_wheel *wheel, ap_timer *timer, int64_t deadline)
{
    if (ap_timer_filed(timer))
        ap_wheel_unfile(wheel, timer);
    uint64_t tick = ((uint64_t)deadline + ((uint64_t)1 << TICK_SHIFT) - 1) >> TICK_SHIFT;
    if (tick <= wheel->now)
        tick = wheel->now + 1;
    timer->tick = tick < LAST_TICK ? tick : LAST_TICK;
    place(wheel, timer);
}

void ap_wheel_unfile(ap_wheel *wheel, ap_timer *timer)
{
    if (!ap_timer_filed(timer))
        return;
    ap_timer *next = timer->next;
    timer->prev->next = next;
    next->prev = timer->prev;
    timer->prev = timer->next = NULL;
    wheel->filed--;
    if (next->next == next) { /* only a head is left: its slot is empty */
        size_t at = (size_t)(next - &wheel->slots[0][0]);
        wheel->used[at / AP_WHEEL_SLOTS] &= ~((uint64_t)1 << (at % AP_WHEEL_SLOTS));
    }
}

/* The earliest non-empty slot, and its first tick; NULL: there is none. The slots of a level lie
 * ahead of now's own digit, except on level 0, where that may be now itself. */
static const ap_timer *next_slot(const ap_wheel *wheel, uint64_t *tick)
{
    for (int level = 0; level < AP_WHEEL_LEVELS; level++) {
        if (!wheel->used[level])
            continue;
        unsigned slot = (unsigned)__builtin_ctzll(wheel->used[level]);
        int shift = level * LEVEL_SHIFT;
        uint64_t above = wheel->now >> (shift + LEVEL_SHIFT) << (shift + LEVEL_SHIFT);
        *tick = above | (uint64_t)slot << shift;
        return &wheel->slots[level][slot];
    }
    return NULL;
}

int64_t ap_wheel_next(const ap_wheel *wheel)
{
    uint64_t first;
    const ap_timer *head = next_slot(wheel, &first);
    return head ? (int64_t)(head->tick << TICK_SHIFT) : AP_FOREVER;
}

/* Moves the timers of the slot that begins at now to the levels below. */
static void cascade(ap_wheel *wheel, uint64_t tick)
{
    wheel->now = tick;
    for (int level = AP_WHEEL_LEVELS - 1; level > 0; level--) {
        unsigned slot = (tick >> (level * LEVEL_SHIFT)) & SLOT_MASK;
        ap_timer *head = &wheel->slots[level][slot];
        while (head->next != head) {
            ap_timer *timer = head->next;
            ap_wheel_unfile(wheel, timer);
            place(wheel, timer);
        }
    }
}

ap_timer *ap_wheel_expire(ap_wheel *wheel, int64_t now)
{
    uint64_t until = (uint64_t)now >> TICK_SHIFT, tick;
    while (next_slot(wheel, &tick) && tick <= until) {
        if (tick > wheel->now)
            cascade(wheel, tick);
        ap_timer *head = &wheel->slots[0][tick & SLOT_MASK];
        if (head->next != head) {
            ap_timer *timer = head->next;
            ap_wheel_unfile(wheel, timer);
            return timer;
        }
    }
    if (until > wheel->now)
        cascade(wheel, until);
    return NULL;
}
