"""Open sequences of a pool as the rows of forward passes: `KVCache` on pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

from specdec.kv.base import KVCache, PassCache, kept_slots
from specdec.kv.errors import CacheStateError
from specdec.kv.paged_write import PagedWrite
from specdec.kv.pool import DEFAULT_PAGE_SIZE, KVPool
from specdec.kv.pool_pages import PooledSequence, physical


class PagedKVCache(KVCache):
    """A list of open sequences of one pool, seen as the rows of a batch.

    Cheap to make: all state is the pool's, so several of these may look at the same sequences (a lane of requests that
    draft together, all lanes for the target's pass). Rows join and leave between passes by `join` and `leave`, or
    a new object is made.

    Args:
        pool: where the sequences live.
        sequences: ids of open sequences, one per row, each once.
        names: the pool's names of models whose name here differs, e.g. `{"draft": "draft-1b"}` where rows of one pool
            have different drafters.

    Attributes:
        sequences: ids per storage row; `sequences[:num_rows]` take part in passes, retired ones lie behind.

    Raises:
        CacheStateError: a sequence that is not open, or twice.
    """

    def __init__(self, pool: KVPool, sequences: Sequence[int] = (), names: Mapping[str, str] | None = None):
        self.pool, self.quantised = pool, pool.quantised
        self.sequences: list[int] = []
        self.num_rows = 0
        self._names = dict(names or {})
        for sequence in sequences:
            self.join(sequence)

    @classmethod
    def fresh(
        cls,
        num_layers: Mapping[str, int],
        num_rows: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        borrows: Mapping[str, str] = MappingProxyType({}),
    ) -> PagedKVCache:
        """Empty sequences in an unlimited pool of their own, which is never much larger than what they hold."""
        pool = KVPool(num_layers, page_size=page_size, first_pages=num_rows, borrows=borrows)
        return cls(pool, [pool.open() for _ in range(num_rows)])

    def join(self, sequence: int) -> int:
        """One more active row, behind the other active ones; returns its place."""
        self.pool.sequence(sequence)
        if sequence in self.sequences:
            raise CacheStateError(f"sequence {sequence} is row {self.sequences.index(sequence)} already")
        self.sequences.insert(self.num_rows, sequence)
        self.num_rows += 1
        return self.num_rows - 1

    def leave(self, row: int) -> int:
        """Take an active row out; the last active row takes its place. Returns the sequence's id; it stays open."""
        self.retire(row)
        return self.sequences.pop(self.num_rows)

    @property
    def lengths(self) -> list[int]:  # type: ignore[override]  # the pool's; read only here
        return [self.pool.length(sequence) for sequence in self.sequences]

    def filled(self, name: str) -> list[int]:
        name = self._name(name)
        return [self.pool.held(sequence, name) for sequence in self._active()]

    def row(self, row: int) -> PassCache:
        return PagedKVCache(self.pool, [self.sequences[row]], self._names)

    def writing(self, name: str, starts: Sequence[int], width: int, valid: Sequence[int] | None = None) -> PagedWrite:
        """See `PassCache.writing`. Padding columns take no slots.

        Raises:
            CacheStateError: a hole, or a wrong number of rows.
            OutOfPagesError: before anything was changed.
        """
        pool, known, rows = self.pool, self._name(name), self._active()
        owner = pool.owners[known]
        self._expect("start", starts)
        real = [width] * len(rows) if valid is None else valid
        for row, (sequence, start) in enumerate(zip(rows, starts, strict=True)):
            have = pool.held(sequence, known)
            if real[row] and start > have:
                raise CacheStateError(
                    f"row {row} of {name!r} holds {have} slots; writing at slot {start} would leave a hole: write the "
                    "missing tokens first"
                )
            if real[row] and owner != known and start < sequence.length:
                raise CacheStateError(
                    f"{name!r} reads the K/V of {owner!r} and may write behind its {sequence.length} committed slots "
                    f"only, not at slot {start} of row {row}"
                )
        spans = [(sequence, start, start + new) for sequence, start, new in zip(rows, starts, real, strict=True)]
        pool.pages.make_room(spans)

        def written(well: bool) -> None:
            for sequence, start, stop in spans:
                if stop > start:
                    sequence.have_written(owner, start, stop if well else None, None if owner == known else known)

        return PagedWrite(
            pool.stores[owner], spans, width, pool.num_layers[known], pool.allocator.refs, pool.index.published, written
        )

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """See `KVCache.commit`; pages behind the kept slots are free again."""
        self._expect("path", paths)
        pool, rows = self.pool, self._active()
        kept = {name: [_kept(row, path, name) for row, path in zip(rows, paths, strict=True)] for name in pool.stores}
        pool.pages.make_room(
            (row, row.length, row.length + len(slots))
            for column in kept.values()
            for row, slots in zip(rows, column, strict=True)
            if slots is not None and slots != list(range(len(slots)))
        )
        for name, column in kept.items():
            moves: list[tuple[int, int]] = []
            for row, slots in zip(rows, column, strict=True):
                if slots is None:
                    continue
                base = row.length
                moves += [
                    (physical(row, base + slot, pool.page_size), physical(row, base + i, pool.page_size))
                    for i, slot in enumerate(slots)
                    if slot != i
                ]
                row.filled[name] = base + len(slots)
            if moves:
                pool.stores[name].move(*zip(*moves, strict=True))
        for row, path in zip(rows, paths, strict=True):
            row.length += len(path)
            row.places.clear()
            row.tails.clear()
            pool.pages.trim(row)

    def place(self, name: str, slots: Sequence[Sequence[int]]) -> None:
        self._expect("slots", slots)
        if self.pool.owners[self._name(name)] != self._name(name):  # nothing of a borrower's tail is ever kept
            return
        for sequence, own in zip(self._active(), slots, strict=True):
            sequence.places[self._name(name)] = own

    def rollback(self) -> None:
        self.pool.rollback(self.sequences[: self.num_rows])

    def set_length(self, row: int, length: int) -> None:
        self.pool.set_length(self.sequences[row], length)

    def truncate(self, row: int, length: int) -> None:
        self.pool.truncate(self.sequences[row], length)

    def scrub(self, name: str) -> None:
        for sequence in self._active():
            self.pool.pages.scrub(sequence, self.pool.owners[self._name(name)])

    def forget(self, name: str) -> None:
        """See `KVCache.forget`. Other sequences that share pages with these lag from there, too."""
        if self.pool.owners[self._name(name)] != self._name(name):
            self.scrub(name)
            return
        self.pool.pages.forget([self.pool.sequence(sequence) for sequence in self.sequences], self._name(name))

    def retire(self, row: int) -> None:
        last = self.num_rows - 1
        if not 0 <= row <= last:
            raise CacheStateError(f"row {row} is not active; active rows are 0..{last}")
        rows = self.sequences
        rows[row], rows[last] = rows[last], rows[row]
        self.num_rows = last

    def revive(self) -> None:
        self.num_rows = len(self.sequences)

    def fork(self, repeats: int) -> None:
        """See `KVCache.fork`; the copies share every page until they part."""
        copies = [[own, *(self.pool.fork(own) for _ in range(repeats - 1))] for own in self.sequences]
        self.sequences = [sequence for row in copies for sequence in row]
        self.num_rows *= repeats

    def num_bytes(self) -> int:
        return self.pool.num_bytes()

    def layers(self, name: str, row: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """See `KVCache.layers`; these are copies."""
        sequence = self.pool.sequence(self.sequences[row])
        name = self._name(name)
        owner, count = self.pool.owners[name], self.pool.num_layers[name]
        stop = min(sequence.length, sequence.filled[owner])
        pages = sequence.pages[: -(-stop // self.pool.page_size)]
        yield from self.pool.stores[owner].read(pages, stop)[:count]

    def _active(self) -> list[PooledSequence]:
        return [self.pool.sequence(sequence) for sequence in self.sequences[: self.num_rows]]

    def _name(self, name: str) -> str:
        return self.pool.known(self._names.get(name, name))

    def _expect(self, what: str, given: Sequence[object]) -> None:
        if len(given) != self.num_rows:
            raise CacheStateError(
                f"expected {what if what == 'slots' else f'one {what}'} for each of {self.num_rows} active rows, got "
                f"{len(given)}"
            )


def _kept(sequence: PooledSequence, path: Sequence[int], name: str) -> list[int] | None:
    """Tail slots of model `name` to keep; None where it lags behind the tail, so that nothing of it is its own."""
    have, places = sequence.filled[name] - sequence.length, sequence.places.get(name)
    if places is None and len(path) <= have and list(path) == list(range(len(path))):  # as usual
        return list(path)
    return None if have < 0 else kept_slots(path, have, places)
