"""The contiguous layout: one object, one set of lengths, storage for every model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

from specdec.kv.base import KVCache, PassCache, kept_slots, owners_of
from specdec.kv.errors import CacheStateError
from specdec.kv.store import ModelStore, SharedWrite

INITIAL_SLOTS = 256
"""Slots allocated at first; storage doubles from there."""


class SharedKVCache(KVCache):
    """Contiguous `KVCache` for any number of models over the same rows.

    Args:
        num_layers: per model name, how many layers its cache has, e.g. `{"target": 32, "draft": 16}`.
        num_rows: sequences in the batch.
        capacity: slots to allocate at first (grows by doubling).
        most: slots no row is expected to outgrow, if known: doubling stops there (a row that does outgrow it is given
            just what it needs).
        borrows: models without storage of their own, and whose they read and write their tails to (see `KVCache`).

    Example (one row, chain of two drafted tokens, the first one accepted):
        lengths [5], tail = root, a, b in slots 5, 6, 7  ->  commit([[0, 1]])  ->  lengths [7], slot 7 is free again.
    """

    def __init__(
        self,
        num_layers: Mapping[str, int],
        num_rows: int,
        capacity: int = INITIAL_SLOTS,
        most: int | None = None,
        borrows: Mapping[str, str] = MappingProxyType({}),
    ):
        self.num_rows = num_rows
        self.lengths = [0] * num_rows
        self._layers, self._owners = dict(num_layers), owners_of(num_layers, borrows)
        self._stores = {
            name: ModelStore(count, num_rows, capacity, most)
            for name, count in num_layers.items()
            if name not in borrows
        }
        for name, owner in borrows.items():
            self._stores[owner].borrowed[name] = [0] * num_rows

    def filled(self, name: str) -> list[int]:
        store = self._stores[self._owners[name]]
        if self._owners[name] == name:
            return store.filled[: self.num_rows]
        return [self._held(store, name, row) for row in range(self.num_rows)]

    def writing(
        self,
        name: str,
        starts: Sequence[int],
        width: int,
        valid: Sequence[int] | None = None,
        only: int | None = None,
    ) -> SharedWrite:
        owner = self._owners[name]
        store, borrows = self._stores[owner], owner != name
        first, count = (0, self.num_rows) if only is None else (only, 1)
        if len(starts) != count:
            raise CacheStateError(f"expected one start for each of {count} active rows, got {len(starts)}")
        for row, start in enumerate(starts, first):
            if valid is not None and not valid[row - first]:
                continue
            have = self._held(store, name, row) if borrows else store.filled[row]
            if start > have:
                raise CacheStateError(
                    f"row {row} of {name!r} holds {have} slots; writing at slot {start} would leave a hole: write the "
                    "missing tokens first"
                )
            if borrows and start < self.lengths[row]:
                raise CacheStateError(
                    f"{name!r} reads the K/V of {owner!r} and may write behind its {self.lengths[row]} committed slots "
                    f"only, not at slot {start} of row {row}"
                )
        return SharedWrite(store, first, starts, width, valid, self._layers[name], name if borrows else None)

    def _held(self, store: ModelStore, name: str, row: int) -> int:
        """Leading slots of a row that a borrower can read: the owner's committed ones, and its own tail."""
        return store.borrowed[name][row] or min(store.filled[row], self.lengths[row])

    def row(self, row: int) -> PassCache:
        return OneRow(self, row)

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        if len(paths) != self.num_rows:
            raise CacheStateError(f"expected one path for each of {self.num_rows} active rows, got {len(paths)}")
        for store in self._stores.values():
            rows: list[int] = []
            sources: list[list[int]] = []
            targets: list[list[int]] = []
            for row, path in enumerate(paths):
                base = self.lengths[row]
                if store.filled[row] < base:  # this model lags behind the tail: nothing of the tail is its own
                    continue
                have = store.filled[row] - base
                if store.places is None and len(path) <= have and list(path) == list(range(len(path))):  # as usual
                    store.filled[row] = base + len(path)
                    continue
                slots = kept_slots(path, have, None if store.places is None else store.places[row])
                moved = [i for i, slot in enumerate(slots) if slot != i]
                if moved:
                    rows.append(row)
                    sources.append([base + slots[i] for i in moved])
                    targets.append([base + i for i in moved])
                store.filled[row] = base + len(slots)
            store.drop_tails(range(self.num_rows))
            store.places = None
            if rows:
                store.gather(rows, sources, targets)
        for row, path in enumerate(paths):
            self.lengths[row] += len(path)

    def place(self, name: str, slots: Sequence[Sequence[int]]) -> None:
        if len(slots) != self.num_rows:
            raise CacheStateError(f"expected slots for each of {self.num_rows} active rows, got {len(slots)}")
        if self._owners[name] == name:  # nothing of a borrower's tail is ever kept
            self._stores[name].places = list(slots)

    def rollback(self) -> None:
        for store in self._stores.values():
            store.places = None
            store.drop_tails(range(self.num_rows))
            for row in range(self.num_rows):
                store.filled[row] = min(store.filled[row], self.lengths[row])

    def truncate(self, row: int, length: int) -> None:
        if length > self.lengths[row]:
            raise CacheStateError(f"row {row} holds {self.lengths[row]} committed tokens, cannot truncate to {length}")
        self.lengths[row] = length
        for store in self._stores.values():
            store.cut(row, length)

    def set_length(self, row: int, length: int) -> None:
        """Declare `length` committed tokens after a prefill or an adopted cache (models may lag)."""
        self.lengths[row] = length

    def scrub(self, name: str) -> None:
        self._stores[self._owners[name]].scrub(self.lengths[: self.num_rows])

    def forget(self, name: str) -> None:
        if self._owners[name] == name:
            self._stores[name].clear()
        else:
            self.scrub(name)

    def retire(self, row: int) -> None:
        last = self.num_rows - 1
        if not 0 <= row <= last:
            raise CacheStateError(f"row {row} is not active; active rows are 0..{last}")
        if row != last:
            for store in self._stores.values():
                store.swap(row, last)
            self.lengths[row], self.lengths[last] = self.lengths[last], self.lengths[row]
        self.num_rows = last

    def revive(self) -> None:
        self.num_rows = len(self.lengths)

    def fork(self, repeats: int) -> None:
        self.num_rows *= repeats
        self.lengths = [length for length in self.lengths for _ in range(repeats)]
        for store in self._stores.values():
            store.fork(repeats)

    def layers(self, name: str, row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        store = self._stores[self._owners[name]]
        stop, count = min(self.lengths[row], store.filled[row]), self._layers[name]
        for keys, values in zip(store.keys[:count], store.values[:count], strict=True):
            if keys is None or values is None:
                return
            yield keys[row, :, :stop], values[row, :, :stop]

    def store(self, name: str) -> ModelStore:
        """The raw storage of one model (exchange with `transformers` caches, audits)."""
        return self._stores[self._owners[name]]

    def num_bytes(self) -> int:
        return sum(store.num_bytes() for store in self._stores.values())


class OneRow(PassCache):
    """One active row of a `SharedKVCache`, valid until rows move. Passes through it touch no other row."""

    def __init__(self, cache: SharedKVCache, row: int):
        self.num_rows = 1
        self.lengths = [cache.lengths[row]]
        self._cache = cache
        self._row = row

    def row(self, row: int) -> PassCache:
        assert row == 0, "one row has no other"
        return self

    def writing(self, name: str, starts: Sequence[int], width: int, valid: Sequence[int] | None = None) -> SharedWrite:
        return self._cache.writing(name, starts, width, valid, only=self._row)
