/* What native.py hands over: a model's weights, and one pass. */
#pragma once
#include <stdatomic.h>
#include "numbers.h"

enum { Q, K, V, O, GATE, UP, DOWN, NUM_WEIGHTS };
enum { NORM_BEFORE = NUM_WEIGHTS, NORM_AFTER, Q_NORM, K_NORM, NORM_ATTENDED, NORM_FED, NUM_VECTORS };

/* window: positions that a token sees, its own included; 0: all. angles: where those of the layer begin in a token's
 * `Pass.angles`; -1: it does not rotate. */
typedef struct {
    int64_t window, angles;
} Layer;

/* What a model is made of, and in what it differs from Llama, which has ones for the scales, 0 for the flags and caps,
 * and rotates whole heads.
 *
 * weights: NUM_WEIGHTS per layer. vectors: NUM_VECTORS pointers per layer, first the biases in the order of the weights,
 * 0 where a layer has none; NORM_ATTENDED and NORM_FED are of what attention and the inner layer add to a token.
 * angles: numbers of a token in `Pass.angles`. rotary: numbers of a head that are rotated, the first ones.
 * exact_norm: norms are rounded after their weights only. gelu: the inner layer's gate, for silu.
 * embed_scale, added_scale: of embeddings, and of what is added to a token. divisor: of logits.
 * score_cap, logit_cap: x becomes cap * tanh(x / cap); 0: it does not. */
typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocab, embedded, angles, rotary, exact_norm, gelu;
    const Layer *layer;
    const Weight *weights;
    const float *const *vectors;
    const number *embed;
    const float *norm, *head_bias;
    Weight head;
    double epsilon, scaling, embed_scale, added_scale, divisor, score_cap, logit_cap;
} Model;

/* One row of the pass: `width` tokens from token `first` on; the first of them belongs to slot `start`.
 * mask: additive [width, read] with `mask_stride`, which says what each token sees; 0: token j sees slots 0 .. start + j.
 * table: the row's pages. lists: where its lists of visible slots begin. */
typedef struct {
    int64_t first, width, read, start, lists, mask_stride;
    const int64_t *table;
    const float *mask;
} Row;

/* quantised: keys and values lie there in bytes, as slots.h has them, and all that follows is in bytes, too.
 * Slot s of a row lies at table[s / page_size] * page_stride + s % page_size * slot_stride, plus head * head_stride.
 * targets: where each token's own K/V goes (same unit, less the head), -1 for nowhere; 0: to its slot.
 * kept: tokens whose logits are wanted, ascending.
 * places: row of `angles` (cosines, signed sines, of one kind of layer after the other) of each token; 0: the number of
 *     its slot.
 * features: where the hidden states of all tokens go that enter layer i, and as the last those after the final norm,
 *     [tokens, hidden] each; 0 where they are not wanted.
 * The rest is working memory. stride: from the scores of one query to those of the next. leads: of each token, how many
 * slots it sees before the first one that it does not. */
typedef struct {
    int64_t threads, tokens, rows, num_kept, quantised, page_size, page_stride, slot_stride, head_stride;
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
