/* From projected queries, keys and values to attended ones: rotation, the cache, and which slots a token sees. */
#pragma once
#include "model.h"
#include "products.h"

INLINE int64_t address(const Pass *p, const Row *row, int64_t slot) {
    return row->table[slot / p->page_size] * p->page_stride + slot % p->page_size * p->slot_stride;
}

INLINE int64_t *seen_by(const Pass *p, const Row *row, int64_t token) {
    return p->seen + row->lists + (row->mask ? (token - row->first) * row->read : 0);
}

/* Which slots a token sees, as places in the cache, in the order of the slots. Tokens of a text share one list. */
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
    p->counts[token] = row->mask ? count : row->start + j + 1;
}

/* Do `count` tokens from `token` on see nothing but leading slots, one more each? Then each list begins with those before. */
static int nested(const Pass *p, int64_t token, int64_t count) {
    const Row *row = p->row + p->row_of[token];
    if (!row->mask) return 1;
    EACH(i, count) {
        const int64_t seen = p->counts[token + i];
        const float *mask = row->mask + (token + i - row->first) * row->mask_stride;
        if (seen != p->counts[token] + i) return 0;
        EACH(s, seen) if (!(mask[s] > -1e30f)) return 0;
    }
    return 1;
}

static void rotate(float *x, const float *angles, int64_t size) {
    int64_t half = size / 2;
    const float *sines = angles + size;
    EACH(i, half) {
        float a = x[i], b = x[i + half];
        x[i] = a * angles[i] + b * sines[i];
        x[i + half] = b * angles[i + half] + a * sines[i + half];
    }
}

/* Normalises and rotates head `head` (queries, then keys, then values) of a token; keys and values go to the cache. */
static void place(const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t head) {
    int64_t size = m->head_dim, heads = m->heads, kv = m->kv_heads;
    const float *const *w = m->weights + layer * NUM_WEIGHTS;
    float *x = p->mixed + token * (heads + 2 * kv) * size + head * size;
    const Row *row = p->row + p->row_of[token];
    const int64_t slot = row->start + token - row->first;
    if (head < heads + kv) {
        const float *weight = head < heads ? w[Q_NORM] : w[K_NORM];
        if (weight) norm(x, weight, size, (float)m->epsilon, x);
        rotate(x, p->angles + (p->places ? p->places[token] : slot) * 2 * size, size);
        if (head < heads) return;
    }
    const int64_t target = p->targets ? p->targets[token] : address(p, row, slot);
    if (target < 0) return;
    float *cache = head < heads + kv ? p->keys[layer] : p->values[layer];
    memcpy(cache + target + (head - heads) % kv * p->head_stride, x, (size_t)size * 4);
}

/* out[g] = sum over slots of weights[g] * values, N vectors wide: together over the slots all tokens see, then each. */
INLINE void weigh(const int G, const int N, const float *weights, int64_t w_stride, const float *values,
                  const int64_t *seen, const int64_t *counts, float *out, int64_t out_stride, const float *scales) {
    vec total[MOST][4];
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) total[g][n] = (vec){0};
    EACH(i, counts[0]) {
        const float *v = values + seen[i];
        for (int g = 0; g < G; g++)
            for (int n = 0; n < N; n++) total[g][n] += weights[g * w_stride + i] * load(v + n * LANES);
    }
    for (int g = 0; g < G; g++) {
        for (int64_t i = counts[0]; i < counts[g]; i++)
            for (int n = 0; n < N; n++) total[g][n] += weights[g * w_stride + i] * load(values + seen[i] + n * LANES);
        for (int n = 0; n < N; n++) store(out + g * out_stride + n * LANES, total[g][n] * scales[g]);
    }
}

/* Head `head` of G tokens whose lists are nested (or of one). out: the first token's. scores: working memory. */
INLINE void attend(const int G, const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t head, float *out,
                   float *scores) {
    const int64_t size = m->head_dim, shift = head / (m->heads / m->kv_heads) * p->head_stride;
    const int64_t q_stride = (m->heads + 2 * m->kv_heads) * size, out_stride = m->heads * size;
    const int64_t *seen = seen_by(p, p->row + p->row_of[token], token + G - 1), *counts = p->counts + token;
    const int64_t count = counts[G - 1], stride = count + LANES;
    const float *query = p->mixed + token * q_stride + head * size;
    const float *keys = p->keys[layer] + shift, *values = p->values[layer] + shift;
    float dots[MOST][BROAD], scales[MOST];
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *rows[4] = {keys + seen[i], keys + seen[i + 1], keys + seen[i + 2], keys + seen[i + 3]};
        block(G, 4, query, q_stride, rows, size, 0, dots);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < 4; j++) scores[g * stride + i + j] = dots[g][j] * (float)m->scaling;
    }
    for (; i < count; i++) {
        const float *one = keys + seen[i];
        block(G, 1, query, q_stride, &one, size, 0, dots);
        for (int g = 0; g < G; g++) scores[g * stride + i] = dots[g][0] * (float)m->scaling;
    }
    for (int g = 0; g < G; g++) {
        float *own = scores + g * stride, most = -INFINITY;
        EACH(j, counts[g]) most = own[j] > most ? own[j] : most;
        for (i = counts[g]; i % LANES; i++) own[i] = -INFINITY;
        vec total = {0};
        for (i = 0; i < counts[g]; i += LANES) {
            vec e = exponential(load(own + i) - most);
            store(own + i, e);
            total += e;
        }
        scales[g] = counts[g] ? 1.f / sum(total) : 0.f;
    }
    int64_t d = 0;
    for (; d + SPAN * LANES <= size; d += SPAN * LANES)
        weigh(G, SPAN, scores, stride, values + d, seen, counts, out + d, out_stride, scales);
    for (; d + LANES <= size; d += LANES)
        weigh(G, 1, scores, stride, values + d, seen, counts, out + d, out_stride, scales);
    for (; d < size; d++)
        for (int g = 0; g < G; g++) {
            float one = 0;
            EACH(j, counts[g]) one += scores[g * stride + j] * values[seen[j] + d];
            out[g * out_stride + d] = one * scales[g];
        }
}

static void attend_some(const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t count, int64_t head,
                        float *scores) {
    float *out = p->attended + (token * m->heads + head) * m->head_dim;
    if (!nested(p, token, count)) {
        EACH(i, count) attend(1, m, p, layer, token + i, head, out + i * m->heads * m->head_dim, scores);
        return;
    }
    switch (count) {
#define CASE(G) case G: attend(G, m, p, layer, token, head, out, scores); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
}
