/* Products of a few rows with a matrix of weights of one FORMAT (build.py): one shape of loops for all of them. */
#include "tokens.h"
#include "products.h"

#define SLICE 8         /* rows of weights that stay in cache under many tokens */
#define NEAR (1 << 17)  /* floats of a level 2 cache that tokens may fill while weights pass by */

#define INTEGER(F) ((F) == Q8I || (F) == Q4I)
#define PACKED(F) ((F) == Q8 || (F) == Q4 || INTEGER(F))

/* A loop over so few that nothing is left of it: sums and operands must lie in registers. */
#define EVERY(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); i++)

/* N rows of weights, as addresses: of their numbers, scales and offsets; and bytes from each row to the one to be asked
 * for meanwhile, 0 where there is none. */
typedef struct {
    const char *values[BROAD];
    const float *scales[BROAD], *offsets[BROAD];
    int64_t ahead[BROAD];
} Rows;

INLINE int64_t bytes_of(const int F, int64_t size) {
    if (F == Q4 || F == Q4I) return (size + CODES - 1) / CODES * (CODES / 2);
    return F == F32 ? 4 * size : F == Q8 || F == Q8I ? size : 2 * size;
}

#define MULTIPLY(k, b) \
    EVERY(m, M) { \
        vec a = load(x + m * x_stride + (k)); \
        EVERY(n, N) total[m][n] = fused(a, (b)[n], total[m][n]); \
    }

/* Whole vectors of rows of numbers; returns where they end. */
INLINE int64_t dense(const int F, const int M, const int N, const float *x, int64_t x_stride, const Rows *w,
                     int64_t size, vec total[MOST][BROAD]) {
    int64_t k = 0;
    if (F == BF16) { /* two in a lane */
        for (; k + 2 * LANES <= size; k += 2 * LANES) {
            vec even[BROAD], odd[BROAD];
            EVERY(n, N) {
                const ivec both = *(const ivec *)(w->values[n] + 2 * k);
                even[n] = (vec)(both << 16);
                odd[n] = (vec)(both & -65536);
                if (w->ahead[n]) fetch(w->values[n] + 2 * k + w->ahead[n], 1);
            }
            MULTIPLY(k, even)
            MULTIPLY(k + LANES, odd)
        }
        return k;
    }
    for (; k + LANES <= size; k += LANES) {
        vec b[BROAD];
        EVERY(n, N) {
            b[n] = numbers(F, w->values[n], k);
            if (w->ahead[n] && (F == F32 || k % (2 * LANES) == 0))
                fetch(w->values[n] + bytes_of(F, k) + w->ahead[n], 1);
        }
        MULTIPLY(k, b)
    }
    return k;
}

/* Numbers k .. k + LANES of a row of codes, in a group of this scale and offset. */
INLINE vec unpacked(const int F, const char *row, int64_t k, float scale, const float *offset) {
    if (F == Q8) {
        const vec number = floats(of_codes((const int8_t *)row + k));
        if (offset) return fused(number, all(scale), all(*offset));
        return number * scale;
    }
    const ivec two = of_bytes((const uint8_t *)row + k / CODES * (CODES / 2) + k % (CODES / 2));
    const ivec code = two >> (k % CODES < CODES / 2 ? 0 : 4);
#if LANES == 16
    const vec every = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    vec table = every * scale;
    if (offset) table = fused(every, all(scale), all(*offset));
    return (vec)_mm512_permutexvar_ps((__m512i)code, (__m512)table); /* looks at four bits */
#else
    const vec number = floats((code & 15) - 8);
    if (offset) return fused(number, all(scale), all(*offset));
    return number * scale;
#endif
}

/* The same of codes, group by group. */
INLINE int64_t grouped(const int F, const int M, const int N, const float *x, int64_t x_stride, const Rows *w,
                       int64_t size, int64_t group, vec total[MOST][BROAD]) {
    const int64_t whole = size / LANES * LANES;
    const int shifted = w->offsets[0] != 0;
    for (int64_t start = 0, g = 0; start < whole; start += group, g++) {
        const int64_t stop = start + group < whole ? start + group : whole;
        for (int64_t block = start; block < stop; block += CODES) {
            if (block % (F == Q8 ? 64 : 128) == 0)
                EVERY(n, N) if (w->ahead[n]) fetch(w->values[n] + bytes_of(F, block) + w->ahead[n], 1);
            EVERY(i, CODES / LANES) {
                const int64_t k = block + i * LANES;
                vec b[BROAD];
                if (k >= stop) break;
                EVERY(n, N) b[n] = unpacked(F, w->values[n], k, w->scales[n][g], shifted ? w->offsets[n] + g : 0);
                MULTIPLY(k, b)
            }
        }
    }
    return whole;
}

