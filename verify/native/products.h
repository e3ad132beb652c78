/* Products of a few rows with a matrix of weights, and what stands between them. */
#pragma once
#include "vectors.h"

#define NEAR (1 << 17)  /* floats of a level 2 cache that tokens may fill while weights pass by */

/* out[m][n] = x[m] . w[n], each in the same order whatever M and N are. ahead: floats from a row of w to the one that
 * the next block reads in its place. */
INLINE void block(const int M, const int N, const float *x, int64_t x_stride, const float *const *w, int64_t size,
                  int64_t ahead, float out[MOST][BROAD]) {
    vec total[MOST][BROAD];
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) total[m][n] = (vec){0};
    int64_t k = 0;
    for (; k + LANES <= size; k += LANES) {
        vec b[BROAD];
        for (int n = 0; n < N; n++) {
            b[n] = load(w[n] + k);
            if (ahead) __builtin_prefetch(w[n] + k + ahead);
        }
        for (int m = 0; m < M; m++) {
            vec a = load(x + m * x_stride + k);
            for (int n = 0; n < N; n++) total[m][n] += a * b[n];
        }
    }
    for (int m = 0; m < M; m++) {
        int n = 0;
        for (; n + 4 <= N; n += 4)
            *(quad *)(out[m] + n) = sums(total[m][n], total[m][n + 1], total[m][n + 2], total[m][n + 3]);
        for (; n < N; n++) out[m][n] = sum(total[m][n]);
        for (n = 0; n < N; n++)
            for (int64_t i = k; i < size; i++) out[m][n] += x[m * x_stride + i] * w[n][i];
    }
}

/* What becomes of a product. */
enum { SET, ADD };

/* N columns from `n` on for M tokens. ahead: whether to ask for the weights of the next ones. */
INLINE void column(const int M, const int N, const int ahead, const float *x, int64_t x_stride, const float *w, const float *bias,
                   int64_t size, int64_t n, float *out, int64_t out_stride, int mode) {
    const float *rows[BROAD];
    float p[MOST][BROAD];
    for (int i = 0; i < N; i++) rows[i] = w + (n + i) * size;
    block(M, N, x, x_stride, rows, size, ahead ? N * size : 0, p);
    for (int m = 0; m < M; m++) {
        float *o = out + m * out_stride + n;
        if (bias)
            for (int i = 0; i < N; i++) p[m][i] += bias[n + i];
        if (mode == ADD)
            for (int i = 0; i < N; i++) p[m][i] += o[i];
        for (int i = 0; i < N; i++) o[i] = p[m][i];
    }
}

INLINE void panel(const int M, const int ahead, const float *x, int64_t x_stride, const float *w, const float *bias, int64_t size,
                  int64_t from, int64_t to, float *out, int64_t out_stride, int mode) {
    const int N = WIDE(M);
    int64_t n = from;
    for (; n + N <= to; n += N) column(M, N, ahead, x, x_stride, w, bias, size, n, out, out_stride, mode);
    for (; n < to; n++) column(M, 1, ahead, x, x_stride, w, bias, size, n, out, out_stride, mode);
}

/* Columns [from, to) of out = x @ w.T (+ bias): few tokens at a time, so that they stay in cache, and under them a
 * slice of w, so that it does. */
static void linear(const float *x, int64_t tokens, int64_t x_stride, const float *w, const float *bias, int64_t size,
                   int64_t from, int64_t to, float *out, int64_t out_stride, int mode) {
    if (!w || from >= to) return;
    const int64_t near = NEAR / size > MOST ? NEAR / size / MOST * MOST : MOST, step = tokens > MOST ? 8 : to - from;
    for (int64_t start = 0; start < tokens; start += near) {
        const int64_t some = tokens - start < near ? tokens - start : near, pieces = (some + MOST - 1) / MOST;
        for (int64_t n = from; n < to; n += step) {
            const int64_t end = n + step < to ? n + step : to;
            EACH(i, pieces) {
                const int64_t first = start + some * i / pieces, count = start + some * (i + 1) / pieces - first;
                const float *a = x + first * x_stride;
                float *o = out + first * out_stride;
#define CASE(M) case M: panel(M, AHEAD, a, x_stride, w, bias, size, n, end, o, out_stride, mode); break;
#define AHEAD 1
                if (pieces == 1)
                    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef AHEAD
#define AHEAD 0 /* many tokens wait for their operands, not for memory */
                else
                    switch (count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef AHEAD
#undef CASE
            }
        }
    }
}

static void norm(const float *x, const float *weight, int64_t size, float epsilon, float *out) {
    vec squares = {0};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < size; i++) total += x[i] * x[i];
    float scale = 1.f / sqrtf(total / (float)size + epsilon);
    for (i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

/* gate = silu(gate) * up */
static void act(float *gate, const float *up, int64_t size) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
        vec x = load(gate + i);
        store(gate + i, x / (1.f + exponential(-x)) * load(up + i));
    }
    for (; i < size; i++) {
        float e[LANES];
        store(e, exponential(all(-gate[i])));
        gate[i] = gate[i] / (1.f + e[0]) * up[i];
    }
}
