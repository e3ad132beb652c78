/* A Llama-shaped model's whole forward pass over a handful of tokens, float32, on a CPU.
 *
 * One call runs every layer: an eager pass of a small model is mostly the price of some two hundred operator calls, and
 * its products of a few rows read the weights through kernels cut for many. Here every weight is read once for all
 * tokens, by however many threads, and nothing else is called.
 *
 * What an output element is summed in which order depends on the element alone: not on the number of tokens in the
 * pass, not on their place in it, not on threads or on the layout of the cache. So a token's logits are the same bits
 * whatever is drafted around it, given the same keys and values before it.
 *
 * Compiled on the user's machine at first use (build.py), with its own vector width; only GNU C vectors are used. */
#include <math.h>
#if defined(_OPENMP)
#include <omp.h>
#endif
#include <sched.h>
#include <stdatomic.h>
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
#define CHUNK 32        /* columns handed out at once, at least */
#define NEAR (1 << 17)  /* floats of a level 2 cache that tokens may fill while weights pass by */

enum { Q, K, V, O, GATE, UP, DOWN, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, GATE_BIAS, UP_BIAS, DOWN_BIAS,
       NORM_BEFORE, NORM_AFTER, Q_NORM, K_NORM, NUM_WEIGHTS };

/* weights: NUM_WEIGHTS pointers per layer, 0 where a layer has none. */
typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocab, embedded;
    const float *const *weights;
    const float *embed, *norm, *head, *head_bias;
    double epsilon, scaling;
} Model;

/* One row of the pass: `width` tokens from token `first` on; the first of them belongs to slot `start`.
 * mask: additive [width, read] with `mask_stride`, which says what each token sees; 0: token j sees slots 0 .. start + j.
 * table: the row's pages. lists: where its lists of visible slots begin. */
typedef struct {
    int64_t first, width, read, start, lists, mask_stride;
    const int64_t *table;
    const float *mask;
} Row;

/* Slot s of a row lies at table[s / page_size] * page_stride + s % page_size * slot_stride, plus head * head_stride.
 * targets: where each token's own K/V goes (same unit, less the head), -1 for nowhere; 0: to its slot.
 * kept: tokens whose logits are wanted, ascending.
 * places: row of `angles` (cosines, signed sines) of each token; 0: the number of its slot.
 * The rest is working memory. */
typedef struct {
    int64_t threads, tokens, rows, num_kept, page_size, page_stride, slot_stride, head_stride;
    const int64_t *ids, *places, *targets, *kept;
    const float *angles;
    const Row *row;
    float *const *keys, *const *values;
    float *logits;
    float *hidden, *normed, *mixed, *attended, *acted, *own;
    int64_t own_size, num_groups;
    int64_t *seen, *counts, *row_of, *groups;
    _Atomic int64_t *tickets;
} Pass;

/* ---- vectors ---- */

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

