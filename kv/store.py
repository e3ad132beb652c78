"""One model's K/V inside the shared cache: plain preallocated tensors, grown by doubling, never concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdec.kv.layout import Layout, check_layout


@dataclass(frozen=True)
class WritePlan:
    """Where one forward pass writes. Built once a pass, used by every layer."""

    num_rows: int
    width: int
    read: int
    """Slots the attention reads: `[0, read)`."""
    start: int | None
    """Common first slot of all rows; None when rows differ and `slots` must be scattered to."""
    rows: torch.Tensor | None
    slots: torch.Tensor | None
    first: int = 0
    """Storage row of the pass's first row."""
    starts: Sequence[int] = ()

    @staticmethod
    def build(starts: Sequence[int], width: int, row: int = 0) -> WritePlan:
        first = starts[0]
        read = max(starts) + width
        if all(start == first for start in starts):
            return WritePlan(len(starts), width, read, first, None, None, row, starts)
        slots = torch.tensor(list(starts))[:, None] + torch.arange(width)
        return WritePlan(len(starts), width, read, None, torch.arange(len(starts))[:, None], slots, row, starts)

    def on(self, device: torch.device) -> WritePlan:
        if self.slots is None or self.rows is None or self.slots.device == device:
            return self
        return replace(self, rows=self.rows.to(device), slots=self.slots.to(device))


class ModelStore:
    """Storage `[rows, kv_heads, capacity, head_dim]` per layer, allocated when the layer first writes.

    Shapes, dtype and device are read from the layer's own states, so tensor-parallel, sharded and
    mixed-precision models need no special case.
    """

    def __init__(self, num_layers: int, num_rows: int, capacity: int, most: int | None = None):
        self.num_layers = num_layers
        self.num_rows = num_rows
        self.capacity = capacity
        self.most = most
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._moves: dict[int, int] = {}
        self.filled = [0] * num_rows
        self.plan: WritePlan | None = None
        self.places: list[Sequence[int] | None] | None = None
        """Tail slot of each node, per active row, where they differ (see `KVCache.place`)."""
        self.view = StoreView(self)
        self._row_numbers = torch.empty(0, 1, dtype=torch.int64)

    @property
    def keys(self) -> list[torch.Tensor | None]:
        """Per layer, None until it first writes."""
        self._settle()
        return self._keys

    @property
    def values(self) -> list[torch.Tensor | None]:
        """Per layer, None until it first writes."""
        self._settle()
        return self._values

    def begin(self, plan: WritePlan) -> None:
        self.plan = plan
        self._settle()
        self._reserve(plan.read)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one layer's new states `[rows, kv_heads, width, head_dim]`; return everything up to `plan.read`."""
        assert self.plan is not None, "a model wrote to its cache outside SharedKVCache.writing()"
        plan = self.plan
        keys, values = self._layer(layer, key, value)
        if plan.num_rows != len(keys):
            keys, values = keys.narrow(0, plan.first, plan.num_rows), values.narrow(0, plan.first, plan.num_rows)
        if plan.start is not None:  # narrow() costs a third of an indexing expression, and this runs per layer
            keys.narrow(2, plan.start, plan.width).copy_(key)
            values.narrow(2, plan.start, plan.width).copy_(value)
        else:
            plan = self.plan = plan.on(key.device)
            keys[plan.rows, :, plan.slots] = key.transpose(1, 2)
            values[plan.rows, :, plan.slots] = value.transpose(1, 2)
        return keys.narrow(2, 0, plan.read), values.narrow(2, 0, plan.read)

    def layout(self, plan: WritePlan, like: torch.Tensor) -> Layout:
        """For a pass that writes by itself.

        Args:
            like: any tensor `[*, kv_heads, *, head_dim]` of the dtype and device of the states.
        """
        heads, slots, size = like.shape[1], self.capacity, like.shape[3]
        keys, values = zip(*(self._layer(layer, like, like) for layer in range(self.num_layers)), strict=True)
        check_layout((*keys, *values), (self.num_rows, heads, slots, size), like)
        if len(self._row_numbers) < self.num_rows:
            self._row_numbers = torch.arange(self.num_rows)[:, None]
        strides = (slots, heads * slots * size, size, slots * size)
        return Layout(keys, values, strides, self._row_numbers[plan.first :], plan.starts)

    def gather(self, rows: list[int], sources: list[list[int]], targets: list[list[int]]) -> None:
        """Copy slot `sources[i][j]` of `rows[i]` to slot `targets[i][j]`, all layers, in place."""
        row = torch.tensor([r for r, src in zip(rows, sources, strict=True) for _ in src])
        source = torch.tensor([s for src in sources for s in src])
        target = torch.tensor([t for tgt in targets for t in tgt])
        for tensor in self._tensors():
            index = (row.to(tensor.device), source.to(tensor.device), target.to(tensor.device))
            # Advanced indexing reads the whole right side before it writes: overlapping moves are safe.
            tensor[index[0], :, index[2]] = tensor[index[0], :, index[1]]

    def swap(self, first: int, second: int) -> None:
        """Exchange two rows. The K/V moves when it is next looked at: many rows may finish in one step."""
        moves = self._moves
        moves[first], moves[second] = moves.get(second, second), moves.get(first, first)
        self.filled[first], self.filled[second] = self.filled[second], self.filled[first]
        if self.places is not None:
            self.places[first], self.places[second] = self.places[second], self.places[first]

    def _settle(self) -> None:
        """Carry out the swaps noted so far, one gather per tensor."""
        if not self._moves:
            return
        moves = [(row, source) for row, source in self._moves.items() if row != source]
        self._moves = {}
        stop = max((self.filled[row] for row, _ in moves), default=0)
        if not stop:
            return
        rows, sources = (torch.tensor(side) for side in zip(*moves, strict=True))
        for tensor in self._tensors():
            tensor[rows.to(tensor.device), :, :stop] = tensor[sources.to(tensor.device), :, :stop]

    def fork(self, repeats: int) -> None:
        self.num_rows *= repeats
        self.filled = [count for count in self.filled for _ in range(repeats)]
        if self.places is not None:
            self.places = [own for own in self.places for _ in range(repeats)]
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = None if tensor is None else tensor.repeat_interleave(repeats, dim=0)

    def cut(self, row: int, length: int) -> None:
        """Forget what one row holds from slot `length` on, its tail with it."""
        self.filled[row] = min(self.filled[row], length)
        if self.places is not None:
            self.places[row] = None

    def clear(self) -> None:
        """Zero everything: masked slots still enter the softmax-weighted sum as 0 * value, and 0 * NaN is NaN."""
        self.filled = [0] * self.num_rows
        self.places = None
        for tensor in self._tensors():
            tensor.zero_()

    def scrub(self, lengths: Sequence[int]) -> None:
        """Zero and drop everything from slot `lengths[row]` on, for the leading rows."""
        for row, length in enumerate(lengths):
            self.filled[row] = min(self.filled[row], length)
            for tensor in self._tensors():
                tensor[row, :, length:] = 0

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (*self.keys, *self.values) if tensor is not None]

    def _layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (self.num_rows, key.shape[1], self.capacity)
            with torch.inference_mode(False):  # storage outlives the pass and is written to outside of it
                keys = self._keys[layer] = key.new_zeros(*shape, key.shape[3])
                values = self._values[layer] = value.new_zeros(*shape, value.shape[3])
        return keys, values

    def _reserve(self, slots: int) -> None:
        if slots <= self.capacity:
            return
        doubled = 2 * self.capacity if self.most is None else min(2 * self.capacity, self.most)
        self.capacity = max(doubled, slots)
        used = max(self.filled)
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                if old is not None:
                    new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
                    new[:, :, :used] = old[:, :, :used]
                    tensors[i] = new


