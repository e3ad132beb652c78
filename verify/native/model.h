/* What native.py hands over: a model's weights, and one pass. */
#pragma once
#include <stdatomic.h>
#include "numbers.h"

enum { Q, K, V, O, GATE, UP, DOWN, NUM_WEIGHTS };
enum { NORM_BEFORE = NUM_WEIGHTS, NORM_AFTER, Q_NORM, K_NORM, NUM_VECTORS };

/* weights: NUM_WEIGHTS per layer. vectors: NUM_VECTORS pointers per layer, first the biases in the order of the weights,
 * 0 where a layer has none. */
typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocab, embedded;
    const Weight *weights;
    const float *const *vectors;
    const number *embed;
    const float *norm, *head_bias;
    Weight head;
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
    float *room; /* tokens prepared for products, room_size floats for each thread */
    int64_t room_size, own_size, num_groups, stride;
    int64_t *seen, *counts, *leads, *row_of, *groups;
    _Atomic int64_t *tickets;
} Pass;

/* A greedy chain: its rows and token ids are those of the pass, and change from level to level.
 * vocab: ids that may be chosen. best: [rows, levels]. targets: as of the pass, [levels, rows]. */
typedef struct {
    int64_t levels, vocab;
    Row *row;
    int64_t *ids, *best;
    const int64_t *targets;
} Chain;
