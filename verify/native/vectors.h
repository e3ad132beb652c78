/* Vectors of this processor's width, in GNU C: loads, sums in one fixed order, exp. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define MOST 6   /* tokens a block */
#define BROAD 8  /* rows of weights a block, at most: accumulators and operands must fit the registers */
#if defined(__AVX512F__)
#define LANES 16
#define SPAN 4 /* vectors of a value summed at once */
#define WIDE(M) ((M) <= 2 ? 8 : 4)
#elif defined(__AVX__)
#define LANES 8
#define SPAN 2
#define WIDE(M) ((M) <= 1 ? 8 : (M) <= 3 ? 4 : 2)
#else
#define LANES 4
#define SPAN 2
#define WIDE(M) ((M) <= 1 ? 8 : (M) <= 4 ? 4 : 2)
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t iquad __attribute__((vector_size(16), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) for (int64_t i = 0; i < (n); i++)

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec x) { *(vec *)p = x; }
INLINE vec all(float x) { return x - (vec){0}; }

/* Sums of all lanes, in one order: of one vector, and of four at a time. */
INLINE quad fold(vec x) {
    const quad *q = (const quad *)&x;
#if LANES == 16
    return (q[0] + q[1]) + (q[2] + q[3]);
#elif LANES == 8
    return q[0] + q[1];
#else
    return q[0];
#endif
}

INLINE float sum(vec x) {
    quad q = fold(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

#if defined(__has_builtin) && __has_builtin(__builtin_shufflevector)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define PICK_WIDE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (iquad){__VA_ARGS__})
#define PICK_WIDE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

INLINE quad sums(vec a, vec b, vec c, vec d) {
    quad q = fold(a), r = fold(b), s = fold(c), t = fold(d);
    quad ab = PICK(q, r, 0, 4, 1, 5) + PICK(q, r, 2, 6, 3, 7);
    quad cd = PICK(s, t, 0, 4, 1, 5) + PICK(s, t, 2, 6, 3, 7);
    return PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
}

/* Sums of M x 4 vectors, M <= 4, those of x[m] in out[m]: the same additions, of 16 sums at once. */
INLINE void sums_of(const int M, vec x[4][4], quad out[4]) {
#if LANES == 16
#define QUADS(a, b, c, d) \
    4 * a, 4 * a + 1, 4 * a + 2, 4 * a + 3, 4 * b, 4 * b + 1, 4 * b + 2, 4 * b + 3, \
    4 * c, 4 * c + 1, 4 * c + 2, 4 * c + 3, 4 * d, 4 * d + 1, 4 * d + 2, 4 * d + 3
#define EACH_QUAD(a, b, c, d) \
    a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#define HALVES(a, b) (PICK_WIDE(a, b, QUADS(0, 2, 4, 6)) + PICK_WIDE(a, b, QUADS(1, 3, 5, 7)))
    if (M > 1) {
        vec own[4];
        for (int n = 0; n < 4; n++) {
            const vec low = HALVES(x[0][n], x[1][n]), high = HALVES(x[2][n], x[3][n]);
            own[n] = HALVES(low, high);
        }
#define PAIRS(a, b) (PICK_WIDE(a, b, EACH_QUAD(0, 16, 1, 17)) + PICK_WIDE(a, b, EACH_QUAD(2, 18, 3, 19)))
        const vec ab = PAIRS(own[0], own[1]), cd = PAIRS(own[2], own[3]);
        const vec all = PICK_WIDE(ab, cd, EACH_QUAD(0, 1, 16, 17)) + PICK_WIDE(ab, cd, EACH_QUAD(2, 3, 18, 19));
        for (int m = 0; m < M; m++) out[m] = ((const quad *)&all)[m];
        return;
    }
#endif
    for (int m = 0; m < M; m++) out[m] = sums(x[m][0], x[m][1], x[m][2], x[m][3]);
}

/* Asks for what will be read soon, into a cache that can wait for more lines at once than the first. */
INLINE void fetch(const void *from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char *)from + i, 0, 2);
}

INLINE vec pick(ivec where, vec a, vec b) { return (vec)((where & (ivec)a) | (~where & (ivec)b)); }

/* exp(x) to 2 ulp (Cephes' polynomial); NaN stays NaN. */
INLINE vec exponential(vec x) {
    const vec low = all(-87.3f), high = all(88.3f), magic = all(12582912.f);
    ivec under = x < low;
    x = pick(under, low, x);
    x = pick(x > high, high, x);
    vec n = x * 1.44269504088896341f + magic;
    ivec power = (ivec)n - (ivec)magic;
    n -= magic;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.f;
    y = y * (vec)((power + 127) << 23);
    return pick(under, (vec){0}, y);
}

/* tanh(x), as exact (Cephes' polynomial near 0); NaN stays NaN. */
INLINE vec tangent(vec x) {
    const ivec sign = (ivec)x & ~0x7fffffff;
    const vec size = (vec)((ivec)x ^ sign), square = x * x;
    vec y = all(-5.70498872745e-3f);
    y = y * square + 2.06390887954e-2f;
    y = y * square - 5.37397155531e-2f;
    y = y * square + 1.33314422036e-1f;
    y = y * square - 3.33332819422e-1f;
    y = y * square * x + x;
    const vec far = 1.f - 2.f / (exponential(2.f * size) + 1.f);
    return pick(size < 0.625f, y, (vec)((ivec)far | sign));
}
