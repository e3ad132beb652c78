"""One model's K/V inside the shared cache: plain preallocated tensors, grown by doubling, never concatenated; and the
passes that write to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

import torch
from torch import Tensor

from specdec.kv.layout import Layout, check_layout
from specdec.kv.write import Write


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
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers
        self._moves: dict[int, int] = {}
        self.filled = [0] * num_rows
        self.places: list[Sequence[int] | None] | None = None
        """Tail slot of each node, per active row, where they differ (see `KVCache.place`)."""
        self.borrowed: dict[str, list[int]] = {}
        """Of each model that borrows this storage, per row: the slot behind its own tail, 0 where it has none."""
        self._layout: Layout | None = None

    @property
    def keys(self) -> list[Tensor | None]:
        """Per layer, None until it first writes."""
        self._settle()
        return self._keys

    @property
    def values(self) -> list[Tensor | None]:
        """Per layer, None until it first writes."""
        self._settle()
        return self._values

    def make_room(self, slots: int) -> None:
        """Before a pass that reads so many slots: rows lie where they should, and storage is long enough."""
        self._settle()
        if slots <= self.capacity:
            return
        doubled = 2 * self.capacity if self.most is None else min(2 * self.capacity, self.most)
        capacity, self._layout = max(doubled, slots), None
        used = max(map(self._used, range(self.num_rows)))
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                if old is not None and old.shape[2] < capacity:
                    new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                    new[:, :, :used] = old[:, :, :used]
                    tensors[i] = new
        self.capacity = (
            capacity  # last: if memory ran out on the way, the next attempt grows those that are still small
        )

    def have_written(self, first: int, starts: Sequence[int], real: Sequence[int], borrower: str | None) -> None:
        """A pass has ended: from row `first` on, `real[b]` tokens lie in slots from `starts[b]` on (none if it failed).

        They are the owner's, or a borrower's. From there on nothing is left of the others', not even behind the real
        tokens, where padding was written.
        """
        for row, (start, new) in enumerate(zip(starts, real, strict=True), first):
            for name, tails in self.borrowed.items():
                if name != borrower:
                    tails[row] = min(tails[row], start)
                elif new:
                    tails[row] = start + new
            if borrower is not None:
                self.filled[row] = min(self.filled[row], start)
            elif new:
                self.filled[row] = start + new

    def drop_tails(self, rows: Iterable[int]) -> None:
        """Forget the borrowers' tails in these rows."""
        for tails in self.borrowed.values():
            for row in rows:
                tails[row] = 0

    def _used(self, row: int) -> int:
        """Slots of a row that hold anything."""
        return max([self.filled[row], *(tails[row] for tails in self.borrowed.values())])

    def layout(self, like: Tensor) -> Layout:
        """Of all rows, every one of which is one page of a table: the same object until storage moves.

        Args:
            like: any tensor `[*, kv_heads, *, head_dim]` of the dtype and device of the states.
        """
        known, heads, slots, size = self._layout, like.shape[1], self.capacity, like.shape[3]
        strides = (slots, heads * slots * size, size, slots * size)
        if known is None or known.keys[0].dtype != like.dtype or known.strides != strides:
            keys, values = zip(*(self.layer(layer, like, like) for layer in range(self.num_layers)), strict=True)
            check_layout((*keys, *values), (self.num_rows, heads, slots, size), like.dtype)
            known = self._layout = Layout(keys, values, strides, torch.arange(self.num_rows)[:, None])
        return known

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
        for tails in self.borrowed.values():
            tails[first], tails[second] = tails[second], tails[first]
        if self.places is not None:
            self.places[first], self.places[second] = self.places[second], self.places[first]

    def _settle(self) -> None:
        """Carry out the swaps noted so far, one gather per tensor."""
        if not self._moves:
            return
        moves = [(row, source) for row, source in self._moves.items() if row != source]
        self._moves = {}
        stop = max((self._used(row) for row, _ in moves), default=0)
        if not stop:
            return
        rows, sources = (torch.tensor(side) for side in zip(*moves, strict=True))
        for tensor in self._tensors():
            tensor[rows.to(tensor.device), :, :stop] = tensor[sources.to(tensor.device), :, :stop]

    def fork(self, repeats: int) -> None:
        self.num_rows, self._layout = self.num_rows * repeats, None
        self.filled = [count for count in self.filled for _ in range(repeats)]
        self.borrowed = {
            name: [tail for tail in tails for _ in range(repeats)] for name, tails in self.borrowed.items()
        }
        if self.places is not None:
            self.places = [own for own in self.places for _ in range(repeats)]
        for tensors in (self.keys, self.values):
            for i, tensor in enumerate(tensors):
                tensors[i] = None if tensor is None else tensor.repeat_interleave(repeats, dim=0)

    def cut(self, row: int, length: int) -> None:
        """Forget what one row holds from slot `length` on, its tail with it."""
        self.filled[row] = min(self.filled[row], length)
        self.drop_tails([row])
        if self.places is not None:
            self.places[row] = None

    def clear(self) -> None:
        """Zero everything: masked slots still enter the softmax-weighted sum as 0 * value, and 0 * NaN is NaN."""
        self.filled = [0] * self.num_rows
        self.drop_tails(range(self.num_rows))
        self.places = None
        for tensor in self._tensors():
            tensor.zero_()

    def scrub(self, lengths: Sequence[int]) -> None:
        """Zero and drop everything from slot `lengths[row]` on, for the leading rows."""
        self.drop_tails(range(len(lengths)))
        for row, length in enumerate(lengths):
            self.filled[row] = min(self.filled[row], length)
            for tensor in self._tensors():
                tensor[row, :, length:] = 0

    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        return [tensor for tensor in (*self.keys, *self.values) if tensor is not None]

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """One layer's storage, allocated for states like these."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (self.num_rows, key.shape[1], self.capacity)
            with torch.inference_mode(False):  # storage outlives the pass and is written to outside of it
                keys = self._keys[layer] = key.new_zeros(*shape, key.shape[3])
                values = self._values[layer] = value.new_zeros(*shape, value.shape[3])
        return keys, values


class SharedWrite(Write):
    """A pass of one model over neighbouring rows of its store. A class: a generator would cost as much again as all it
    does, at every level of a draft.

    Args:
        first: storage row of the pass's first row.
        borrower: name of the model, where the store is another's.
    """

    def __init__(
        self,
        store: ModelStore,
        first: int,
        starts: Sequence[int],
        width: int,
        valid: Sequence[int] | None,
        num_layers: int,
        borrower: str | None = None,
    ):
        self._store, self._first, self._borrower = store, first, borrower
        self.store = store if first == 0 else None
        self.starts, self.width, self.valid, self.num_layers = starts, width, valid, num_layers
        longest = max(starts)
        self.read = longest + width
        self._start = longest if min(starts) == longest else None
        self._index: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> SharedWrite:
        self._store.make_room(self.read)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        real = [self.width] * len(self.starts) if self.valid is None else self.valid
        real = real if kind is None else [0] * len(real)
        self._store.have_written(self._first, self.starts, real, self._borrower)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._store.layer(layer, key, value)
        if len(self.starts) != len(keys):
            keys, values = (
                keys.narrow(0, self._first, len(self.starts)),
                values.narrow(0, self._first, len(self.starts)),
            )
        if self._start is not None:  # narrow() costs a third of an indexing expression, and this runs per layer
            keys.narrow(2, self._start, self.width).copy_(key)
            values.narrow(2, self._start, self.width).copy_(value)
        else:
            index, slots = self._places(key.device)
            keys[index, :, slots] = key.transpose(1, 2)
            values[index, :, slots] = value.transpose(1, 2)
        return keys.narrow(2, 0, self.read), values.narrow(2, 0, self.read)

    put = update

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows and slots of the new tokens, where rows start apart."""
        if self._index is None or self._index[1].device != device:
            slots = torch.tensor(list(self.starts))[:, None] + torch.arange(self.width)
            self._index = torch.arange(len(slots))[:, None].to(device), slots.to(device)
        return self._index

    def layout(self, like: Tensor) -> Layout:
        layout = self._store.layout(like)
        return layout if self._first == 0 else layout._replace(table=layout.table[self._first :])

    def row(self, row: int, width: int) -> Write:
        own = [self.width if self.valid is None else self.valid[row]]
        return SharedWrite(self._store, self._first + row, [self.starts[row]], width, own, self.num_layers).__enter__()
