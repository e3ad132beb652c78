"""Is a long text read faster natively or straight over the parameters? Measured on the model's first layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from time import perf_counter

import torch

from specdec.kv.shared import SharedKVCache
from specdec.verify.passes.base import Part, Runner
from specdec.verify.passes.parameters import Parameters

ALWAYS_NATIVE = 128
"""Texts of fewer tokens are read natively: there it is ahead by far."""
CHUNK = 512
"""Tokens of a text that are timed, and that a native pass reads at once: it cannot be interrupted, so it should not
last."""
_CLEAR_LOSS = 1.05
"""The native pass must take so many times the other's time to be passed over: its bits depend on the text alone."""
_TRIALS = 2

_slower: dict[tuple[object, ...], bool] = {}
"""What was measured in this process: by sizes of a layer, threads, tokens, and slots read."""


def native_is_slower(own: Parameters, tokens: int, read: int, runners: Callable[[Parameters], list[Runner]]) -> bool:
    """Whether a pass over `tokens` tokens of text, the last of `read` slots, is better not run natively.

    Products of many rows, and attention over long texts, are where a library's kernels catch up; where, depends on the
    machine and on the sizes. Measured once per process, sizes and power of two of the slots that a token in the middle
    sees: two passes each over 512 tokens of one layer, a few hundredths of what the text itself costs. What begins a
    text, which is read without a mask, is measured by its own beginning.

    Args:
        runners: of the native pass and of the direct one over such parameters.
    """
    if tokens < ALWAYS_NATIVE:
        return False
    if read > tokens:
        width, slots = CHUNK, max(CHUNK, 1 << (read - tokens // 2 - 1).bit_length())
    else:
        width = slots = CHUNK if tokens < 2 * CHUNK else 2 * CHUNK
    key = (own.shape, torch.get_num_threads(), width, slots)
    if key not in _slower:
        try:
            native, direct = _seconds(own, width, slots, runners)
        except (RuntimeError, MemoryError):  # too little for a trial is no reason to end a call
            native, direct = 0.0, 0.0
        _slower[key] = native > _CLEAR_LOSS * direct
    return _slower[key]


def _seconds(own: Parameters, width: int, slots: int, runners: Callable[[Parameters], list[Runner]]) -> list[float]:
    """The quickest of two passes by each way, in turn."""
    first = copy.copy(own)
    first.layers = own.layers[:1]
    count = first.layers[0].index + 1
    tokens = torch.arange(width)[None] % len(own.embed)
    ways = runners(first)
    caches = [SharedKVCache({"text": count}, 1, slots) for _ in ways]
    for cache in caches:  # what lies before the text may be anything
        cache.store("text").filled[0] = slots - width
    best = [float("inf")] * len(ways)
    for _ in range(_TRIALS):
        for i, (way, cache) in enumerate(zip(ways, caches, strict=True)):
            with cache.writing("text", [slots - width], width) as write:
                start = perf_counter()
                way([Part(tokens, write, keep=None, features=(1,))])  # all of the layer for every token
                best[i] = min(best[i], perf_counter() - start)
    return best
