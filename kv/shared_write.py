"""Passes over contiguous storage: where each of them writes."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor

from specdec.kv.layout import Layout, check_layout
from specdec.kv.store import ModelStore
from specdec.kv.write import Write


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
        if kind is None:
            real = [self.width] * len(self.starts) if self.valid is None else self.valid
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
        store = self._store
        heads, slots, size = like.shape[1], store.capacity, like.shape[3]
        keys, values = zip(*(store.layer(layer, like, like) for layer in range(self.num_layers)), strict=True)
        check_layout((*keys, *values), (store.num_rows, heads, slots, size), like)
        strides = (slots, heads * slots * size, size, slots * size)
        return Layout(keys, values, strides, store.row_numbers[self._first :])

    def row(self, row: int, width: int) -> Write:
        own = [self.width if self.valid is None else self.valid[row]]
        return SharedWrite(self._store, self._first + row, [self.starts[row]], width, own, self.num_layers).__enter__()


class IndexedWrite(Write):
    """A pass whose places are a tensor, so that nothing of it is known to the host: what a CUDA graph records.

    It reads the whole storage of its rows.

    Args:
        slots: int64 `[rows, width]`.
    """

    def __init__(self, store: ModelStore, slots: Tensor):
        self._store, self._slots = store, slots
        self._rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        self.starts, self.width, self.valid = [0] * slots.shape[0], slots.shape[1], None
        self.read, self.num_layers = store.capacity, store.num_layers

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._store.layer(layer, key, value)
        keys[self._rows, :, self._slots] = key.transpose(1, 2)
        values[self._rows, :, self._slots] = value.transpose(1, 2)
        return keys[: self.num_rows], values[: self.num_rows]

    put = update

    def layout(self, like: Tensor) -> Layout:
        raise NotImplementedError("a pass over static buffers runs the model's modules")

    def row(self, row: int, width: int) -> Write:
        raise NotImplementedError("a pass over static buffers is of one shape")
