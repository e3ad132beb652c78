/* Products of a few rows with a matrix of weights. */
#pragma once
#include "tokens.h"

/* Columns [from, to) of out = x @ w.T (+ bias), in float32. Each element is summed in the same order, whatever else is
 * computed. x: [tokens, size], or as `prepare` leaves them where the format `reads` that. One function per format of
 * weights, compiled from products.c. */
#define LINEAR(F) \
    __attribute__((visibility("hidden"))) \
    void linear_##F(const float *x, int64_t tokens, int64_t x_stride, const Weight *w, const float *bias, \
                    int64_t size, int64_t from, int64_t to, float *out, int64_t out_stride)
LINEAR(F32);
LINEAR(BF16);
LINEAR(F16);
LINEAR(Q8);
LINEAR(Q4);
LINEAR(Q8I);
LINEAR(Q4I);

/* Rows of [tokens, size] on their way through products. room: `prepared_size(size)` floats a token; made: for which
 * format they lie there. */
typedef struct {
    const float *x;
    int64_t tokens, size;
    float *room;
    int64_t made;
} Tokens;

/* `linear` of tokens [first, first + count) by whatever takes this weight; nothing where there is none. */
INLINE void multiply(Tokens *given, int64_t first, int64_t count, const Weight *w, const float *bias, int64_t from,
                     int64_t to, float *out, int64_t out_stride) {
    if (!w->values || from >= to) return;
    const int64_t size = given->size, format = reads((int)w->format);
    const int64_t stride = format == F32 ? size : prepared_size(size);
    if (format != F32 && given->made != format) {
        prepare((int)format, given->x, given->tokens, size, given->room);
        given->made = format;
    }
    const float *x = (format == F32 ? given->x : given->room) + first * stride;
    switch (w->format) {
#define CASE(F) case F: linear_##F(x, count, stride, w, bias, size, from, to, out, out_stride); break;
        CASE(F32) CASE(BF16) CASE(F16) CASE(Q8) CASE(Q4) CASE(Q8I) CASE(Q4I)
#undef CASE
    }
}
