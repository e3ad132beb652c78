"""Passes over sequences of a pool: which slots they write, which pages they read."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from types import TracebackType

import torch
from torch import Tensor

from specdec.kv.layout import Layout
from specdec.kv.paged_store import PagedStore
from specdec.kv.pages import ZERO_PAGE
from specdec.kv.pool_pages import Span, pieces
from specdec.kv.write import Write


class PagedWrite(Write):
    """A pass whose pages exist already, and what is true once it has run.

    In a page that is shared, all slots of a span are agreed text (else the page would have been copied). What the model
    holds there already stays as it is; the rest is written by the first row of the pass that has it.

    Args:
        spans: per row of the pass, the sequence and the slots of its real columns; padding columns are not stored.
        holders: of every page, how many sequences hold it. published: pages whose text the pool knows. Where there are
            several, or it is, no single holder may change a page.
        written: told when the pass has ended, and whether it ended well.
    """

    def __init__(
        self,
        store: PagedStore,
        spans: Sequence[Span],
        width: int,
        num_layers: int,
        holders: Sequence[int],
        published: Container[int],
        written: Callable[[bool], None],
    ):
        self._store, self._spans, self._written = store, spans, written
        self._holders, self._published = holders, published
        self.quantised = store.quantised
        self.starts, self.width, self.num_layers = [start for _, start, _ in spans], width, num_layers
        self.valid = [max(0, stop - start) for _, start, stop in spans]
        self.read = max(self.starts, default=0) + width
        self._settled: dict[int, int] = {}
        slots: list[int] = []
        columns: list[int] = []
        size = store.page_size
        for row, (sequence, start, stop) in enumerate(spans):
            for i, first, last in pieces(start, stop, size):
                page = sequence.pages[i]
                if holders[page] > 1 or page in published:
                    have = self._settled.get(page, store.settled[page])
                    if first <= have:
                        self._settled[page] = max(have, last)
                        first = min(max(first, have), last)
                slots += range(page * size + first, page * size + last)
                columns += range(row * width + i * size + first - start, row * width + i * size + last - start)
        count = -(-self.read // size)
        tables = [
            sequence.pages[:count] + [ZERO_PAGE] * (count - len(sequence.pages)) for sequence, _, _ in spans
        ]  # fmt: skip
        whole = len(columns) == len(spans) * width
        self._pages = torch.tensor(tables, dtype=torch.int64)
        self.table = None if self.quantised else self._pages
        self._slots = torch.tensor(slots, dtype=torch.int64)
        self._columns = None if whole else torch.tensor(columns, dtype=torch.int64)

    def __enter__(self) -> PagedWrite:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            for page, count in self._settled.items():  # what it wrote to shared pages is there for every holder
                self._store.settled[page] = count
        self._written(kind is None)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._put(layer, key, value)
        return self._gathered(keys), self._gathered(values)

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self.quantised:
            return self.update(layer, key, value)
        keys, values = self._put(layer, key, value)
        return keys.transpose(1, 2), values.transpose(1, 2)

    def _put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's new states; all its pages, `[pages, page_size, kv_heads, head_dim]`."""
        self._move_to(key.device)
        both = self._store.layer(layer, key, value)
        for storage, states in zip(both, (key, value), strict=True):
            new = states.transpose(1, 2).flatten(0, 1)
            self._store.put(storage, self._slots, new if self._columns is None else new[self._columns])
        return both

    def _move_to(self, device: torch.device) -> None:
        if self._slots.device != device:
            self._slots, self._pages = self._slots.to(device), self._pages.to(device)
            self.table = None if self.table is None else self._pages
            self._columns = None if self._columns is None else self._columns.to(device)

    def _gathered(self, storage: Tensor) -> Tensor:
        read = self._store.gathered(storage, self._pages.flatten())
        return read.view(len(self.starts), -1, *read.shape[2:])[:, : self.read].transpose(1, 2)

    def layout(self, like: Tensor) -> Layout:
        storage = self._store.layout(like)
        targets = self._slots * storage.strides[2]
        if self._columns is not None:
            spread = torch.full((len(self.starts) * self.width,), -1, dtype=torch.int64)
            targets = spread.index_copy_(0, self._columns, targets)
        return storage._replace(table=self._pages, targets=targets)

    def row(self, row: int, width: int) -> Write:
        return PagedWrite(
            self._store, [self._spans[row]], width, self.num_layers, self._holders, self._published, _nothing
        )


def _nothing(well: bool) -> None:
    """The whole pass says what it has written."""
