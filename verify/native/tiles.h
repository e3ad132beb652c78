/* The tiles in which attention meets keys and values: as many slots as the first cache holds; numbers, also where codes
 * lie in the cache. */
#pragma once
#include "slots.h"

#define TILE 4096 /* numbers in a tile */
#define CODED 64  /* slots in it, at most, where they lie in codes */

INLINE int64_t tile_of(const Model *m, const Pass *p) {
    const int64_t slots = TILE / m->head_dim > 16 ? TILE / m->head_dim / 4 * 4 : 16;
    return p->quantised && slots > CODED ? CODED : slots;
}

/* Where the states of some slots of a list lie: number `first + i` of `places` is that of slot i of them. end: up to where
 * the list may be fetched ahead. */
typedef struct {
    const number *states;
    const int64_t *places;
    int64_t first, end;
} Tile;

/* Room for numbers that are made from codes. */
typedef struct {
    number states[TILE > 16 * WIDEST ? TILE : 16 * WIDEST];
    int64_t places[CODED];
} Decoded;

/* Numbers [begin, stop) of slots [from, to) of a list that is `end` long. */
INLINE Tile tile_at(const Model *m, const Pass *p, int64_t kv, const number *states, const int64_t *seen, int64_t from,
                    int64_t to, int64_t end, int64_t begin, int64_t stop, Decoded *room) {
    const int64_t head = kv * p->head_stride;
    if (!p->quantised) return (Tile){states + head, seen, from, end};
    EACH(i, to - from) {
        room->places[i] = i * m->head_dim;
        const int8_t *codes = (const int8_t *)states + head + seen[from + i];
        read_codes(codes, m->head_dim, begin, stop, room->states + room->places[i]);
    }
    return (Tile){room->states, room->places, 0, 0};
}