/* What goes with the lanes of a unit that lies in groups [first, last] of a row: a number for each group. */
static __attribute__((noinline)) void mix(const float *groups, int64_t u, int64_t group, int64_t last, float *out) {
    for (int i = 0; i < LANES; i++) {
        const int64_t g = (u * UNIT + block_of_lane(FORMAT, i) * CODES) / group;
        out[i] = groups[g < last ? g : last];
    }
}

INLINE vec by_lane(const float *groups, int64_t u, int64_t group, int64_t first, int64_t last) {
    float own[LANES];
    if (UNIT <= CODES || first == last) return all(groups[first]);
    mix(groups, u, group, last, own);
    return load(own);
}

/* The same of integers; returns `size`. */
INLINE int64_t integral(const int F, const int M, const int N, const float *x, int64_t x_stride, const Rows *w,
                        int64_t size, int64_t group, vec total[MOST][BROAD]) {
    for (int64_t u = 0; u * UNIT < size; u++) {
        const int64_t at = bytes_of(F, u * UNIT), rest = bytes_of(F, size) - at;
        const int64_t first = u * UNIT / group, last = ((u + 1) * UNIT < size ? (u + 1) * UNIT - 1 : size - 1) / group;
        packet codes[BROAD];
        vec scales[BROAD];
        EVERY(n, N) {
            char own[UNIT] = {0};
            const int fits = (F == Q4I && UNIT <= CODES) || rest >= bytes_of(F, UNIT); /* in whole blocks */
            if (!fits) memcpy(own, w->values[n] + at, (size_t)rest);
            codes[n] = positive(F, fits ? w->values[n] : own, fits ? u : 0);
            scales[n] = by_lane(w->scales[n], u, group, first, last);
            if (w->ahead[n]) fetch(w->values[n] + at + w->ahead[n], 1);
        }
        EVERY(m, M) {
            const Unit *own = (const Unit *)(x + m * x_stride) + u;
            EVERY(n, N) {
                const vec sum = floats(dot(own->start, codes[n], own->codes));
                total[m][n] = fused(sum, own->scales * scales[n], total[m][n]);
            }
            if (w->offsets[0])
                EVERY(n, N)
                    total[m][n] = fused(own->totals, by_lane(w->offsets[n], u, group, first, last), total[m][n]);
        }
    }
    return size;
}

/* Number i of row n. */
INLINE float weight_at(const int F, const Rows *w, int n, int64_t i, int64_t group) {
    if (!PACKED(F)) return number_at(F, w->values[n], i);
    const uint8_t *pairs = (const uint8_t *)w->values[n] + i / CODES * (CODES / 2);
    const int shift = i % CODES < CODES / 2 ? 0 : 4;
    const int code = F == Q8 ? ((const int8_t *)w->values[n])[i] : (pairs[i % (CODES / 2)] >> shift & 15) - 8;
    const float scale = w->scales[n][i / group];
    return w->offsets[n] ? fused_one((float)code, scale, w->offsets[n][i / group]) : (float)code * scale;
}

/* What follows whole vectors, added to their sum. */
static __attribute__((noinline)) float rest(const int F, float total, const float *x, const Rows *w, int n,
                                            int64_t from, int64_t size, int64_t group) {
    for (int64_t i = from; i < size; i++) total = fused_one(x[i], weight_at(F, w, n, i, group), total);
    return total;
}

/* out[m][n] = x[m] . w[n], each in the same order whatever M and N are. */
INLINE void block(const int F, const int M, const int N, const float *x, int64_t x_stride, const Rows *w, int64_t size,
                  int64_t group, float out[MOST][BROAD]) {
    vec total[MOST][BROAD];
    EVERY(m, M)
        EVERY(n, N) total[m][n] = (vec){0};
    const int64_t k = INTEGER(F)  ? integral(F, M, N, x, x_stride, w, size, group, total)
                      : PACKED(F) ? grouped(F, M, N, x, x_stride, w, size, group, total)
                                  : dense(F, M, N, x, x_stride, w, size, total);
    EVERY(m, M) {
        int n = 0;
        for (; n + 4 <= N; n += 4)
            *(quad *)(out[m] + n) = sums(total[m][n], total[m][n + 1], total[m][n + 2], total[m][n + 3]);
        for (; n < N; n++) out[m][n] = sum(total[m][n]);
        for (n = 0; n < N && k < size; n++) out[m][n] = rest(F, out[m][n], x + m * x_stride, w, n, k, size, group);
    }
}

