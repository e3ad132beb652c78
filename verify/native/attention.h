/* Attention: scores, softmax, sums of values. Each key and value is read once for a block of queries: of all heads that
 * share it, of several tokens.
 *
 * Whatever else is in its block, a query's sums are over the slots it sees, in their order. */
#pragma once
#include "tiles.h"

#define QUERIES 24 /* of a block, unless one token has more: they meet a tile (tiles.h) of keys together */

/* Queries of tokens [token, token + count) of one row, in all heads that share one of keys and values.
 * scores: a line of `stride` numbers a query, with room behind the scores; the last number is the query's scale. */
typedef struct {
    const Model *m;
    const Pass *p;
    int64_t layer, kv, token, count, group, queries, stride, window;
    float *scores, *out;
} Block;

/* out: of the first token, all heads. */
INLINE Block block_of(const Model *m, const Pass *p, int64_t layer, int64_t kv, int64_t token, int64_t count,
                      float *scores, float *out) {
    const int64_t group = m->heads / m->kv_heads;
    return (Block){m, p, layer, kv, token, count, group, count * group, p->stride, m->layer[layer].window, scores, out};
}

INLINE const float *query_of(const Block *b, int64_t i) {
    const int64_t all = b->m->heads + 2 * b->m->kv_heads, head = b->kv * b->group + i % b->group;
    return b->p->mixed + ((b->token + i / b->group) * all + head) * b->m->head_dim;
}

INLINE float *out_of(const Block *b, int64_t i) {
    const int64_t head = b->kv * b->group + i % b->group;
    return b->out + (i / b->group * b->m->heads + head) * b->m->head_dim;
}

/* Slots that stand first in the lists of all tokens of a block. */
INLINE int64_t shared_by(const Block *b) {
    int64_t lead = b->p->leads[b->token];
    for (int64_t i = 1; i < b->count; i++) {
        const int64_t own = b->p->leads[b->token + i];
        lead = own < lead ? own : lead;
    }
    return lead;
}

/* Where in the list of token t of a block begins what the layer sees. There is one slot in it for each position, in their
 * order, in trees as well: a window is the list's end. */
INLINE int64_t low_of(const Block *b, int64_t t) {
    const int64_t count = b->p->counts[b->token + t];
    return b->window && count > b->window ? count - b->window : 0;
}

/* The first and the last such place. */
INLINE void lows_of(const Block *b, int64_t *least, int64_t *most) {
    *least = *most = low_of(b, 0);
    for (int64_t t = 1; b->window && t < b->count; t++) {
        const int64_t low = low_of(b, t);
        *least = low < *least ? low : *least;
        *most = low > *most ? low : *most;
    }
}

INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

/* Scores of M queries against four slots. */
INLINE void match(const int M, const int64_t size, const float *const *query, const number *const *row, float scaling,
                  float *const *scores, int64_t at) {
    vec total[4][4];
    for (int m = 0; m < 4; m++)
        for (int n = 0; n < 4; n++) total[m][n] = (vec){0};
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) {
        vec x[4];
        for (int m = 0; m < M; m++) x[m] = load(query[m] + k);
        for (int n = 0; n < 4; n++) {
            const vec y = get(row[n] + k);
            for (int m = 0; m < M; m++) total[m][n] += x[m] * y;
        }
    }
    quad dots[4];
    sums_of(M, total, dots);
    for (int m = 0; m < M; m++) {
        for (int n = 0; k < size && n < 4; n++)
            for (int64_t d = k; d < size; d++) dots[m][n] += query[m][d] * get_one(row[n] + d);
        *(quad *)(scores[m] + at) = dots[m] * scaling;
    }
}

/* Scores of M queries against slots [from, to) of a list; up to three more numbers are written behind them.
 * next: slots that are fetched meanwhile, up to `end` of the list. */
INLINE void match_run(const int M, const int64_t size, const float *const *query, const number *keys,
                      const int64_t *seen, int64_t from, int64_t to, int64_t next, int64_t end, float scaling,
                      float *const *scores) {
    int64_t i = from;
    for (; i + 4 <= to; i += 4, next += 4) {
        const number *row[4] = {keys + seen[i], keys + seen[i + 1], keys + seen[i + 2], keys + seen[i + 3]};
        if (next + 4 <= end)
            for (int n = 0; n < 4; n++) fetch(keys + seen[next + n], size * (int64_t)sizeof(number));
        match(M, size, query, row, scaling, scores, i);
    }
    if (i < to) {
        const number *row[4];
        EACH(n, 4) row[n] = keys + seen[i + n < to ? i + n : i];
        match(M, size, query, row, scaling, scores, i);
    }
}

