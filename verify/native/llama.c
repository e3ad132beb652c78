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
#define WIDE(M) ((M) <= 2 ? 8 : 4)
#elif defined(__AVX__)
#define LANES 8
#define WIDE(M) ((M) <= 1 ? 8 : (M) <= 3 ? 4 : 2)
#else
#define LANES 4
#define WIDE(M) ((M) <= 1 ? 8 : (M) <= 4 ? 4 : 2)
#endif

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t iquad __attribute__((vector_size(16), aligned(4), may_alias));
#define INLINE static inline __attribute__((always_inline))
#define EACH(i, n) for (int64_t i = 0; i < (n); i++)
#define CHUNK 32

enum { Q, K, V, O, GATE, UP, DOWN, Q_BIAS, K_BIAS, V_BIAS, O_BIAS, GATE_BIAS, UP_BIAS, DOWN_BIAS,
       NORM_BEFORE, NORM_AFTER, Q_NORM, K_NORM, NUM_WEIGHTS };

/* weights: NUM_WEIGHTS pointers per layer, 0 where a layer has none. */
typedef struct {
    int64_t layers, hidden, heads, kv_heads, head_dim, inner, vocab, embedded;
    const float *const *weights;
    const float *embed, *norm, *head, *head_bias;
    double epsilon, scaling;
} Model;

/* One row of the pass: `width` tokens from token `first` on, over `read` slots that its block table finds.
 * start: slot of its first token, where `targets` does not say.
 * mask: additive [width, read] with `mask_stride`, or 0: token j sees slots 0 .. read - width + j.
 * lists: where its lists of visible slots begin. */
typedef struct {
    int64_t first, width, read, start, lists, mask_stride;
    const int64_t *table;
    const float *mask;
} Row;

/* Slot s of a row lies at table[s / page_size] * page_stride + s % page_size * slot_stride, plus head * head_stride.
 * targets: where each token's own K/V goes (same unit, less the head), -1 for nowhere; 0: by its row's table.
 * kept: tokens whose logits are wanted. places: row of `angles` (cosines, signed sines) of each token.
 * The rest is working memory. */
