/* Keys and values in 8 bits (kv/quantised.py): the codes of one token and head, then a scale in bfloat16 for each GROUP of
 * them. */
#pragma once
#include "model.h"

#define GROUP 32
#define WIDEST 256 /* numbers of a head, at most */

/* Rounds the numbers of one token and head. */
static void quantise(const float *x, int64_t size, int8_t *out) {
    for (int64_t start = 0; start < size; start += GROUP) {
        const int64_t stop = start + GROUP < size ? start + GROUP : size;
        float most = 0, sick = 0; /* not 0 where there is NaN or infinity: then the scale is NaN, and all that is read */
        for (int64_t i = start; i < stop; i++) {
            most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
            sick += x[i] - x[i];
        }
        most = most / 127.f + sick;
        uint16_t scale;
        put(BF16, &most, 1, &scale);
        memcpy(out + size + start / GROUP * 2, &scale, 2);
        const float factor = number_at(BF16, &scale, 0);
        for (int64_t i = start; i < stop; i++) {
            const float code = factor > 0 ? rintf(x[i] / factor) : 0;
            out[i] = (int8_t)(code > 127 ? 127 : code > -127 ? code : -127);
        }
    }
}

/* Numbers [from, to) of them as they are read, in the model's dtype. */
static void read_codes(const int8_t *codes, int64_t size, int64_t from, int64_t to, number *out) {
    for (int64_t i = from, stop; i < to; i = stop) {
        stop = (i / GROUP + 1) * GROUP < to ? (i / GROUP + 1) * GROUP : to;
        uint16_t bits;
        memcpy(&bits, codes + size + i / GROUP * 2, 2);
        const float scale = number_at(BF16, &bits, 0);
        int64_t k = i;
        for (; k + LANES <= stop; k += LANES) keep(NUMBER, floats(of_codes(codes + k)) * scale, out, k);
        for (; k < stop; k++) {
            const float x = (float)codes[k] * scale;
            put(NUMBER, &x, 1, out + k);
        }
    }
}