INLINE quad sums(vec a, vec b, vec c, vec d) {
    quad q = fold(a), r = fold(b), s = fold(c), t = fold(d);
    quad ab = __builtin_shuffle(q, r, (iquad){0, 4, 1, 5}) + __builtin_shuffle(q, r, (iquad){2, 6, 3, 7});
    quad cd = __builtin_shuffle(s, t, (iquad){0, 4, 1, 5}) + __builtin_shuffle(s, t, (iquad){2, 6, 3, 7});
    return __builtin_shuffle(ab, cd, (iquad){0, 1, 4, 5}) + __builtin_shuffle(ab, cd, (iquad){2, 3, 6, 7});
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

/* ---- products ---- */

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

/* N columns from `n` on for M tokens. */
INLINE void column(const int M, const int N, const float *x, int64_t x_stride, const float *w, const float *bias,
                   int64_t size, int64_t n, float *out, int64_t out_stride, int mode) {
    const float *rows[BROAD];
    float p[MOST][BROAD];
    for (int i = 0; i < N; i++) rows[i] = w + (n + i) * size;
    block(M, N, x, x_stride, rows, size, N * size, p);
    for (int m = 0; m < M; m++) {
        float *o = out + m * out_stride + n;
        if (bias)
            for (int i = 0; i < N; i++) p[m][i] += bias[n + i];
        if (mode == ADD)
            for (int i = 0; i < N; i++) p[m][i] += o[i];
        for (int i = 0; i < N; i++) o[i] = p[m][i];
    }
}

INLINE void panel(const int M, const float *x, int64_t x_stride, const float *w, const float *bias, int64_t size,
                  int64_t from, int64_t to, float *out, int64_t out_stride, int mode) {
    const int N = WIDE(M);
    int64_t n = from;
    for (; n + N <= to; n += N) column(M, N, x, x_stride, w, bias, size, n, out, out_stride, mode);
    for (; n < to; n++) column(M, 1, x, x_stride, w, bias, size, n, out, out_stride, mode);
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
                switch (count) {
#define CASE(M) case M: panel(M, a, x_stride, w, bias, size, n, end, o, out_stride, mode); break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
                }
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

/* ---- threads ---- */

typedef struct {
    _Atomic int64_t arrived, round;
} Gate;

INLINE void pause(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Waits for everybody: briefly by spinning, then by giving the core away. */
static void meet(Gate *gate, int64_t threads) {
    if (threads == 1) return;
    int64_t round = atomic_load(&gate->round);
    if (atomic_fetch_add(&gate->arrived, 1) == threads - 1) {
        atomic_store(&gate->arrived, 0);
        atomic_fetch_add(&gate->round, 1);
        return;
    }
    for (int64_t spins = 0; atomic_load_explicit(&gate->round, memory_order_acquire) == round; spins++)
        if (spins < 4096) pause(); else sched_yield();
}

/* Hands out [0, total) in chunks to whoever is free: cores of shared machines are not equally fast. */
#define SHARE(from, to, total, size) \
    for (int64_t from, to; \
         (from = atomic_fetch_add_explicit(ticket, (size), memory_order_relaxed)) < (total) && \
         (to = from + (size) < (total) ? from + (size) : (total), 1);)

#define NEXT do { meet(gate, threads); ticket++; } while (0)

INLINE int64_t chunk(int64_t total, int64_t threads) {
    int64_t size = total / (4 * threads);
    return threads == 1 ? total + 1 : size < CHUNK ? CHUNK : size / 8 * 8;
}

/* Part of [from, to) that lies in [start, start + size), relative to start. */
INLINE void overlap(int64_t from, int64_t to, int64_t start, int64_t size, int64_t *a, int64_t *b) {
    *a = from > start ? from - start : 0;
    *b = (to < start + size ? to : start + size) - start;
}

/* ---- parts of a layer ---- */

INLINE int64_t address(const Pass *p, const Row *row, int64_t slot) {
    return row->table[slot / p->page_size] * p->page_stride + slot % p->page_size * p->slot_stride;
}

INLINE int64_t *seen_by(const Pass *p, const Row *row, int64_t token) {
    return p->seen + row->lists + (row->mask ? (token - row->first) * row->read : 0);
}

/* Which slots a token sees, as places in the cache, in the order of the slots. Tokens of a text share one list. */
static void look(const Pass *p, int64_t token) {
    const Row *row = p->row + p->row_of[token];
    const int64_t j = token - row->first, stop = row->mask ? row->read : row->start + row->width;
    int64_t *seen = seen_by(p, row, token), count = 0;
    if (row->mask || j == 0) {
        const float *mask = row->mask + j * row->mask_stride;
        for (int64_t page = 0, s = 0; s < stop; page++) {
            int64_t place = row->table[page] * p->page_stride, end = s + p->page_size < stop ? s + p->page_size : stop;
            for (; s < end; s++, place += p->slot_stride) {
                seen[count] = place;
                count += !row->mask || mask[s] > -1e30f;
            }
        }
    }
    p->counts[token] = row->mask ? count : row->start + j + 1;
}

/* Do `count` tokens from `token` on see nothing but leading slots, one more each? Then each list begins with those before. */
static int nested(const Pass *p, int64_t token, int64_t count) {
    const Row *row = p->row + p->row_of[token];
    if (!row->mask) return 1;
    EACH(i, count) {
        const int64_t seen = p->counts[token + i];
        const float *mask = row->mask + (token + i - row->first) * row->mask_stride;
        if (seen != p->counts[token] + i) return 0;
        EACH(s, seen) if (!(mask[s] > -1e30f)) return 0;
    }
    return 1;
}

static void rotate(float *x, const float *angles, int64_t size) {
    int64_t half = size / 2;
    const float *sines = angles + size;
    EACH(i, half) {
        float a = x[i], b = x[i + half];
        x[i] = a * angles[i] + b * sines[i];
        x[i + half] = b * angles[i + half] + a * sines[i + half];
    }
}

/* Normalises and rotates head `head` (queries, then keys, then values) of a token; keys and values go to the cache. */
static void place(const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t head) {
    int64_t size = m->head_dim, heads = m->heads, kv = m->kv_heads;
    const float *const *w = m->weights + layer * NUM_WEIGHTS;
    float *x = p->mixed + token * (heads + 2 * kv) * size + head * size;
    const Row *row = p->row + p->row_of[token];
    const int64_t slot = row->start + token - row->first;
    if (head < heads + kv) {
        const float *weight = head < heads ? w[Q_NORM] : w[K_NORM];
        if (weight) norm(x, weight, size, (float)m->epsilon, x);
        rotate(x, p->angles + (p->places ? p->places[token] : slot) * 2 * size, size);
        if (head < heads) return;
    }
    const int64_t target = p->targets ? p->targets[token] : address(p, row, slot);
    if (target < 0) return;
    float *cache = head < heads + kv ? p->keys[layer] : p->values[layer];
    memcpy(cache + target + (head - heads) % kv * p->head_stride, x, (size_t)size * 4);
}

/* out[g] = sum over slots of weights[g] * values, N vectors wide: together over the slots all tokens see, then each. */
INLINE void weigh(const int G, const int N, const float *weights, int64_t w_stride, const float *values,
                  const int64_t *seen, const int64_t *counts, float *out, int64_t out_stride, const float *scales) {
    vec total[MOST][4];
    for (int g = 0; g < G; g++)
        for (int n = 0; n < N; n++) total[g][n] = (vec){0};
    EACH(i, counts[0]) {
        const float *v = values + seen[i];
        for (int g = 0; g < G; g++)
            for (int n = 0; n < N; n++) total[g][n] += weights[g * w_stride + i] * load(v + n * LANES);
    }
    for (int g = 0; g < G; g++) {
        for (int64_t i = counts[0]; i < counts[g]; i++)
            for (int n = 0; n < N; n++) total[g][n] += weights[g * w_stride + i] * load(values + seen[i] + n * LANES);
        for (int n = 0; n < N; n++) store(out + g * out_stride + n * LANES, total[g][n] * scales[g]);
    }
}

/* Head `head` of G tokens whose lists are nested (or of one). out: the first token's. scores: working memory. */
INLINE void attend(const int G, const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t head, float *out,
                   float *scores) {
    const int64_t size = m->head_dim, shift = head / (m->heads / m->kv_heads) * p->head_stride;
    const int64_t q_stride = (m->heads + 2 * m->kv_heads) * size, out_stride = m->heads * size;
    const int64_t *seen = seen_by(p, p->row + p->row_of[token], token + G - 1), *counts = p->counts + token;
    const int64_t count = counts[G - 1], stride = count + LANES;
    const float *query = p->mixed + token * q_stride + head * size;
    const float *keys = p->keys[layer] + shift, *values = p->values[layer] + shift;
    float dots[MOST][BROAD], scales[MOST];
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *rows[4] = {keys + seen[i], keys + seen[i + 1], keys + seen[i + 2], keys + seen[i + 3]};
        block(G, 4, query, q_stride, rows, size, 0, dots);
        for (int g = 0; g < G; g++)
            for (int j = 0; j < 4; j++) scores[g * stride + i + j] = dots[g][j] * (float)m->scaling;
    }
    for (; i < count; i++) {
        const float *one = keys + seen[i];
        block(G, 1, query, q_stride, &one, size, 0, dots);
        for (int g = 0; g < G; g++) scores[g * stride + i] = dots[g][0] * (float)m->scaling;
    }
    for (int g = 0; g < G; g++) {
        float *own = scores + g * stride, most = -INFINITY;
        EACH(j, counts[g]) most = own[j] > most ? own[j] : most;
        for (i = counts[g]; i % LANES; i++) own[i] = -INFINITY;
        vec total = {0};
        for (i = 0; i < counts[g]; i += LANES) {
            vec e = exponential(load(own + i) - most);
            store(own + i, e);
            total += e;
        }
        scales[g] = counts[g] ? 1.f / sum(total) : 0.f;
    }
    int64_t d = 0;
    for (; d + SPAN * LANES <= size; d += SPAN * LANES)
        weigh(G, SPAN, scores, stride, values + d, seen, counts, out + d, out_stride, scales);
    for (; d + LANES <= size; d += LANES)
        weigh(G, 1, scores, stride, values + d, seen, counts, out + d, out_stride, scales);
    for (; d < size; d++)
        for (int g = 0; g < G; g++) {
            float one = 0;
            EACH(j, counts[g]) one += scores[g * stride + j] * values[seen[j] + d];
            out[g * out_stride + d] = one * scales[g];
        }
}

static void attend_some(const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t count, int64_t head,
                        float *scores) {
    float *out = p->attended + (token * m->heads + head) * m->head_dim;
    if (!nested(p, token, count)) {
        EACH(i, count) attend(1, m, p, layer, token + i, head, out + i * m->heads * m->head_dim, scores);
        return;
    }
    switch (count) {
#define CASE(G) case G: attend(G, m, p, layer, token, head, out, scores); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
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

/* ---- the pass ---- */

INLINE void norm_all(const Model *m, const Pass *p, const float *weight, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
        norm(p->hidden + t * m->hidden, weight, m->hidden, (float)m->epsilon, p->normed + t * m->hidden);
}

/* Tokens [*first, *stop): all of them, or the next neighbours of which something is kept, from *first on. */
INLINE int next_run(const Pass *p, int kept_only, int64_t *first, int64_t *stop) {
    if (!kept_only) {
        *stop = p->tokens;
        return *first < *stop;
    }
    int64_t i = 0;
    while (i < p->num_kept && p->kept[i] < *first) i++;
    if (i == p->num_kept) return 0;
    *first = p->kept[i];
    for (*stop = *first + 1; ++i < p->num_kept && p->kept[i] == *stop;) ++*stop;
    return 1;
}

static void run(const Model *m, const Pass *p, int64_t thread, int64_t threads, Gate *gate) {
    const int64_t hidden = m->hidden, size = m->head_dim, heads = m->heads, kv = m->kv_heads, inner = m->inner;
    const int64_t wide = (heads + 2 * kv) * size;
    const int few = p->num_kept < p->tokens;
    int64_t tokens = p->tokens;
    float *own = p->own + thread * p->own_size;
    _Atomic int64_t *ticket = p->tickets;

    SHARE(from, to, tokens, 4) {
        for (int64_t t = from; t < to; t++) {
            memcpy(p->hidden + t * hidden, m->embed + p->ids[t] * hidden, (size_t)hidden * 4);
            look(p, t);
        }
    }
    NEXT;
    EACH(layer, m->layers) {
        const float *const *w = m->weights + layer * NUM_WEIGHTS;
        const int last = few && layer == m->layers - 1; /* of most tokens only the keys and values matter there */
        SHARE(from, to, tokens, 4) norm_all(m, p, w[NORM_BEFORE], from, to);
        NEXT;
        SHARE(from, to, wide, chunk(wide, threads)) {
            EACH(part, 3) {
                int64_t start = (part == 0 ? 0 : heads + (part - 1) * kv) * size, a, b;
                overlap(from, to, start, (part == 0 ? heads : kv) * size, &a, &b);
                for (int64_t first = 0, stop; next_run(p, last && part == 0, &first, &stop); first = stop)
                    linear(p->normed + first * hidden, stop - first, hidden, w[Q + part], w[Q_BIAS + part], hidden, a, b,
                           p->mixed + first * wide + start, wide, SET);
            }
        }
        NEXT;
        SHARE(from, to, tokens * (heads + 2 * kv), 4) {
            for (int64_t i = from; i < to; i++) place(m, p, layer, i / (heads + 2 * kv), i % (heads + 2 * kv));
        }
        NEXT;
        if (last) {
            SHARE(from, to, heads * p->num_kept, 1) {
                for (int64_t j = from; j < to; j++)
                    attend(1, m, p, layer, p->kept[j / heads], j % heads, p->attended + j * size, own);
            }
            if (thread == 0)
                EACH(i, p->num_kept)
                    memmove(p->hidden + i * hidden, p->hidden + p->kept[i] * hidden, (size_t)hidden * 4);
            tokens = p->num_kept;
        } else {
            SHARE(from, to, heads * p->num_groups, heads * p->num_groups / (8 * threads) + 1) {
                for (int64_t i = from; i < to; i++) {
                    const int64_t *group = p->groups + i % p->num_groups * 2;
                    attend_some(m, p, layer, group[0], group[1], i / p->num_groups, own);
                }
            }
        }
        NEXT;
        SHARE(from, to, hidden, chunk(hidden, threads))
            linear(p->attended, tokens, heads * size, w[O], w[O_BIAS], heads * size, from, to, p->hidden, hidden, ADD);
        NEXT;
        SHARE(from, to, tokens, 4) norm_all(m, p, w[NORM_AFTER], from, to);
        NEXT;
        SHARE(from, to, inner, CHUNK) {
            linear(p->normed, tokens, hidden, w[GATE], w[GATE_BIAS], hidden, from, to, p->acted, inner, SET);
            linear(p->normed, tokens, hidden, w[UP], w[UP_BIAS], hidden, from, to, own - from, CHUNK, SET);
            EACH(t, tokens) act(p->acted + t * inner + from, own + t * CHUNK, to - from);
        }
        NEXT;
        SHARE(from, to, hidden, chunk(hidden, threads))
            linear(p->acted, tokens, inner, w[DOWN], w[DOWN_BIAS], inner, from, to, p->hidden, hidden, ADD);
        NEXT;
    }
    SHARE(from, to, tokens, 4) norm_all(m, p, m->norm, from, to);
    NEXT;
    SHARE(from, to, m->vocab, chunk(m->vocab, threads))
        linear(p->normed, tokens, hidden, m->head, m->head_bias, hidden, from, to, p->logits, m->vocab, SET);
}

/* Which row each token belongs to, and neighbours that attend together. */
static void arrange(Pass *p) {
    p->num_groups = 0;
    EACH(r, p->rows) {
        const Row *row = p->row + r;
        EACH(j, row->width) p->row_of[row->first + j] = r;
        const int64_t pieces = (row->width + MOST - 1) / MOST;
        EACH(i, pieces) {
            int64_t *group = p->groups + 2 * p->num_groups++, begin = row->width * i / pieces;
            group[0] = row->first + begin;
            group[1] = row->width * (i + 1) / pieces - begin;
        }
    }
}

/* Runs the pass. tickets: 8 per layer and 3 more. Returns 0, or 1 + the index of a token that has no embedding (then
 * nothing was done). */
int64_t specdec_llama_pass(const Model *m, Pass *p) {
    Gate gate = {0, 0};
    EACH(i, p->tokens) if (p->ids[i] < 0 || p->ids[i] >= m->embedded) return i + 1;
    EACH(i, 8 * m->layers + 3) atomic_store_explicit(&p->tickets[i], 0, memory_order_relaxed);
    arrange(p);
#if defined(_OPENMP)
    if (p->threads > 1) {
#pragma omp parallel num_threads((int)p->threads)
        run(m, p, omp_get_thread_num(), omp_get_num_threads(), &gate); /* there may be fewer than asked for */
        return 0;
    }
#endif
    run(m, p, 0, 1, &gate);
    return 0;
}
