/* What run.py hands over: a model's weights, and one pass. */
#pragma once
#include <stdatomic.h>
#include "vectors.h"

/* A number of keys and values as it is kept; LANES of them, and one, as they are reckoned with. */
typedef float number;
INLINE vec get(const number *p) { return load(p); }
INLINE float get_one(const number *p) { return *p; }

enum { Q, K, V, O, GATE, UP, DOWN, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, GATE_BIAS, UP_BIAS, DOWN_BIAS,
       NORM_BEFORE, NORM_AFTER, Q_NORM, K_NORM, NUM_WEIGHTS };

/* weights: NUM_WEIGHTS pointers per layer, 0 where a layer has none. */
typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocab, embedded;
    const float *const *weights;
    const float *embed, *norm, *head, *head_bias;
    double epsilon, scaling;
} Model;

/* One row of the pass: `width` tokens from token `first` on; the first of them belongs to slot `start`.
 * mask: additive [width, read] with `mask_stride`, which says what each token sees; 0: token j sees slots 0 .. start + j.
 * table: the row's pages. lists: where its lists of visible slots begin. */
typedef struct {
    int64_t first, width, read, start, lists, mask_stride;
    const int64_t *table;
    const float *mask;
} Row;

/* Slot s of a row lies at table[s / page_size] * page_stride + s % page_size * slot_stride, plus head * head_stride.
 * targets: where each token's own K/V goes (same unit, less the head), -1 for nowhere; 0: to its slot.
 * kept: tokens whose logits are wanted, ascending.
 * places: row of `angles` (cosines, signed sines) of each token; 0: the number of its slot.
 * features: where the hidden states of all tokens go that enter layer i, and as the last those after the final norm,
 *     [tokens, hidden] each; 0 where they are not wanted.
 * The rest is working memory. stride: from the scores of one query to those of the next. leads: of each token, how many
 * slots it sees before the first one that it does not. */
typedef struct {
    int64_t threads, tokens, rows, num_kept, page_size, page_stride, slot_stride, head_stride;
    const int64_t *ids, *places, *targets, *kept;
    const float *angles;
    const Row *row;
    number *const *keys, *const *values;
    float *const *features;
    float *logits;
    float *hidden, *normed, *mixed, *attended, *acted, *own;
    int64_t own_size, num_groups, stride;
    int64_t *seen, *counts, *leads, *row_of, *groups;
    _Atomic int64_t *tickets;
} Pass;
