/* Numbers as they are stored: in the dtype of a checkpoint, or in few bits with a scale per group. In registers all of
 * them are float32. */
#pragma once
#include "vectors.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { F32, BF16, F16, Q8, Q4, Q8I, Q4I };

#define CODES 32 /* 4-bit codes of a block: the lower halves of 16 bytes, then their upper halves (packed.py) */

/* A matrix [out, in], row by row. Q8: int8 codes; Q4: blocks of CODES, each code plus 8; Q8I, Q4I: the same, to be
 * multiplied with tokens that are rounded, too (tokens.h). Weight i of a row is code * scale + offset of its group,
 * i / group. offsets: 0 where there are none. values: 0 where there is no weight. */
typedef struct {
    const void *values;
    const float *scales, *offsets;
    int64_t format, group;
} Weight;

typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
typedef int8_t codes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* LANES neighbours as integers. GCC makes scalars of __builtin_convertvector. */
INLINE ivec of_halves(const uint16_t *p) {
#if LANES == 16
    return (ivec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    return __builtin_convertvector(*(const halves *)p, ivec);
#endif
}

INLINE ivec of_codes(const int8_t *p) {
#if LANES == 16
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(*(const codes *)p, ivec);
#endif
}

INLINE ivec of_bytes(const uint8_t *p) {
#if LANES == 16
    return (ivec)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return __builtin_convertvector(*(const bytes *)p, ivec);
#endif
}

INLINE vec floats(ivec x) {
    return __builtin_convertvector(x, vec);
}

INLINE vec wide_half(ivec h) {
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)h));
#else
    ivec magnitude = (h & 0x7fff) << 13;
    vec x = (vec)magnitude * 0x1p112f; /* subnormal numbers, too */
    x = pick((h & 0x7c00) == 0x7c00, (vec)(magnitude | 0x7f800000), x);
    return (vec)((ivec)x | (h & 0x8000) << 16);
#endif
}

/* a * b + c, rounded once wherever that is quick: left to the compiler it may be, or not, from one copy of a loop to the
 * next, and a token's bits would depend on how many tokens and columns are computed together. */
INLINE vec fused(vec a, vec b, vec c) {
#if LANES == 16
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES == 8 && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE float fused_one(float a, float b, float c) {
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

/* LANES numbers of a dtype. */
INLINE vec numbers(const int format, const void *p, int64_t i) {
    if (format == F32) return load((const float *)p + i);
    if (format == BF16) return (vec)(of_halves((const uint16_t *)p + i) << 16);
#if LANES == 16
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)((const uint16_t *)p + i)));
#elif defined(__F16C__) && LANES == 8
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)p + i)));
#else
    return wide_half(of_halves((const uint16_t *)p + i));
#endif
}

/* One of them. */
INLINE float number_at(const int format, const void *p, int64_t i) {
    if (format == F32) return ((const float *)p)[i];
    ivec bits = {((const uint16_t *)p)[i]};
    return format == BF16 ? ((vec)(bits << 16))[0] : wide_half(bits)[0];
}

/* The nearest numbers of a dtype (of two that are as near, the even one), as bits in the lower half of each lane. */
INLINE ivec narrow(const int format, vec x) {
    const ivec bits = (ivec)x, sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (format == BF16) {
        const ivec rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16 & 0xffff;
        return ((x != x) & 0x7fc0) | ((x == x) & rounded);
    }
    const ivec normal = (size - (112 << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const ivec tiny = (ivec)((vec)size + all(0.5f)) - (126 << 23), most = (ivec){0} + 0x7c00;
    ivec out = ((size < 113 << 23) & tiny) | ((size >= 113 << 23) & normal);
    out = ((size >= 143 << 23) & most) | ((size < 143 << 23) & out);
    return sign | ((x != x) & 0x7e00) | ((x == x) & out);
}

INLINE vec rounded(const int format, vec x) {
    if (format == F32) return x;
    return format == BF16 ? (vec)(narrow(BF16, x) << 16) : wide_half(narrow(F16, x));
}

INLINE float rounded_one(const int format, float x) {
    return format == F32 ? x : rounded(format, all(x))[0];
}

/* `size` numbers of a dtype from and to float32. */
INLINE void widen(const int format, const void *from, int64_t size, float *to) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, numbers(format, from, i));
    for (; i < size; i++) to[i] = number_at(format, from, i);
}

INLINE void round_all(const int format, float *x, int64_t size) {
    if (format == F32) return;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(x + i, rounded(format, load(x + i)));
    for (; i < size; i++) x[i] = rounded_one(format, x[i]);
}

/* LANES numbers from place i of `to` on. */
INLINE void keep(const int format, vec x, void *to, int64_t i) {
    if (format == F32) {
        store((float *)to + i, x);
        return;
    }
    const ivec bits = narrow(format, x);
#if LANES == 16
    _mm256_storeu_si256((__m256i *)((uint16_t *)to + i), _mm512_cvtepi32_epi16((__m512i)bits));
#else
    for (int j = 0; j < LANES; j++) ((uint16_t *)to)[i + j] = (uint16_t)bits[j];
#endif
}

INLINE void put(const int format, const float *from, int64_t size, void *to) {
    if (format == F32) {
        memcpy(to, from, (size_t)size * 4);
        return;
    }
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) keep(format, load(from + i), to, i);
    for (; i < size; i++) ((uint16_t *)to)[i] = (uint16_t)narrow(format, all(from[i]))[0];
}
