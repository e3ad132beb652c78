"""Which backend computes tree attention: a measurement on this device, in these shapes, or the user's word."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention.fold import fold_attention
from specdec.verify.attention.launch import triton_attention, triton_serves
from specdec.verify.attention.layout import TreeLayout
from specdec.verify.attention.merge import Prefix, merged_attention
from specdec.verify.attention.prefix import aten_prefix, aten_serves, package_prefix, package_serves, torch_prefix

VARIABLE = "SPECDEC_ATTENTION"
"""Environment variable that names the backend, or "auto" (the default)."""

TRIALS = 5
"""Calls per timed trial; the best of three trials counts."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far a candidate may be from `fold`, relative to the largest output; 16-bit dtypes: 3e-2."""

Serves = Callable[[Tensor, Tensor, Tensor, TreeLayout, int | None], str | None]
Attend = Callable[[Tensor, Tensor, Tensor, TreeLayout, float, int | None], Tensor]


class Backend(NamedTuple):
    """One way to compute tree attention. `serves` says why it cannot take these states, or None."""

    serves: Serves
    attend: Attend


def _merging(prefix: Prefix, serves: Callable[[Tensor, Tensor, Tensor, TreeLayout], str | None]) -> Backend:
    def why_not(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, window: int | None) -> str | None:
        if window is not None:
            return "a sliding window starts at another slot for every node, which a prefix without mask cannot serve"
        return serves(query, key, value, layout)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None
    ) -> Tensor:  # fmt: skip
        return merged_attention(query, key, value, layout, scale, prefix)

    return Backend(why_not, attend)


BACKENDS: Mapping[str, Backend] = {
    "fold": Backend(lambda *_: None, fold_attention),
    "split": _merging(torch_prefix, lambda *_: None),
    "flash": _merging(aten_prefix, aten_serves),
    "flash_attn": _merging(package_prefix, package_serves),
    "triton": Backend(lambda query, key, value, *_: triton_serves(query, key, value), triton_attention),
}
"""fold: masked SDPA. split, flash, flash_attn: the prefix by plain products, by torch's FlashAttention or by the
package flash-attn, merged with the tail. triton: the library's own kernel."""

CANDIDATES = ("fold", "flash", "flash_attn", "triton")
"""What the measurement compares; `fold` first, which is the judge of the others' results, too."""


class AttentionChoice:
    """Chooses per device, dtype and bucket of shapes, and remembers.

    Args:
        backends: by name; must contain every candidate.
        candidates: names in order of preference at equal times; the first serves everything.
        clock: seconds per call of a function, for tests.
    """

    def __init__(
        self,
        backends: Mapping[str, Backend] = BACKENDS,
        candidates: tuple[str, ...] = CANDIDATES,
        clock: Callable[[Callable[[], Tensor]], float] | None = None,
    ) -> None:
        self._backends = backends
        self._candidates = candidates
        self._clock = clock or _seconds
        self.chosen: dict[tuple[object, ...], str] = {}
        """Measured winners by bucket."""

    def name(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None = None
    ) -> str:  # fmt: skip
        """The backend for these states.

        Raises:
            UnsupportedArgumentError: the environment names an unknown backend, or one that cannot serve them.
        """
        asked = os.environ.get(VARIABLE, "auto")
        if asked != "auto":
            if asked not in self._backends:
                names = ", ".join(["auto", *self._backends])
                raise UnsupportedArgumentError(f"{VARIABLE}={asked!r} names no attention backend; use one of {names}")
            reason = self._backends[asked].serves(query, key, value, layout, window)
            if reason is not None:
                raise UnsupportedArgumentError(f"{VARIABLE}={asked}: {reason}; use another backend or unset {VARIABLE}")
            return asked
        first = self._candidates[0]
        able = [
            name
            for name in self._candidates
            if self._backends[name].serves(query, key, value, layout, window) is None
        ]  # fmt: skip
        if able == [first]:
            return first
        bucket = _bucket(query, key, layout, window)
        if bucket not in self.chosen:
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                return first  # nothing can be measured inside a graph: warm up in the same shapes before capturing
            self.chosen[bucket] = self._measure(able, query, key, value, layout, scale, window)
        best = self.chosen[bucket]
        return best if best in able else first  # a bucket holds shapes that not every backend serves

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None = None
    ) -> Tensor:  # fmt: skip
        """Tree attention by the chosen backend. Shapes: see `reference_attention`; the result has the query's dtype."""
        if window is not None and window >= layout.read:
            window = None
        name = self.name(query, key, value, layout, scale, window)
        return self._backends[name].attend(query, key, value, layout, scale, window)

    def _measure(
        self, able: list[str], query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float,
        window: int | None,
    ) -> str:  # fmt: skip
        """The fastest candidate whose result agrees with the first one's."""
        seconds: dict[str, float] = {}
        judge: Tensor | None = None
        for name in able:
            call = partial(self._backends[name].attend, query, key, value, layout, scale, window)
            try:
                out = call().float()
            except torch.OutOfMemoryError:
                raise
            except Exception as fault:  # a kernel that does not compile here must not stop the pass
                if name == able[0]:
                    raise
                warnings.warn(f"attention backend {name!r} failed and is not used: {fault}", RuntimeWarning, 2)
                continue
            if judge is None:
                judge = out
            # Where the judge itself is NaN (poisoned K/V) nothing can be said.
            error = (out - judge).abs().nan_to_num(0.0).amax() / judge.abs().nan_to_num(0.0).amax().clamp(min=1e-6)
            if float(error) > TOLERANCE.get(query.dtype, 3e-2):
                warnings.warn(
                    f"attention backend {name!r} is off by {float(error):.1e} here and is not used", RuntimeWarning, 2
                )
                continue
            seconds[name] = self._clock(call)
        return min(seconds, key=lambda name: seconds[name])


def _bucket(query: Tensor, key: Tensor, layout: TreeLayout, window: int | None) -> tuple[object, ...]:
    rows, heads, nodes, size = query.shape
    sizes = tuple((count - 1).bit_length() for count in (rows, nodes, max(1, layout.longest)))
    page = None if layout.table is None else key.shape[2]
    return (query.device, query.dtype, heads, key.shape[1], size, sizes, page, layout.equal, window is not None)


def _seconds(call: Callable[[], Tensor]) -> float:
    """Wall time per call of several calls in a row: what a layer waits for, be it the device or the host."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(TRIALS):
            call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) / TRIALS)
    return best


attend = AttentionChoice()
"""The library's one entry to tree attention."""