/* N columns from `n` on for M tokens, meanwhile asking for weights to come: those of the next columns, or, where
 * `parts` pieces of tokens pass over each slice, for this part of the next slice. */
INLINE void column(const int F, const int M, const int N, int64_t part, int64_t parts, const float *x,
                   int64_t x_stride, const Weight *w, const float *bias, int64_t size, int64_t n, float *out,
                   int64_t out_stride) {
    const int64_t stride = bytes_of(F, size), groups = PACKED(F) ? (size + w->group - 1) / w->group : 0;
    Rows rows;
    float p[MOST][BROAD];
    EVERY(i, N) {
        rows.values[i] = (const char *)w->values + (n + i) * stride;
        rows.scales[i] = w->scales + (n + i) * groups;
        rows.offsets[i] = w->offsets ? w->offsets + (n + i) * groups : 0;
        rows.ahead[i] = parts == 1 ? N * stride : (n + i) % parts == part ? SLICE * stride : 0;
    }
    block(F, M, N, x, x_stride, &rows, size, w->group, p);
    EVERY(m, M) {
        float *o = out + m * out_stride + n;
        if (bias)
            EVERY(i, N) p[m][i] += bias[n + i];
        EVERY(i, N) o[i] = p[m][i];
    }
}

INLINE void panel(const int F, const int M, int64_t part, int64_t parts, const float *x, int64_t x_stride,
                  const Weight *w, const float *bias, int64_t size, int64_t from, int64_t to, float *out,
                  int64_t out_stride) {
    const int N = WIDE(M);
    int64_t n = from;
    for (; n + N <= to; n += N) column(F, M, N, part, parts, x, x_stride, w, bias, size, n, out, out_stride);
    for (; n < to; n++) column(F, M, 1, part, parts, x, x_stride, w, bias, size, n, out, out_stride);
}

/* A few rows of codes as the numbers they stand for. */
INLINE void unpack(const int F, const Weight *w, int64_t size, int64_t from, int64_t count, float *out) {
    const int64_t stride = bytes_of(F, size), groups = (size + w->group - 1) / w->group;
    EACH(i, count) {
        const float *scales = w->scales + (from + i) * groups, *offsets = w->offsets;
        const Rows row = {{(const char *)w->values + (from + i) * stride}, {scales},
                          {offsets ? offsets + (from + i) * groups : 0}};
        float *own = out + i * size;
        int64_t k = 0;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t stop = (g + 1) * w->group < size ? (g + 1) * w->group : size;
            for (; k + LANES <= stop; k += LANES)
                store(own + k, unpacked(F, row.values[0], k, scales[g], offsets ? row.offsets[0] + g : 0));
        }
        for (; k < size; k++) own[k] = weight_at(F, &row, 0, k, w->group);
        fetch(row.values[0] + SLICE * stride, stride);
    }
}

/* Few tokens at a time, so that they stay in cache, and under them a slice of w, so that it does. */
#define DEFINED(F) LINEAR(F)
DEFINED(FORMAT) {
    if (PACKED(FORMAT) && !INTEGER(FORMAT) && tokens > MOST) { /* unpacked once for all of them */
        float own[SLICE * size];
        const Weight slice = {own, 0, 0, F32, 0};
        for (int64_t n = from; n < to; n += SLICE) {
            const int64_t count = n + SLICE < to ? SLICE : to - n;
            unpack(FORMAT, w, size, n, count, own);
            linear_F32(x, tokens, x_stride, &slice, bias ? bias + n : 0, size, 0, count, out + n, out_stride);
        }
        return;
    }
    const int64_t near = NEAR / size > MOST ? NEAR / size / MOST * MOST : MOST, step = tokens > MOST ? SLICE : to - from;
    for (int64_t start = 0; start < tokens; start += near) {
        const int64_t some = tokens - start < near ? tokens - start : near, pieces = (some + MOST - 1) / MOST;
        for (int64_t n = from; n < to; n += step) {
            const int64_t end = n + step < to ? n + step : to;
            EACH(i, pieces) {
                const int64_t first = start + some * i / pieces, count = start + some * (i + 1) / pieces - first;
                const float *a = x + first * x_stride;
                float *o = out + first * out_stride;
                switch (count) {
#define CASE(M) case M: panel(FORMAT, M, i, pieces, a, x_stride, w, bias, size, n, end, o, out_stride); break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
                }
            }
        }
    }
}
