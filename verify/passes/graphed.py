"""Target and draft passes as CUDA graphs: a pass of a small model over few nodes costs the host more than the device.

A graph replays the same kernels on the same addresses, so every input of a pass lies in static buffers, K/V is written
by index and read at full length, and lengths stay on the device. One graph per shape: rows, nodes (padded to a
bucket), earlier nodes of the tree, and slots (rounded up), as in gpt-fast's static decode and vLLM's batch buckets.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.verify.attention.register import NAME, fitting_attention
from specdec.verify.passes.base import Output, Part, Runner
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.modules import Modules, as_nodes
from specdec.verify.passes.static import StaticPass

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Nodes per pass; others are padded to the next one. Padding changes results in the last bits (other matrix shapes)."""

MIN_SLOTS = 512
"""Slots of the smallest bucket; each further one is twice as long."""

MAX_GRAPHS = 64
"""Graphs kept per model; the one unused for longest goes first."""

MIN_USES = 2
"""A shape is captured when it comes this many times: a capture costs some fifty passes."""

Run = Callable[[], tuple[Tensor, ...]]
Capture = Callable[[Run], Run]
"""Records what a function does on the device; the result does it again on whatever the buffers then hold."""


class Shape(NamedTuple):
    """What a graph is made for. `storage`: address of the K/V, which moves when the cache grows."""

    rows: int
    width: int
    first: int
    slots: int
    storage: int
    features: tuple[int, ...] | None


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

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return tuple(tensor.clone() for tensor in out)  # the next replay writes there

    return replay


class Graphed(Runner):
    """Replays parts of up to 128 tokens over contiguous K/V; what does not fit or cannot be captured, the modules run.

    Args:
        modules: whose passes are recorded.
        capture: `cuda_capture`, or a stand-in; None runs over the static buffers without recording anything.
        min_uses: passes of one shape before it is captured.
    """

    name = "graphed"

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Inputs,
        modules: Modules,
        capture: Capture | None = cuda_capture,
        min_uses: int = MIN_USES,
    ) -> None:
        self._model, self._inputs, self._modules = model, inputs, modules
        self._capture = capture
        self._min_uses = min_uses
        self._uses: Counter[Shape] = Counter()
        self._graphs: OrderedDict[Shape, tuple[StaticPass, Run]] = OrderedDict()
        self._given_up: str | None = None
        self.num_replays = 0

    def refusal(self, part: Part) -> str | None:
        write, width = part.write, part.tokens.shape[1]
        if self._given_up is not None:
            return f"passes of this model cannot be captured: {self._given_up}"
        if write.store is None:
            return "its K/V lies in pages"
        if width > WIDTHS[-1] or (write.valid is not None and min(write.valid) < width):
            return f"only whole rows of up to {WIDTHS[-1]} tokens are captured"
        if fitting_attention(self._model) != NAME:
            return "its attention follows no plan"
        read = write.read - width + self._width(part)
        if write.store.keys[0] is None or None in write.store.keys or read > write.store.capacity:
            return "storage is allocated by a pass that is not captured"
        shape = self._shape(part, read)
        self._uses[shape] += 1
        if shape not in self._graphs and self._uses[shape] < self._min_uses:
            return f"this shape came {self._uses[shape]} of {self._min_uses} times"
        return None

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        (part,) = parts
        nodes = part.tokens.shape[1]
        self._modules.fit()
        try:
            logits, *features = self._replayed(part)
        except torch.OutOfMemoryError:
            self._graphs.clear()
            raise
        except RuntimeError as fault:
            # Models that look at values on the host (mixtures of experts, some rotary embeddings) cannot be captured.
            self._give_up(str(fault))
            return self._modules(parts)
        self.num_replays += 1
        logits = logits[:, nodes - part.kept[1] : nodes]
        return [Output(logits, [states[:, :nodes] for states in features])]

    def _width(self, part: Part) -> int:
        width = bucket_width(part.tokens.shape[1])
        assert width is not None
        return width

    def _shape(self, part: Part, read: int) -> Shape:
        store, first = part.write.store, 0 if part.nodes is None else part.nodes.first
        assert store is not None
        assert store.keys[0] is not None
        slots = bucket_slots(read, store.capacity)
        features = None if part.features is None else tuple(part.features)
        return Shape(len(part.tokens), self._width(part), first, slots, store.keys[0].data_ptr(), features)

    def _replayed(self, part: Part) -> Sequence[Tensor]:
        lengths, depths, ancestors, _ = as_nodes(part)
        shape = self._shape(part, part.write.read - part.tokens.shape[1] + self._width(part))
        if shape in self._graphs:
            self._graphs.move_to_end(shape)
            static, run = self._graphs[shape]
            static.load(part.tokens, lengths, depths, ancestors)
            return run()
        store = part.write.store
        assert store is not None
        static = StaticPass(self._model, self._inputs, store, *shape[:4], shape.features)
        static.load(part.tokens, lengths, depths, ancestors)
        run = static.run if self._capture is None else self._capture(static.run)
        given = run()
        # Graphs of storage that is gone (the cache grew) must not be replayed, and hold memory.
        for old in [old for old in self._graphs if old.storage != shape.storage]:
            del self._graphs[old]
        self._graphs[shape] = (static, run)
        if len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return given

    def _give_up(self, why: str) -> None:
        self._given_up = why
        self._graphs.clear()
        name = type(self._model).__name__
        warnings.warn(f"passes of {name} cannot be captured and run eagerly: {why}", RuntimeWarning, stacklevel=2)