typedef struct {
    int64_t threads, tokens, rows, num_kept, page_size, page_stride, slot_stride, head_stride;
    const int64_t *ids, *places, *targets, *kept;
    const float *angles;
    const Row *row;
    float *const *keys, *const *values;
    float *logits;
    float *hidden, *mixed, *attended, *acted, *own;
    int64_t own_size;
    int64_t *seen, *counts, *row_of;
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

/* Columns [from, to) of out = x @ w.T (+ bias); a slice of w stays in cache while all tokens pass over it. */
static void linear(const float *x, int64_t tokens, int64_t x_stride, const float *w, const float *bias, int64_t size,
                   int64_t from, int64_t to, float *out, int64_t out_stride, int mode) {
    if (!w || from >= to) return;
    int64_t pieces = (tokens + MOST - 1) / MOST, step = pieces > 1 ? 8 : to - from;
    for (int64_t n = from; n < to; n += step) {
        int64_t end = n + step < to ? n + step : to;
        EACH(i, pieces) {
            int64_t first = tokens * i / pieces, count = tokens * (i + 1) / pieces - first;
            const float *a = x + first * x_stride;
            float *o = out + first * out_stride;
            switch (count) {
#define CASE(M) case M: panel(M, a, x_stride, w, bias, size, n, end, o, out_stride, mode); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
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

/* Which slots token `token` sees, as places in the cache; in the order of the slots. */
static void look(const Pass *p, int64_t token) {
    const Row *row = p->row + p->row_of[token];
    int64_t j = token - row->first, count = 0, stop = row->mask ? row->read : row->read - row->width + j + 1;
    int64_t *seen = p->seen + row->lists + j * row->read;
    const float *mask = row->mask ? row->mask + j * row->mask_stride : 0;
    for (int64_t page = 0, s = 0; s < stop; page++) {
        int64_t place = row->table[page] * p->page_stride, end = s + p->page_size < stop ? s + p->page_size : stop;
        if (mask)
            for (; s < end; s++, place += p->slot_stride) {
                seen[count] = place;
                count += mask[s] > -1e30f;
            }
        else
            for (; s < end; s++, place += p->slot_stride) seen[count++] = place;
    }
    p->counts[token] = count;
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
    if (head < heads + kv) {
        const float *weight = head < heads ? w[Q_NORM] : w[K_NORM];
        if (weight) norm(x, weight, size, (float)m->epsilon, x);
        rotate(x, p->angles + p->places[token] * 2 * size, size);
        if (head < heads) return;
    }
    const Row *row = p->row + p->row_of[token];
    int64_t target = p->targets ? p->targets[token] : address(p, row, row->start + token - row->first);
    if (target < 0) return;
    float *cache = head < heads + kv ? p->keys[layer] : p->values[layer];
    memcpy(cache + target + (head - heads) % kv * p->head_stride, x, (size_t)size * 4);
}

INLINE void weigh(const int N, const float *weights, const float *values, const int64_t *seen, int64_t count, float *out,
                  float scale) {
    vec total[4];
    for (int n = 0; n < N; n++) total[n] = (vec){0};
    EACH(i, count) {
        const float *v = values + seen[i];
        for (int n = 0; n < N; n++) total[n] += weights[i] * load(v + n * LANES);
    }
    for (int n = 0; n < N; n++) store(out + n * LANES, total[n] * scale);
}

/* One token, one head. scores: working memory. */
static void attend(const Model *m, const Pass *p, int64_t layer, int64_t token, int64_t head, float *scores) {
    int64_t size = m->head_dim, count = p->counts[token], shift = head / (m->heads / m->kv_heads) * p->head_stride;
    const Row *row = p->row + p->row_of[token];
    const int64_t *seen = p->seen + row->lists + (token - row->first) * row->read;
    const float *query = p->mixed + token * (m->heads + 2 * m->kv_heads) * size + head * size;
    const float *keys = p->keys[layer] + shift, *values = p->values[layer] + shift;
    float *out = p->attended + (token * m->heads + head) * size, scaling = (float)m->scaling, most = -INFINITY;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const float *rows[4] = {keys + seen[i], keys + seen[i + 1], keys + seen[i + 2], keys + seen[i + 3]};
        float dots[MOST][BROAD];
        block(1, 4, query, 0, rows, size, 0, dots);
        for (int j = 0; j < 4; j++) scores[i + j] = dots[0][j] * scaling;
    }
    for (; i < count; i++) {
        const float *one = keys + seen[i];
        float dot[MOST][BROAD];
        block(1, 1, query, 0, &one, size, 0, dot);
        scores[i] = dot[0][0] * scaling;
    }
    EACH(j, count) most = scores[j] > most ? scores[j] : most;
    for (i = count; i % LANES; i++) scores[i] = -INFINITY;
    vec total = {0};
    for (i = 0; i < count; i += LANES) {
        vec e = exponential(load(scores + i) - most);
        store(scores + i, e);
        total += e;
    }
    float scale = count ? 1.f / sum(total) : 0.f;
    int64_t d = 0;
    for (; d + 4 * LANES <= size; d += 4 * LANES) weigh(4, scores, values + d, seen, count, out + d, scale);
    for (; d + LANES <= size; d += LANES) weigh(1, scores, values + d, seen, count, out + d, scale);
    for (; d < size; d++) {
        float one = 0;
        EACH(j, count) one += scores[j] * values[seen[j] + d];
        out[d] = one * scale;
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

static void run(const Model *m, const Pass *p, int64_t thread, int64_t threads, Gate *gate) {
    const int64_t hidden = m->hidden, size = m->head_dim, heads = m->heads, kv = m->kv_heads, inner = m->inner;
    const int64_t tokens = p->tokens, wide = (heads + 2 * kv) * size;
    float *normed = p->own + thread * p->own_size, *scores = normed + tokens * hidden, *up = scores;
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
        EACH(t, tokens) norm(p->hidden + t * hidden, w[NORM_BEFORE], hidden, (float)m->epsilon, normed + t * hidden);
        SHARE(from, to, wide, chunk(wide, threads)) {
            EACH(part, 3) {
                int64_t start = (part == 0 ? 0 : heads + (part - 1) * kv) * size, a, b;
                overlap(from, to, start, (part == 0 ? heads : kv) * size, &a, &b);
                linear(normed, tokens, hidden, w[Q + part], w[Q_BIAS + part], hidden, a, b, p->mixed + start, wide, SET);
            }
        }
        NEXT;
        SHARE(from, to, tokens * (heads + 2 * kv), 4) {
            for (int64_t i = from; i < to; i++) place(m, p, layer, i / (heads + 2 * kv), i % (heads + 2 * kv));
        }
        NEXT;
        SHARE(from, to, heads * tokens, heads * tokens / (4 * threads) + 1) {
            for (int64_t i = from; i < to; i++) attend(m, p, layer, i % tokens, i / tokens, scores);
        }
        NEXT;
        SHARE(from, to, hidden, chunk(hidden, threads))
            linear(p->attended, tokens, heads * size, w[O], w[O_BIAS], heads * size, from, to, p->hidden, hidden, ADD);
        NEXT;
        EACH(t, tokens) norm(p->hidden + t * hidden, w[NORM_AFTER], hidden, (float)m->epsilon, normed + t * hidden);
        SHARE(from, to, inner, CHUNK) {
            linear(normed, tokens, hidden, w[GATE], w[GATE_BIAS], hidden, from, to, p->acted, inner, SET);
            int64_t count = to - from;
            linear(normed, tokens, hidden, w[UP], w[UP_BIAS], hidden, from, to, up - from, CHUNK, SET);
            EACH(t, tokens) act(p->acted + t * inner + from, up + t * CHUNK, count);
        }
        NEXT;
        SHARE(from, to, hidden, chunk(hidden, threads))
            linear(p->acted, tokens, inner, w[DOWN], w[DOWN_BIAS], inner, from, to, p->hidden, hidden, ADD);
        NEXT;
    }
    EACH(i, p->num_kept)
        norm(p->hidden + p->kept[i] * hidden, m->norm, hidden, (float)m->epsilon, normed + i * hidden);
    SHARE(from, to, m->vocab, chunk(m->vocab, threads))
        linear(normed, p->num_kept, hidden, m->head, m->head_bias, hidden, from, to, p->logits, m->vocab, SET);
}

/* Runs the pass. tickets: 6 per layer and 2 more. Returns 0, or 1 + the index of a token that has no embedding (then
 * nothing was done). */
int64_t specdec_llama_pass(const Model *m, const Pass *p) {
    Gate gate = {0, 0};
    EACH(i, p->tokens) if (p->ids[i] < 0 || p->ids[i] >= m->embedded) return i + 1;
    EACH(i, 6 * m->layers + 2) atomic_store_explicit(&p->tickets[i], 0, memory_order_relaxed);
    EACH(r, p->rows) EACH(j, p->row[r].width) p->row_of[p->row[r].first + j] = r;
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
