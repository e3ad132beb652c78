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

/* exact: rounded after the weight only. */
static void norm(const float *x, const float *weight, int64_t size, float epsilon, int64_t exact, float *out) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    float scale = 1.f / sqrtf(total / (float)size + epsilon);
    if (exact) {
        for (i = 0; i + LANES <= size; i += LANES) store(out + i, nearest(load(x + i) * scale * load(weight + i)));
        for (; i < size; i++) out[i] = nearest_one(x[i] * scale * weight[i]);
        return;
    }
    for (i = 0; i + LANES <= size; i += LANES) store(out + i, nearest(nearest(load(x + i) * scale) * load(weight + i)));
    for (; i < size; i++) out[i] = nearest_one(nearest_one(x[i] * scale) * weight[i]);
}

INLINE vec silu(vec x) { return x / (1.f + exponential(-x)); }

/* By way of tanh, as the models that have it were trained. */
INLINE vec gelu(vec x) {
    const vec cube = x * x * x;
    return 0.5f * x * (1.f + tangent(fused(all(0.044715f), cube, x) * 0.79788456080286536f));
}

/* gate = silu(gate) * up, or gelu(gate) * up */
static void act(float *gate, const float *up, int64_t size, int64_t by_gelu) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        const vec x = nearest(load(gate + i));
        store(gate + i, nearest(nearest(by_gelu ? gelu(x) : silu(x)) * nearest(load(up + i))));
    }
    for (; i < size; i++) {
        const vec x = all(nearest_one(gate[i])), y = by_gelu ? gelu(x) : silu(x);
        gate[i] = nearest_one(nearest_one(y[0]) * nearest_one(up[i]));
    }
}

/* x * scale, of numbers that are to be rounded */
static void rescale(float *x, float scale, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, nearest(nearest(load(x + i)) * scale));
    for (; i < size; i++) x[i] = nearest_one(nearest_one(x[i]) * scale);
}

INLINE vec capped(vec x, float cap) { return nearest(nearest(tangent(nearest(x / cap))) * cap); }

/* x += y, a product */
static void add(float *x, const float *y, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, nearest(load(x + i) + nearest(load(y + i))));
    for (; i < size; i++) x[i] = nearest_one(x[i] + nearest_one(y[i]));
}
