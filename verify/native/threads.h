/* Threads of one pass: where they meet, and how work is handed out. */
#pragma once
#include <sched.h>
#include <stdatomic.h>
#include "vectors.h"

#define CHUNK 32        /* columns handed out at once, at least */

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
