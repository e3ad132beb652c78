/* The whole forward pass of a model of Llama's kind on a CPU: sums in float32, whatever the weights are kept in.
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
#if defined(_OPENMP)
#include <omp.h>
#endif
#include "blocks.h"
#include "products.h"
#include "threads.h"

INLINE void norm_all(const Model *m, const Pass *p, const float *weight, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
        norm(p->hidden + t * m->hidden, weight, m->hidden, (float)m->epsilon, m->exact_norm, p->normed + t * m->hidden);
}

INLINE void feature(const Model *m, const Pass *p, int64_t layer, const float *states, int64_t from, int64_t to) {
    if (p->features[layer])
        memcpy(p->features[layer] + from * m->hidden, states + from * m->hidden, (size_t)((to - from) * m->hidden) * 4);
}

/* Columns [from, to) of the hidden states += x @ w.T, by way of `normed`, which nobody reads then. What is to be
 * normalised before it is added (`add_normed`) stays there. */
INLINE void add_product(const Model *m, const Pass *p, Tokens *x, const Weight *w, const float *bias,
                        const float *normalised, int64_t from, int64_t to) {
    multiply(x, 0, x->tokens, w, bias, from, to, p->normed, m->hidden);
    EACH(t, x->tokens) {
        float *product = p->normed + t * m->hidden + from;
        if (m->added_scale != 1) rescale(product, (float)m->added_scale, to - from);
        if (!normalised) add(p->hidden + t * m->hidden + from, product, to - from);
    }
}

INLINE void add_normed(const Model *m, const Pass *p, const float *weight, int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
        float *product = p->normed + t * m->hidden;
        round_all(NUMBER, product, m->hidden);
        norm(product, weight, m->hidden, (float)m->epsilon, m->exact_norm, product);
        add(p->hidden + t * m->hidden, product, m->hidden);
    }
}

/* Logits as the model gives them, before the last rounding. */
INLINE void finish(const Model *m, float *logits, int64_t count) {
    const float cap = (float)m->logit_cap, divisor = (float)m->divisor;
    if (cap == 0 && divisor == 1) return;
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = count - i < LANES ? count - i : LANES;
        float own[LANES] = {0};
        memcpy(own, logits + i, (size_t)some * 4);
        vec x = nearest(load(own));
        if (divisor != 1) x = nearest(x / divisor);
        if (cap > 0) x = capped(x, cap);
        store(own, x);
        memcpy(logits + i, own, (size_t)some * 4);
    }
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
    const int few = p->num_kept < p->tokens && !p->features[m->layers];
    const int64_t blocks = kv * p->num_groups;
    const Split split = split_of(m, p, threads);
    int64_t tokens = p->tokens;
    float *own = p->own + thread * p->own_size, *room = p->room + thread * p->room_size;
    _Atomic int64_t *ticket = p->tickets;

    SHARE(from, to, tokens, 4) {
        for (int64_t t = from; t < to; t++) {
            widen(NUMBER, m->embed + p->ids[t] * hidden, hidden, p->hidden + t * hidden);
            if (m->embed_scale != 1) rescale(p->hidden + t * hidden, (float)m->embed_scale, hidden);
            look(p, t);
        }
    }
    NEXT;
    EACH(layer, m->layers) {
        const Weight *w = m->weights + layer * NUM_WEIGHTS;
        const float *const *v = m->vectors + layer * NUM_VECTORS;
        const int last = few && layer == m->layers - 1; /* of most tokens only the keys and values matter there */
        SHARE(from, to, tokens, 4) {
            norm_all(m, p, v[NORM_BEFORE], from, to);
            feature(m, p, layer, p->hidden, from, to);
        }
        NEXT;
        Tokens normed = {p->normed, tokens, hidden, room, F32};
        SHARE(from, to, wide, chunk(wide, threads)) {
            EACH(part, 3) {
                int64_t start = (part == 0 ? 0 : heads + (part - 1) * kv) * size, a, b;
                overlap(from, to, start, (part == 0 ? heads : kv) * size, &a, &b);
                for (int64_t first = 0, stop; next_run(p, last && part == 0, &first, &stop); first = stop)
                    multiply(&normed, first, stop - first, w + Q + part, v[Q + part], a, b,
                             p->mixed + first * wide + start, wide);
            }
        }
        NEXT;
        SHARE(from, to, tokens * (heads + 2 * kv), 4) {
            for (int64_t i = from; i < to; i++) place(m, p, layer, i / (heads + 2 * kv), i % (heads + 2 * kv));
        }
        NEXT;
        if (last) {
            SHARE(from, to, kv * p->num_kept, 1) {
                for (int64_t i = from; i < to; i++) {
                    float *out = p->attended + i / kv * heads * size;
                    const Block block = block_of(m, p, layer, i % kv, p->kept[i / kv], 1, own, out);
                    attend(&block);
                }
            }
            if (thread == 0)
                EACH(i, p->num_kept)
                    memmove(p->hidden + i * hidden, p->hidden + p->kept[i] * hidden, (size_t)hidden * 4);
            tokens = p->num_kept;
        } else if (split.slots) {
            SHARE(from, to, blocks * split.slots, 1) {
                const Block block = numbered(m, p, layer, from / split.slots, 0);
                score(&block, from % split.slots, split.slots);
            }
            NEXT;
            SHARE(from, to, blocks * split.queries, 1) {
                const Block block = numbered(m, p, layer, from / split.queries, 0);
                soften(&block, from % split.queries, split.queries);
            }
            NEXT;
            SHARE(from, to, split.whole + (blocks - split.whole) * split.numbers, 1) {
                int64_t piece, pieces;
                const Block block = numbered(m, p, layer, values_of(&split, from, &piece, &pieces), 0);
                gather(&block, piece, pieces);
            }
        } else {
            SHARE(from, to, blocks, blocks / (8 * threads) + 1) {
                for (int64_t i = from; i < to; i++) {
                    const Block block = numbered(m, p, layer, i, own);
                    attend(&block);
                }
            }
        }
        NEXT;
        Tokens attended = {p->attended, tokens, heads * size, room, F32};
        SHARE(from, to, hidden, chunk(hidden, threads))
            add_product(m, p, &attended, w + O, v[O], v[NORM_ATTENDED], from, to);
        NEXT;
        SHARE(from, to, tokens, 4) {
            if (v[NORM_ATTENDED]) add_normed(m, p, v[NORM_ATTENDED], from, to);
            norm_all(m, p, v[NORM_AFTER], from, to);
        }
        NEXT;
        normed = (Tokens){p->normed, tokens, hidden, room, F32};
        SHARE(from, to, inner, CHUNK) {
            multiply(&normed, 0, tokens, w + GATE, v[GATE], from, to, p->acted, inner);
            multiply(&normed, 0, tokens, w + UP, v[UP], from, to, own - from, CHUNK);
            EACH(t, tokens) act(p->acted + t * inner + from, own + t * CHUNK, to - from, m->gelu);
        }
        NEXT;
        Tokens acted = {p->acted, tokens, inner, room, F32};
        SHARE(from, to, hidden, chunk(hidden, threads))
            add_product(m, p, &acted, w + DOWN, v[DOWN], v[NORM_FED], from, to);
        NEXT;
        if (v[NORM_FED]) {
            SHARE(from, to, tokens, 4) add_normed(m, p, v[NORM_FED], from, to);
            NEXT;
        }
    }
    SHARE(from, to, tokens, 4) {
        norm_all(m, p, m->norm, from, to);
        feature(m, p, m->layers, p->normed, from, to);
    }
    NEXT;
    Tokens normed = {p->normed, tokens, hidden, room, F32};
    SHARE(from, to, m->vocab, chunk(m->vocab, threads)) {
        float *logits = p->logits;
        for (int64_t first = 0, stop = tokens; few ? first < stop : next_run(p, 1, &first, &stop); first = stop) {
            multiply(&normed, first, stop - first, &m->head, m->head_bias, from, to, logits, m->vocab);
            EACH(t, stop - first) finish(m, logits + t * m->vocab + from, to - from);
            logits += (stop - first) * m->vocab;
        }
    }
}

