"""The block tables of a pool's sequences: sharing pages, parting from them, publishing them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from specdec.kv.errors import CacheStateError
from specdec.kv.paged_store import PagedStore
from specdec.kv.pages import PageAllocator
from specdec.kv.prefix import ROOT, PrefixIndex


@dataclass
class PooledSequence:
    """One text in a pool.

    Attributes:
        pages: the block table; page `i` holds slots `i * page_size ..`.
        length: committed tokens.
        filled: per model, leading slots with valid K/V (committed plus tail).
        agreed: leading slots whose tokens are the same for every holder of the pages they lie in, where those are
            shared. Never above `length`.
        published: leading pages known to be published.
        places: per model, tail slot of each node where it differs from the node's index.
        tails: per model, of each that borrows its storage, the slot behind its tail; absent where it has none.
    """

    pages: list[int] = field(default_factory=list)
    length: int = 0
    filled: dict[str, int] = field(default_factory=dict)
    agreed: int = 0
    published: int = 0
    places: dict[str, Sequence[int]] = field(default_factory=dict)
    tails: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def used(self) -> int:
        """Slots in which any model has written."""
        return max([0, *self.filled.values(), *(tail for tails in self.tails.values() for tail in tails.values())])

    def have_written(self, owner: str, start: int, stop: int | None, borrower: str | None) -> None:
        """A pass over the owner's storage, its own or a borrower's, has ended: from slot `start` on it holds nothing of
        the others' any more. Up to slot `stop` it holds what the pass wrote, if that ended well (not None)."""
        tails = self.tails.setdefault(owner, {})
        for name in tails.keys() - {borrower}:
            tails[name] = min(tails[name], start)
        if borrower is not None:
            self.filled[owner] = min(self.filled[owner], start)
        if stop is not None and borrower is None:
            self.filled[owner] = stop
        elif stop is not None and borrower is not None:
            tails[borrower] = stop


Span = tuple[PooledSequence, int, int]
"""(sequence, first slot, slot behind the last)."""