/* Scores of queries [first, last) of a block against slots [from, to) of a list. */
static void match_all(const Block *b, int64_t first, int64_t last, const int64_t *seen, int64_t from, int64_t to) {
    const int64_t size = b->m->head_dim, tile = tile_of(b->m, b->p), pieces = (last - first + 3) / 4;
    const float scaling = b->m->score_cap > 0 ? 1.f : (float)b->m->scaling; /* then it is `soften`'s business */
    Decoded room;
    for (int64_t start = from; start < to; start += tile) {
        const int64_t stop = start + tile < to ? start + tile : to;
        const Tile t = tile_at(b->m, b->p, b->kv, b->p->keys[b->layer], seen, start, stop, to, 0, size, &room);
        EACH(piece, pieces) {
            const int64_t begin = first + (last - first) * piece / pieces, end = piece ? 0 : t.end;
            const int64_t count = first + (last - first) * (piece + 1) / pieces - begin;
            const float *query[4];
            float *scores[4];
            EACH(m, count) {
                query[m] = query_of(b, begin + m);
                scores[m] = b->scores + (begin + m) * b->stride + start - t.first;
            }
            const int64_t near = t.first + stop - start;
#define CASE(M) case M: match_run(M, SIZE, query, t.states, t.places, t.first, near, near, end, scaling, scores); break;
#define SIZE 64
            if (size == SIZE) {
                switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
                continue;
            }
#undef SIZE
#define SIZE 128
            if (size == SIZE) {
                switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
                continue;
            }
#undef SIZE
#define SIZE size
            switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) }
#undef SIZE
#undef CASE
        }
    }
}

/* Sums of values so far, where they have begun, plus those of slots [from, to), in N vectors of M queries. */
INLINE void weigh(const int M, const int N, const float *const *weights, const number *values, const int64_t *seen,
                  int64_t begun, int64_t from, int64_t to, int64_t end, float *const *out, int64_t d) {
    int64_t next = to;
    vec total[MOST][SPAN];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) total[m][n] = begun ? load(out[m] + d + n * LANES) : (vec){0};
    for (int64_t i = from; i < to; i++, next++) {
        const number *row = values + seen[i] + d;
        if (next < end) fetch(values + seen[next] + d, N * LANES * sizeof(number));
        vec y[SPAN];
        for (int n = 0; n < N; n++) y[n] = get(row + n * LANES);
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) total[m][n] += weights[m][i] * y[n];
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) store(out[m] + d + n * LANES, total[m][n]);
}

/* Numbers [d, stop) of the values of slots [from, to) for queries [first, last) of a block. */
static void weigh_all(const Block *b, int64_t first, int64_t last, const int64_t *seen, int64_t from, int64_t to,
                      int64_t begin, int64_t stop) {
    const int64_t tile = tile_of(b->m, b->p), pieces = (last - first + MOST - 1) / MOST;
    Decoded room;
    for (int64_t start = from; start < to || start == 0; start += tile) {
        const int64_t behind = start + tile < to ? start + tile : to;
        const Tile t = tile_at(b->m, b->p, b->kv, b->p->values[b->layer], seen, start, behind, to, begin, stop, &room);
        const int64_t near = t.first + behind - start;
        EACH(piece, pieces) {
            const int64_t one = first + (last - first) * piece / pieces, end = piece ? 0 : t.end;
            const int64_t count = first + (last - first) * (piece + 1) / pieces - one;
            const float *weights[MOST];
            float *out[MOST];
            EACH(m, count) {
                weights[m] = b->scores + (one + m) * b->stride + start - t.first;
                out[m] = out_of(b, one + m);
            }
            int64_t d = begin;
#define CASE(M) case M: weigh(M, N, weights, t.states, t.places, start, t.first, near, end, out, d); break;
#define N SPAN
            for (; d + N * LANES <= stop; d += N * LANES)
                switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef N
#define N 1
            for (; d + N * LANES <= stop; d += N * LANES)
                switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef N
#undef CASE
            for (; d < stop; d++)
                EACH(m, count) {
                    float total = start ? out[m][d] : 0;
                    for (int64_t i = t.first; i < near; i++)
                        total += weights[m][i] * get_one(t.states + t.places[i] + d);
                    out[m][d] = total;
                }
        }
    }
}

/* Piece `piece` of `pieces` of a block's scores: of the slots that all tokens see, and with the last piece the others.
 * A token of a text sees what the one before it sees and a slot more: all are matched with what the last one sees. */
