/* Where keys and values lie, which of them a token sees, and how its own get there. */
#pragma once
#include "quantised.h"

INLINE int64_t address(const Pass *p, const Row *row, int64_t slot) {
    return row->table[slot / p->page_size] * p->page_stride + slot % p->page_size * p->slot_stride;
}

INLINE int64_t *seen_by(const Pass *p, const Row *row, int64_t token) {
    return p->seen + row->lists + (row->mask ? (token - row->first) * row->read : 0);
}

/* Which slots a token sees, as places in the cache, in the order of the slots, and how many of them lead without a gap.
 * Tokens of a text share one list. */
static void look(const Pass *p, int64_t token) {
    const Row *row = p->row + p->row_of[token];
    const int64_t j = token - row->first, stop = row->mask ? row->read : row->start + row->width;
    int64_t *seen = seen_by(p, row, token), count = 0;
    if (row->mask || j == 0) {
        const float *mask = row->mask + j * row->mask_stride;
        for (int64_t page = 0, s = 0; s < stop; page++) {
            int64_t place = row->table[page] * p->page_stride, end = s + p->page_size < stop ? s + p->page_size : stop;
            for (; s < end; s++, place += p->slot_stride) {
                seen[count] = place;
                count += !row->mask || mask[s] > -1e30f;
            }
        }
    }
    int64_t lead = row->mask ? 0 : row->start + j + 1;
    while (row->mask && lead < count && row->mask[j * row->mask_stride + lead] > -1e30f) lead++;
    p->counts[token] = row->mask ? count : lead;
    p->leads[token] = lead;
}

static void rotate(float *x, const float *angles, int64_t size) {
    int64_t half = size / 2;
    const float *sines = angles + size;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vec a = load(x + i), b = load(x + i + half);
        store(x + i, nearest(nearest(a * load(angles + i)) + nearest(b * load(sines + i))));
        store(x + i + half, nearest(nearest(b * load(angles + i + half)) + nearest(a * load(sines + i + half))));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = nearest_one(nearest_one(a * angles[i]) + nearest_one(b * sines[i]));
        x[i + half] = nearest_one(nearest_one(b * angles[i + half]) + nearest_one(a * sines[i + half]));
    }
}

/* Normalises and rotates head `head` (queries, then keys, then values) of a token; keys and values go to the cache. */
static void place(const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t head) {
    int64_t size = m->head_dim, heads = m->heads, kv = m->kv_heads;
    const float *const *v = m->vectors + layer * NUM_VECTORS;
    float *x = p->mixed + token * (heads + 2 * kv) * size + head * size;
    const Row *row = p->row + p->row_of[token];
    const int64_t slot = row->start + token - row->first;
    round_all(NUMBER, x, size);
    if (head < heads + kv) {
        const float *weight = head < heads ? v[Q_NORM] : v[K_NORM];
        if (weight) norm(x, weight, size, (float)m->epsilon, m->exact_norm, x);
        const float *angles = p->angles + (p->places ? p->places[token] : slot) * m->angles + m->layer[layer].angles;
        if (m->layer[layer].angles >= 0) rotate(x, angles, m->rotary);
        if (head < heads) return;
    }
    const int64_t target = p->targets ? p->targets[token] : address(p, row, slot);
    if (target < 0) return;
    number *cache = head < heads + kv ? p->keys[layer] : p->values[layer];
    const int64_t at = target + (head - heads) % kv * p->head_stride;
    if (p->quantised)
        quantise(x, size, (int8_t *)cache + at);
    else
        put(NUMBER, x, size, cache + at);
}