#define JOINED(name, dtype) name##_##dtype
#define ENTRY(name, dtype) JOINED(name, dtype)

#if defined(_OPENMP)
const int ENTRY(ENTRY(NAME, NUMBER), threaded) = 1;
#else
const int ENTRY(ENTRY(NAME, NUMBER), threaded) = 0;
#endif

/* Runs the pass. NAME: one that other versions of these sources do not have (build.py). tickets: 11 per layer and 3 more.
 * Returns 0, or 1 + the index of a token that has no embedding (then nothing was done). */
int64_t ENTRY(NAME, NUMBER)(const Model *m, Pass *p) {
    Gate gate = {0, 0};
    EACH(i, p->tokens) if (p->ids[i] < 0 || p->ids[i] >= m->embedded) return i + 1;
    EACH(i, 11 * m->layers + 3) atomic_store_explicit(&p->tickets[i], 0, memory_order_relaxed);
    arrange(m, p);
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

/* The best of `count` logits, the first of equal ones; -1 where there is NaN. They are rounded to the model's dtype. */
static int64_t best_of(float *logits, int64_t count) {
    vec high = all(-INFINITY);
    ivec sick = {0};
    float most = -INFINITY;
    int64_t i = 0;
    round_all(NUMBER, logits, count);
    for (; i + LANES <= count; i += LANES) {
        const vec x = load(logits + i);
        sick |= x != x;
        high = pick(x > high, x, high);
    }
    for (int j = 0; j < LANES; j++) {
        if (sick[j]) return -1;
        most = high[j] > most ? high[j] : most;
    }
    for (; i < count; i++) {
        if (logits[i] != logits[i]) return -1;
        most = logits[i] > most ? logits[i] : most;
    }
    for (i = 0; logits[i] != most;) i++;
    return i;
}

/* Greedy decoding of `levels` tokens for every row of a pass that has one token a row. Returns as the pass does, or -1 where
 * there is NaN. */
int64_t ENTRY(ENTRY(NAME, NUMBER), chain)(const Model *m, Pass *p, const Chain *chain) {
    EACH(level, chain->levels) {
        if (chain->targets) p->targets = chain->targets + level * p->rows;
        const int64_t wrong = ENTRY(NAME, NUMBER)(m, p);
        if (wrong) return wrong;
        EACH(r, p->rows) {
            const int64_t best = best_of(p->logits + r * m->vocab, chain->vocab);
            if (best < 0) return -1;
            chain->best[r * chain->levels + level] = chain->ids[r] = best;
            chain->row[r].start++;
        }
    }
    return 0;
}