static void score(const Block *b, int64_t piece, int64_t pieces) {
    const Pass *p = b->p;
    const Row *row = p->row + p->row_of[b->token];
    const int64_t last = b->token + b->count - 1, shared = row->mask ? shared_by(b) : p->counts[last];
    int64_t low, most;
    lows_of(b, &low, &most);
    low = low / 4 * 4;
    const int64_t fours = shared > low ? (shared - low) / 4 : 0;
    match_all(b, 0, b->queries, seen_by(p, row, last), low + fours * piece / pieces * 4,
              piece + 1 < pieces ? low + fours * (piece + 1) / pieces * 4 : shared);
    if (row->mask && piece + 1 == pieces)
        EACH(t, b->count)
            match_all(b, t * b->group, (t + 1) * b->group, seen_by(p, row, b->token + t), larger(shared, low_of(b, t)),
                      p->counts[b->token + t]);
}

/* Scores of one query to weights that are still to be scaled; soft-capped ones are scaled before they are rounded, as by
 * the modules of such models, which attend step by step. */
static void soften_one(const Block *b, int64_t query) {
    const int64_t count = b->p->counts[b->token + query / b->group], low = low_of(b, query / b->group);
    const int64_t start = low / LANES * LANES;
    const float cap = (float)b->m->score_cap, scaling = (float)b->m->scaling;
    float *own = b->scores + query * b->stride, most = -INFINITY;
    for (int64_t i = start; cap > 0 && i < count; i += LANES)
        store(own + i, capped(nearest(nearest(load(own + i)) * scaling), cap));
    for (int64_t i = start; i < low; i++) own[i] = -INFINITY;
    for (int64_t i = count; i % LANES; i++) own[i] = -INFINITY;
    vec high = all(-INFINITY), total = {0};
    for (int64_t i = start; i < count; i += LANES) {
        const vec x = load(own + i);
        high = pick(x > high, x, high);
    }
    for (int i = 0; i < LANES; i++) most = high[i] > most ? high[i] : most;
    for (int64_t i = start; i < count; i += LANES) {
        const vec e = exponential(load(own + i) - most);
        store(own + i, cap > 0 ? e : nearest(e));
        total += e;
    }
    const float scale = count ? 1.f / sum(total) : 0.f;
    for (int64_t i = start; cap > 0 && i < count; i += LANES) store(own + i, nearest(load(own + i) * scale));
    own[b->stride - 1] = cap > 0 ? 1.f : scale;
}

/* Piece `piece` of `pieces` of a block's queries. */
static void soften(const Block *b, int64_t piece, int64_t pieces) {
    for (int64_t i = b->queries * piece / pieces; i < b->queries * (piece + 1) / pieces; i++) soften_one(b, i);
}

/* Numbers [from, to) of what a block attends to, from its weights. */
static void weigh_block(const Block *b, int64_t from, int64_t to) {
    const Pass *p = b->p;
    const Row *row = p->row + p->row_of[b->token];
    const int64_t shared = shared_by(b);
    int64_t least, low;
    lows_of(b, &least, &low);
    if (low) EACH(i, b->queries) memset(out_of(b, i) + from, 0, (size_t)(to - from) * 4);
    EACH(t, b->count) { /* what windows of others leave out */
        const int64_t own = low_of(b, t), count = p->counts[b->token + t], stop = count < low ? count : low;
        if (own < stop)
            weigh_all(b, t * b->group, (t + 1) * b->group, seen_by(p, row, b->token + t), own, stop, from, to);
    }
    if (low < shared || !low) weigh_all(b, 0, b->queries, seen_by(p, row, b->token), low, shared, from, to);
    EACH(t, b->count) {
        const int64_t own = larger(shared, low), count = p->counts[b->token + t];
        if (count > own)
            weigh_all(b, t * b->group, (t + 1) * b->group, seen_by(p, row, b->token + t), own, count, from, to);
    }
    EACH(i, b->queries) {
        float *out = out_of(b, i);
        const float scale = b->scores[i * b->stride + b->stride - 1];
        int64_t d = from;
        for (; d + LANES <= to; d += LANES) store(out + d, nearest(load(out + d) * scale));
        for (; d < to; d++) out[d] = nearest_one(out[d] * scale);
    }
}

/* Piece i of what a block attends to: whole vectors, and with the last piece what is left. */
static void gather(const Block *b, int64_t piece, int64_t pieces) {
    const int64_t vectors = b->m->head_dim / LANES, end = vectors * (piece + 1) / pieces * LANES;
    weigh_block(b, vectors * piece / pieces * LANES, piece + 1 < pieces ? end : b->m->head_dim);
}

static void attend(const Block *b) {
    score(b, 0, 1);
    soften(b, 0, 1);
    gather(b, 0, 1);
}
