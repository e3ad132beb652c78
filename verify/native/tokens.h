/* Tokens as products want them: rounded to int8, every CODES numbers by a scale of their own, or in another order. */
#pragma once
#include "weights.h"

#define UNIT (4 * LANES) /* codes of a vector */

typedef uint8_t packet __attribute__((vector_size(UNIT), aligned(1), may_alias));

/* One vector of a token's codes, in the order in which the codes of weights are unpacked, and what goes with it lane by
 * lane: `start`, what is left of a sum over weights' codes when those are stored as positive numbers; scales; and the
 * sum of the codes themselves, scaled. It takes as many bytes as UNIT floats. */
typedef struct {
    packet codes;
    ivec start;
    vec scales, totals;
} Unit;

/* Lane i: acc + the products of four unsigned w with four signed x. */
INLINE ivec dot(ivec acc, packet w, packet x) {
#if LANES == 16 && defined(__AVX512VNNI__)
    return (ivec)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif LANES == 8 && defined(__AVXVNNI__)
    return (ivec)_mm256_dpbusd_avx_epi32((__m256i)acc, (__m256i)w, (__m256i)x);
#elif LANES == 8 && defined(__AVX2__)
    const __m256i a = (__m256i)w, b = (__m256i)x;
    const __m256i even = _mm256_madd_epi16(_mm256_srli_epi16(_mm256_slli_epi16(a, 8), 8),
                                           _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    return acc + (ivec)even + (ivec)_mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
#else
    const ivec a = (ivec)w, b = (ivec)x;
    for (int shift = 0; shift < 32; shift += 8) acc += (a >> shift & 255) * (b << (24 - shift) >> 24);
    return acc;
#endif
}

/* UNIT codes of a row of weights as positive numbers: int8 plus 128; of blocks of 4 bits the lower halves of each 16
 * bytes, then the upper ones (`place_of`). */
INLINE packet positive(const int F, const char *values, int64_t unit) {
    if (F == Q8I) return *(const packet *)(values + unit * UNIT) ^ 128;
#if LANES == 16
    const __m512i both = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(values + unit * UNIT / 2)));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
    return (packet)_mm512_srlv_epi32(both, shifts) & 15;
#elif LANES == 8 && defined(__AVX2__)
    const __m256i both = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)(values + unit * UNIT / 2)));
    return (packet)_mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)) & 15;
#else
    packet out;
    for (int i = 0; i < UNIT; i++) {
        const int64_t code = unit * UNIT % CODES + i, at = unit * UNIT / CODES * (CODES / 2) + code % (CODES / 2);
        out[i] = (uint8_t)values[at] >> (code < CODES / 2 ? 0 : 4) & 15;
    }
    return out;
#endif
}

/* Where code i of a unit lies in its vector. */
INLINE int place_of(const int F, int i) {
    const int half = CODES / 2, blocks = UNIT / CODES;
    return F == Q8I || blocks < 2 ? i : i / half % 2 * half * blocks + i / CODES * half + i % half;
}

/* Which block of CODES lane i of a unit belongs to. */
INLINE int block_of_lane(const int F, int i) {
    return UNIT <= CODES ? 0 : F == Q8I ? 4 * i / CODES : 4 * i % UNIT / (CODES / 2) % (UNIT / CODES);
}

/* Rounds `tokens` rows of x to units. */
INLINE void round_tokens(const int F, const float *x, int64_t tokens, int64_t size, float *out) {
    const int64_t units = (size + UNIT - 1) / UNIT;
    EACH(t, tokens) EACH(u, units) {
        float given[UNIT] = {0}, scales[UNIT / CODES + 1];
        int8_t codes[UNIT];
        const int64_t start = u * UNIT, count = size - start < UNIT ? size - start : UNIT;
        const float *own = x + t * size + start / CODES * CODES;
        memcpy(given, x + t * size + start, (size_t)count * 4);
        for (int b = 0; b * CODES < UNIT; b++) {
            const int64_t rest = size - (start / CODES + b) * CODES;
            float most = 0;
            EACH(i, rest < CODES ? rest : CODES) most = fmaxf(fabsf(own[b * CODES + i]), most);
            const float inverse = most > 0 ? 127.f / most : 0.f;
            scales[b] = most / 127.f;
            for (int i = b * CODES; i < (b + 1) * CODES && i < UNIT; i++)
                codes[place_of(F, i)] = (int8_t)(int)(given[i] * inverse + 12582912.f - 12582912.f);
        }
        Unit *unit = (Unit *)(out + (t * units + u) * UNIT);
        memcpy(&unit->codes, codes, UNIT);
        const ivec sums = dot((ivec){0}, (packet){0} + 1, unit->codes);
        vec own_scales;
        for (int i = 0; i < LANES; i++) own_scales[i] = scales[block_of_lane(F, i)];
        unit->start = sums * (F == Q8I ? -128 : -8);
        unit->scales = own_scales;
        unit->totals = floats(sums) * own_scales;
    }
}

/* In each 2 * LANES numbers those with even places first, as bfloat16 lies in the lanes of two numbers. */
INLINE void part(const float *x, int64_t size, float *out) {
    int64_t k = 0;
    for (; k + 2 * LANES <= size; k += 2 * LANES)
        for (int i = 0; i < LANES; i++) {
            out[k + i] = x[k + 2 * i];
            out[k + LANES + i] = x[k + 2 * i + 1];
        }
    for (; k < size; k++) out[k] = x[k];
}

/* What products with weights of a format read: floats as they are (F32), or tokens prepared for them. */
INLINE int reads(int format) { return format == BF16 || format == Q8I || format == Q4I ? format : F32; }

/* Floats of a token of `size` numbers, prepared for any format. */
INLINE int64_t prepared_size(int64_t size) { return (size + UNIT - 1) / UNIT * UNIT; }

/* Prepares `tokens` rows of x, `prepared_size(size)` floats each. */
static void prepare(int format, const float *x, int64_t tokens, int64_t size, float *out) {
    const int64_t stride = prepared_size(size);
    switch (format) {
    case BF16: EACH(t, tokens) part(x + t * size, size, out + t * stride); break;
    case Q8I: round_tokens(Q8I, x, tokens, size, out); break;
    case Q4I: round_tokens(Q4I, x, tokens, size, out); break;
    }
}
