"""Target and draft passes as CUDA graphs: a pass of a small model over few nodes costs the host more than the device.

A graph replays the same kernels on the same addresses, so every input of a pass lies in static buffers, K/V is written
by index and read at full length, and lengths stay on the device. One graph per shape: rows, nodes (padded to a
bucket), earlier nodes of the tree, and slots (rounded up), as in gpt-fast's static decode and vLLM's batch buckets.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.shared import SharedKVCache
from specdec.kv.store import ModelStore
from specdec.verify.attention.plan import chain
from specdec.verify.observing import observed
from specdec.verify.planned import PlannedForward
from specdec.verify.static_pass import StaticPass

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Nodes per pass; others are padded to the next one. Padding changes results in the last bits (other matrix shapes)."""

MIN_SLOTS = 512
"""Slots of the smallest bucket; each further one is twice as long."""

MAX_GRAPHS = 64
"""Graphs kept per model; the one unused for longest goes first."""

MIN_USES = 2
"""A shape is captured when it comes this many times: a capture costs some fifty passes."""

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
"""Records what a function does on the device; the result does it again on whatever the buffers then hold."""


class Shape(NamedTuple):
    """What a graph is made for. `storage`: address of the K/V, which moves when the cache grows."""

    rows: int
    width: int
    first: int
    slots: int
    storage: int


def bucket_width(nodes: int) -> int | None:
    """The width a pass of `nodes` nodes is padded to; None beyond the largest."""
    return next((width for width in WIDTHS if width >= nodes), None)


def bucket_slots(slots: int, capacity: int) -> int:
    """Slots a graph reads that has to read `slots`: the next power of two from `MIN_SLOTS` on, within the capacity."""
    return min(capacity, max(MIN_SLOTS, 1 << (slots - 1).bit_length()))


def cuda_capture(run: Run) -> Run:
    """A CUDA graph of `run`, which must neither synchronise nor allocate outside of torch."""
    ahead, device = torch.cuda.Stream(), torch.cuda.current_stream()
    ahead.wait_stream(device)
    with torch.cuda.stream(ahead):  # libraries set up their workspaces and kernels are compiled outside the capture
        for _ in range(2):
            run()
    device.wait_stream(ahead)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out.clone()  # the next replay writes there

    return replay


class GraphedForward(PlannedForward):
    """A `PlannedForward` that replays passes of up to 128 nodes; what does not fit or cannot be captured runs eagerly.

    Args:
        capture: `cuda_capture`, or a stand-in; None runs over the static buffers without recording anything.
        min_uses: passes of one shape before it is captured.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, capture: Capture | None = cuda_capture, min_uses: int = MIN_USES
    ) -> None:
        super().__init__(model, name)
        self._capture = capture
        self._min_uses = min_uses
        self._uses: Counter[Shape] = Counter()
        self._graphs: OrderedDict[Shape, tuple[StaticPass, Run]] = OrderedDict()
        self._given_up: str | None = None
        self.num_replays = 0

    def causal(
        self, cache: PassCache, tokens: Tensor, starts: Sequence[int], valid: Sequence[int] | None, keep: int
    ) -> Tensor:
        rows, width = tokens.shape
        if valid is None and self._fits(cache, width):
            depths, ancestors = chain(rows, width, tokens.device)
            logits = self._replay(cache, tokens, list(starts), depths, ancestors, 0)
            if logits is not None:
                return logits[:, -keep:] if keep else logits
        return super().causal(cache, tokens, starts, valid, keep)

    def nodes(self, cache: PassCache, tree_tokens: Tensor, depths: Tensor, ancestors: Tensor, first: int) -> Tensor:
        if self._fits(cache, tree_tokens.shape[1]):
            lengths = list(cache.lengths[: cache.num_rows])
            logits = self._replay(cache, tree_tokens, lengths, depths, ancestors, first)
            if logits is not None:
                return logits
        return super().nodes(cache, tree_tokens, depths, ancestors, first)

    def _fits(self, cache: PassCache, nodes: int) -> bool:
        eager = self._config._attn_implementation == "eager"
        return self._given_up is None and isinstance(cache, SharedKVCache) and not eager and nodes <= WIDTHS[-1]

    def _replay(
        self, cache: PassCache, tokens: Tensor, lengths: list[int], depths: Tensor, ancestors: Tensor, first: int
    ) -> Tensor | None:
        """Logits `[rows, nodes, vocab]`, or None where the pass has to run eagerly (nothing is changed then)."""
        assert isinstance(cache, SharedKVCache)
        rows, nodes = tokens.shape
        width = bucket_width(nodes)
        assert width is not None
        store = cache.store(self.name)
        read = max(lengths) + first + width
        keys = store.keys[0]  # also settles rows that were moved: a graph reads what lies there
        if keys is None or any(tensor is None for tensor in store.keys) or read > keys.shape[2]:
            return None  # an eager pass allocates
        shape = Shape(rows, width, first, bucket_slots(read, keys.shape[2]), keys.data_ptr())
        self._uses[shape] += 1
        if shape not in self._graphs and self._uses[shape] < self._min_uses:
            return None
        begin = perf_counter()
        try:
            with cache.writing(self.name, [length + first for length in lengths], width, [nodes] * rows):
                logits = self._run_static(shape, store, tokens, lengths, depths, ancestors)
        except torch.OutOfMemoryError:
            self._graphs.clear()
            raise
        except RuntimeError as fault:
            # Models that look at values on the host (mixtures of experts, some rotary embeddings) cannot be captured.
            self._give_up(str(fault))
            return None
        observed(self.model, perf_counter() - begin)
        self.num_replays += 1
        return logits[:, :nodes]

    def _run_static(
        self, shape: Shape, store: ModelStore, tokens: Tensor, lengths: list[int], depths: Tensor, ancestors: Tensor
    ) -> Tensor:
        with torch.inference_mode(self._inference):
            if shape in self._graphs:
                self._graphs.move_to_end(shape)
                static, run = self._graphs[shape]
                static.load(tokens, lengths, depths, ancestors, self.num_positions)
                return run()
            static = StaticPass(self.model, store, shape.rows, shape.width, shape.first, shape.slots, self._windows)
            static.load(tokens, lengths, depths, ancestors, self.num_positions)
            run = static.run if self._capture is None else self._capture(static.run)
            logits = run()
        # Graphs of storage that is gone (the cache grew) must not be replayed, and hold memory.
        for old in [old for old in self._graphs if old.storage != shape.storage]:
            del self._graphs[old]
        self._graphs[shape] = (static, run)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return logits

    def _give_up(self, why: str) -> None:
        self._given_up = why
        self._graphs.clear()
        name = type(self.model).__name__
        warnings.warn(f"passes of {name} cannot be captured and run eagerly: {why}", RuntimeWarning, stacklevel=2)