class SequencePages:
    """Everything that changes a block table. `stores` and `sequences` are the pool's own."""

    def __init__(
        self,
        allocator: PageAllocator,
        index: PrefixIndex,
        stores: Mapping[str, PagedStore],
        sequences: Mapping[int, PooledSequence],
        page_size: int,
    ):
        self._allocator = allocator
        self._index = index
        self._stores = stores
        self._sequences = sequences
        self._size = page_size

    def matched(self, tokens: Sequence[int]) -> PooledSequence:
        """A new sequence on the longest published beginning of `tokens`."""
        pages = self._index.match(tokens)
        for page in pages:
            self._allocator.share(page)
        slots = len(pages) * self._size
        filled = {}
        for name, store in self._stores.items():
            whole = (i for i, page in enumerate(pages) if store.settled[page] < self._size)
            filled[name] = next(whole, len(pages)) * self._size
        return PooledSequence(pages, slots, filled, agreed=slots, published=len(pages))

    def forked(self, sequence: PooledSequence) -> PooledSequence:
        """A second holder of every page."""
        sequence.agreed = sequence.length
        for i, page in enumerate(sequence.pages):
            self._settle(sequence, i)
            self._allocator.share(page)
        copy = PooledSequence(list(sequence.pages), sequence.length, dict(sequence.filled), sequence.agreed)
        copy.published = sequence.published
        copy.places = dict(sequence.places)
        copy.tails = {owner: dict(tails) for owner, tails in sequence.tails.items()}
        return copy

    def publish(self, sequence: PooledSequence, tokens: Sequence[int]) -> int:
        """See `KVPool.publish`; returns the number of published pages."""
        size = self._size
        whole = min(sequence.length, len(tokens), max(sequence.filled.values(), default=0)) // size
        known = min(sequence.published, len(tokens) // size)
        if known and self._index.published[sequence.pages[known - 1]][1] != tuple(
            tokens[(known - 1) * size : known * size]
        ):
            raise CacheStateError("expected the text that was published before; these tokens differ from it")
        for i in range(sequence.published, whole):
            own, before = sequence.pages[i], sequence.pages[i - 1] if i else ROOT
            part = tokens[i * size : (i + 1) * size]
            twin = self._index.find(before, part)
            if twin is None:
                if own in self._index.published:
                    raise CacheStateError("expected the text that was published before; these tokens differ from it")
                if not self._all_agree(sequence, i):
                    break
                self._settle(sequence, i)
                self._index.add(before, part, own)
            elif twin != own:
                if self._allocator.refs[own] > 1 or any(
                    store.settled[twin] < self._held(sequence, i, name) for name, store in self._stores.items()
                ):
                    break
                self._allocator.share(twin)
                self._allocator.release(own)
                sequence.pages[i] = twin
            sequence.published = i + 1
            sequence.agreed = max(sequence.agreed, (i + 1) * size)
        return sequence.published

    def _all_agree(self, sequence: PooledSequence, i: int) -> bool:
        """Do all holders of page `i` also hold the page before it, and agree on its tokens? Only then may it be
        published: such a page must live longer than those that continue it, and nobody may write to it."""
        page = sequence.pages[i]
        if self._allocator.refs[page] == 1:
            return True
        others = [other for other in self._sequences.values() if i < len(other.pages) and other.pages[i] == page]
        return all(
            other.agreed >= (i + 1) * self._size and other.pages[:i] == sequence.pages[:i]
            for other in others
            if other is not sequence
        )

    def _settle(self, sequence: PooledSequence, i: int) -> None:
        """Page `i` gets one more holder: from now on nobody writes the slots of agreed text that it holds already."""
        page = sequence.pages[i]
        shared = self._allocator.shared(page)
        for name, store in self._stores.items():
            held = self._held(sequence, i, name)
            store.settled[page] = max(store.settled[page], held) if shared else held

    def _held(self, sequence: PooledSequence, i: int, name: str) -> int:
        """Leading slots of page `i` with K/V of committed tokens."""
        return min(max(0, min(sequence.filled[name], sequence.length) - i * self._size), self._size)

    def wanted(self, spans: Iterable[Span]) -> int:
        """Pages that `make_room(spans)` takes."""
        new, copies = self._missing(spans)
        return len(new) + len(copies)

    def make_room(self, spans: Iterable[Span]) -> None:
        """Give every sequence pages for its span, its own ones wherever not all holders agree on what comes there.

        Raises:
            OutOfPagesError, torch.OutOfMemoryError: before anything was changed.
        """
        new, copies = self._missing(spans)
        if not new and not copies:
            return
        fresh = self._allocator.take(len(new) + len(copies))
        try:
            for store in self._stores.values():
                store.renew(fresh)
        except torch.OutOfMemoryError:
            for page in fresh:
                self._allocator.release(page)
            raise
        pages = iter(fresh)
        for sequence, i in copies:
            self._replace(sequence, i, next(pages))
        for sequence in new:
            sequence.pages.append(next(pages))

    def _missing(self, spans: Iterable[Span]) -> tuple[list[PooledSequence], list[tuple[PooledSequence, int]]]:
        """The sequences that need one more page (once for each), and the shared pages that must be copied."""
        new: list[PooledSequence] = []
        copies: list[tuple[PooledSequence, int]] = []
        left: Counter[int] = Counter()
        for sequence, start, stop in spans:
            if stop <= start:
                continue
            count = -(-stop // self._size)
            new += [sequence] * (count - len(sequence.pages))
            first = max(start, sequence.agreed)
            if first >= stop:
                continue
            for i in range(first // self._size, min(count, len(sequence.pages))):
                page = sequence.pages[i]
                if page in self._index.published or self._allocator.refs[page] - left[page] > 1:
                    copies.append((sequence, i))
                    left[page] += 1
        return new, copies

    def _replace(self, sequence: PooledSequence, i: int, copy: int) -> None:
        for store in self._stores.values():
            store.copy_page(sequence.pages[i], copy)
        self._allocator.release(sequence.pages[i])
        sequence.pages[i] = copy
        sequence.published = min(sequence.published, i)

    def cut(self, sequence: PooledSequence, length: int) -> None:
        """Forget everything from slot `length` on."""
        sequence.length = length
        sequence.agreed = min(sequence.agreed, length)
        sequence.published = min(sequence.published, length // self._size)
        self.drop_tail(sequence)

    def drop_tail(self, sequence: PooledSequence) -> None:
        sequence.places.clear()
        sequence.tails.clear()
        for name, held in sequence.filled.items():
            sequence.filled[name] = min(held, sequence.length)
        self.trim(sequence)

    def trim(self, sequence: PooledSequence) -> None:
        """Let go of pages no model has written to."""
        self.release_from(sequence, -(-sequence.used // self._size))

    def release_from(self, sequence: PooledSequence, first: int) -> None:
        """Let go of pages `first ..`, the last one first (see `PrefixIndex`)."""
        while len(sequence.pages) > first:
            self._allocator.release(sequence.pages.pop())
        sequence.published = min(sequence.published, first)

    def scrub(self, sequence: PooledSequence, name: str) -> None:
        """Zero what model `name` wrote behind the committed slots, in pages that are the sequence's own."""
        store, length = self._stores[name], sequence.length
        if sequence.used > length:
            self.make_room([(sequence, length, sequence.used)])
        sequence.tails.pop(name, None)
        sequence.filled[name] = min(sequence.filled[name], length)
        for i in range(length // self._size, len(sequence.pages)):
            if not self._allocator.shared(sequence.pages[i]):
                store.zero_slots(sequence.pages[i], max(0, length - i * self._size))

    def forget(self, sequences: Sequence[PooledSequence], name: str) -> None:
        """Zero and drop all that model `name` has of these sequences, also for others that share the pages."""
        store = self._stores[name]
        pages = {page for sequence in sequences for page in sequence.pages}
        store.zero_pages(sorted(pages))
        for sequence in self._sequences.values():
            shared = (i for i, page in enumerate(sequence.pages) if page in pages)
            first = next(shared, None)
            if first is not None:
                sequence.filled[name] = min(sequence.filled[name], first * self._size)
                sequence.tails.pop(name, None)
        for sequence in sequences:
            sequence.filled[name] = 0
            sequence.tails.pop(name, None)
            sequence.places.pop(name, None)


def physical(sequence: PooledSequence, slot: int, page_size: int) -> int:
    """Where a slot of a sequence lies in the storage."""
    return sequence.pages[slot // page_size] * page_size + slot % page_size


def pieces(start: int, stop: int, page_size: int) -> Iterator[tuple[int, int, int]]:
    """The parts of `[start, stop)` page by page: (index in the block table, first and last-plus-one slot in it)."""
    if stop <= start:  # also in a page that does not exist yet
        return
    for i in range(start // page_size, -(-stop // page_size)):
        yield i, max(start - i * page_size, 0), min(stop - i * page_size, page_size)
