/* The dtype of the model at hand, NUMBER (build.py): of its embeddings, keys and values. Between the layers states are
 * float32, rounded to that dtype wherever the model's modules round, so that greedy text is theirs. */
#pragma once
#include "weights.h"

typedef __typeof__(__builtin_choose_expr(NUMBER == F32, (float)0, (uint16_t)0)) number;

/* LANES numbers, and one. */
INLINE vec get(const number *p) { return numbers(NUMBER, p, 0); }
INLINE float get_one(const number *p) { return number_at(NUMBER, p, 0); }

INLINE vec nearest(vec x) { return rounded(NUMBER, x); }
INLINE float nearest_one(float x) { return rounded_one(NUMBER, x); }

static void norm(const float *x, const float *weight, int64_t size, float epsilon, float *out) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    float scale = 1.f / sqrtf(total / (float)size + epsilon);
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, nearest(nearest(load(x + i) * scale) * load(weight + i)));
    for (; i < size; i++) out[i] = nearest_one(nearest_one(x[i] * scale) * weight[i]);
}

/* gate = silu(gate) * up */
static void act(float *gate, const float *up, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec x = nearest(load(gate + i));
        store(gate + i, nearest(nearest(x / (1.f + exponential(-x))) * nearest(load(up + i))));
    }
    for (; i < size; i++) {
        float e[LANES], x = nearest_one(gate[i]);
        store(e, exponential(all(-x)));
        gate[i] = nearest_one(nearest_one(x / (1.f + e[0])) * nearest_one(up[i]));
    }
}

/* x += y, a product */
static void add(float *x, const float *y, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, nearest(load(x + i) + nearest(load(y + i))));
    for (; i < size; i++) x[i] = nearest_one(x[i] + nearest_one(y[i]));
}
