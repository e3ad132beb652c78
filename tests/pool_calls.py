"""Short forms of what tests do to a KV pool: one pass, a prefill, a look at the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kv import KVPool, PagedKVCache
from specdec.kv.quantised import Quantised

LAYERS = {"target": 2, "draft": 1}
HEADS, DIM = 2, 3
SLOT_BYTES = LAYERS["target"] * 2 * HEADS * DIM * 8 + LAYERS["draft"] * 2 * HEADS * DIM * 8
"""Bytes of one slot in both models, float64."""


def write(pool: KVPool, name: str, sequences: Sequence[int], starts: Sequence[int], value: float, width: int) -> Any:
    """One pass that stores `value` everywhere; returns the last layer's keys as the pass read them."""
    cache = PagedKVCache(pool, sequences)
    states = torch.full((len(sequences), HEADS, width, DIM), value, dtype=torch.float64)
    with cache.writing(name, starts, width) as write:
        for layer in range(LAYERS[name]):
            keys, _ = write.update(layer, states, -states)
    return keys


def prefill(pool: KVPool, sequence: int, length: int, value: float = 1.0) -> None:
    """The target's K/V of everything up to `length` that is not there yet."""
    start = pool.filled(sequence, "target")
    if length > start:
        write(pool, "target", [sequence], [start], value, length - start)
    pool.set_length(sequence, length)


def keys_of(pool: KVPool, sequence: int, name: str = "target") -> list[float]:
    return [float(value) for value in next(PagedKVCache(pool, [sequence]).layers(name, 0))[0][0, :, 0]]


class OfAPass(Quantised):
    """What must not be: a token's scale is that of its whole pass."""

    def pack(self, states: Tensor) -> Tensor:
        packed = super().pack(states)
        if len(states):
            packed[..., states.shape[-1] :] = super().pack(states.flatten(0, 1).amax(0))[..., states.shape[-1] :]
        return packed
