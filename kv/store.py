"""One model's K/V inside the shared cache: plain preallocated tensors, grown by doubling, never concatenated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


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
        self.places: list[Sequence[int] | None] | None = None
        """Tail slot of each node, per active row, where they differ (see `KVCache.place`)."""
        self.borrowed: dict[str, list[int]] = {}
        """Of each model that borrows this storage, per row: the slot behind its own tail, 0 where it has none."""
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

    def make_room(self, slots: int) -> None:
        """Before a pass that reads so many slots: rows lie where they should, and storage is long enough."""
        self._settle()
        if slots <= self.capacity:
            return
        doubled = 2 * self.capacity if self.most is None else min(2 * self.capacity, self.most)
        self.capacity = max(doubled, slots)
        used = max(map(self._used, range(self.num_rows)))
        for tensors in (self.keys, self.values):
            for i, old in enumerate(tensors):
                if old is not None:
                    new = old.new_zeros(*old.shape[:2], self.capacity, old.shape[3])
                    new[:, :, :used] = old[:, :, :used]
                    tensors[i] = new

    def have_written(self, first: int, starts: Sequence[int], real: Sequence[int], borrower: str | None) -> None:
        """A pass has ended well: from row `first` on, `real[b]` tokens lie in slots from `starts[b]` on.

        They are the owner's, or a borrower's. Slots that were the other's hold nothing of it any more.
        """
        for row, (start, new) in enumerate(zip(starts, real, strict=True), first):
            if not new:
                continue
            for name, tails in self.borrowed.items():
                tails[row] = start + new if name == borrower else min(tails[row], start)
            self.filled[row] = start + new if borrower is None else min(self.filled[row], start)

    def drop_tails(self, rows: Iterable[int]) -> None:
        """Forget the borrowers' tails in these rows."""
        for tails in self.borrowed.values():
            for row in rows:
                tails[row] = 0

    def _used(self, row: int) -> int:
        """Slots of a row that hold anything."""
        return max([self.filled[row], *(tails[row] for tails in self.borrowed.values())])

    @property
    def row_numbers(self) -> torch.Tensor:
        """Int64 `[>= rows, 1]`: every row is one page of a table."""
        if len(self._row_numbers) < self.num_rows:
            self._row_numbers = torch.arange(self.num_rows)[:, None]
        return self._row_numbers

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
        self.num_rows *= repeats
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

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (*self.keys, *self.values) if tensor is not None]

    def layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One layer's storage, allocated for states like these."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            shape = (self.num_rows, key.shape[1], self.capacity)
            with torch.inference_mode(False):  # storage outlives the pass and is written to outside of it
                keys = self._keys[layer] = key.new_zeros(*shape, key.shape[3])
                values = self._values[layer] = value.new_zeros(*shape, value.shape[3])
        return keys, values
