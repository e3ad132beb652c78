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
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (iquad){__VA_ARGS__})
#endif

INLINE quad sums(vec a, vec b, vec c, vec d) {
    quad q = fold(a), r = fold(b), s = fold(c), t = fold(d);
    quad ab = PICK(q, r, 0, 4, 1, 5) + PICK(q, r, 2, 6, 3, 7);
    quad cd = PICK(s, t, 0, 4, 1, 5) + PICK(s, t, 2, 6, 3, 7);
    return PICK(ab, cd, 0, 1, 4, 5) + PICK(ab, cd, 2, 3, 6, 7);
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
