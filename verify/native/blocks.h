/* Which queries of a pass attend together, and how threads share a few that read a long text. */
#pragma once
#include "attention.h"

#define LONG 512 /* slots from which threads share the reading of one text */

/* Tokens whose queries make up one block. */
INLINE int64_t tokens_together(const Model *m) {
    const int64_t group = m->heads / m->kv_heads;
    return group < QUERIES ? QUERIES / group : 1;
}

/* Which row each token belongs to, and neighbours that attend together. */
static void arrange(const Model *m, Pass *p) {
    const int64_t together = tokens_together(m);
    p->num_groups = p->stride = 0;
    EACH(r, p->rows) {
        const Row *row = p->row + r;
        EACH(j, row->width) p->row_of[row->first + j] = r;
        const int64_t pieces = (row->width + together - 1) / together;
        const int64_t read = row->mask ? row->read : row->start + row->width;
        const int64_t stride = (read + LANES - 1) / LANES * LANES + LANES;
        if (stride > p->stride) p->stride = stride;
        EACH(i, pieces) {
            int64_t *group = p->groups + 2 * p->num_groups++, begin = row->width * i / pieces;
            group[0] = row->first + begin;
            group[1] = row->width * (i + 1) / pieces - begin;
        }
    }
}

/* Block i of a pass. Its scores lie at `scores`, or where all threads find them. */
INLINE Block numbered(const Model *m, const Pass *p, int64_t layer, int64_t i, float *scores) {
    const int64_t *tokens = p->groups + i % p->num_groups * 2, kv = i / p->num_groups, group = m->heads / m->kv_heads;
    if (!scores) scores = p->own + (kv * p->tokens + tokens[0]) * group * p->stride;
    return block_of(m, p, layer, kv, tokens[0], tokens[1], scores, p->attended + tokens[0] * m->heads * m->head_dim);
}

/* How threads share a few blocks that read a long text: pieces of a block's slots and of its queries; whole blocks of
 * values for every thread, and pieces of each that is left over. No slots: there are blocks enough, too many for their
 * scores to lie side by side, or too little to read. */
typedef struct {
    int64_t slots, queries, whole, numbers;
} Split;

static Split split_of(const Model *m, const Pass *p, int64_t threads) {
    const int64_t blocks = m->kv_heads * p->num_groups, vectors = m->head_dim / LANES;
    if (threads == 1 || blocks >= 8 * threads || p->stride < LONG) return (Split){0, 0, 0, 0};
    if (m->heads * p->tokens * p->stride > threads * p->own_size) return (Split){0, 0, 0, 0};
    Split split = {8 * threads / blocks + 1, 4 * threads / blocks + 1, blocks / threads * threads, 1};
    const int64_t left = blocks - split.whole;
    while (2 * split.numbers <= vectors && left * split.numbers % threads) split.numbers *= 2;
    return split;
}

/* Item i of the values: [*piece] of [*pieces] of the block that is returned. */
INLINE int64_t values_of(const Split *split, int64_t i, int64_t *piece, int64_t *pieces) {
    const int64_t part = i - split->whole;
    *pieces = part < 0 ? 1 : split->numbers;
    *piece = part < 0 ? 0 : part % split->numbers;
    return part < 0 ? i : split->whole + part / split->numbers;
}