class LayerStorage(Protocol):
    """One model's K/V, in whatever layout: `write` takes a layer's new states and returns all that the pass reads.

    plan: of the pass that runs, None before the first; of the layout's own kind, with `width` and `read`.
    """

    num_layers: int
    plan: Any

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def layout(self, plan: Any, like: torch.Tensor) -> Layout: ...


class StoreView(Cache):
    """What an unmodified `transformers` model sees: a cache whose `update` writes into the shared storage."""

    def __init__(self, store: LayerStorage):
        super().__init__(layers=[_StoreLayer(store, i) for i in range(store.num_layers)])
        self.store = store

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.store.write(layer_idx, key_states, value_states)

    def layout(self, like: torch.Tensor) -> Layout:
        """Where the pass that is planned reads and writes."""
        return self.store.layout(self.store.plan, like)

    def pinned(self) -> PinnedView:
        """What the pass planned last reads and writes through when others are planned before it runs."""
        return PinnedView(self.store)


class PinnedView:
    """`StoreView.update` under one pass's plan, for several passes over disjoint rows that run layer by layer."""

    def __init__(self, store: LayerStorage):
        self._store, self._plan = store, store.plan

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._store.plan = self._plan
        return self._store.write(layer, key, value)

    def layout(self, like: torch.Tensor) -> Layout:
        return self._store.layout(self._plan, like)


class _StoreLayer(CacheLayerMixin):
    """The per-layer face some models ask for; all state is in the store."""

    is_sliding = False
    is_compileable = False

    def __init__(self, store: LayerStorage, index: int):
        super().__init__()
        self.store = store
        self.index = index
        self.is_initialized = True

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing to do: the store allocates on the first write."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.store.write(self.index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.store.plan is not None
        return self.store.plan.read, 0

    def get_seq_length(self) -> int:
        plan = self.store.plan
        return 0 if plan is None else plan.read - plan.width

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        # The name transformers 5.17 still calls.
        return -1
