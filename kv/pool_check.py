"""The bookkeeping of a pool, held against itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from specdec.kv.errors import CacheStateError
from specdec.kv.paged_store import PagedStore
from specdec.kv.pages import ZERO_PAGE, PageAllocator
from specdec.kv.pool_pages import PooledSequence
from specdec.kv.prefix import ROOT, PrefixIndex


class Bookkeeping(Protocol):
    """What is checked of a `KVPool`."""

    page_size: int
    index: PrefixIndex
    allocator: PageAllocator

    @property
    def num_pages(self) -> int | None: ...

    @property
    def stores(self) -> Mapping[str, PagedStore]: ...

    @property
    def sequences(self) -> Mapping[int, PooledSequence]: ...


def check_pool(pool: Bookkeeping) -> None:
    """See `KVPool.check_integrity`."""
    _check_pages(pool)
    _check_index(pool)
    for number, sequence in pool.sequences.items():
        _check_sequence(pool, number, sequence)
    for name, store in pool.stores.items():
        for tensor in (*store.keys, *store.values):
            _require(tensor is None or not bool(tensor[ZERO_PAGE].any()), f"the page of zeros of {name!r} is not zero")


def _check_pages(pool: Bookkeeping) -> None:
    allocator, resting = pool.allocator, pool.index.resting
    holders = Counter(page for sequence in pool.sequences.values() for page in sequence.pages)
    free = allocator.free_pages
    made = range(1, allocator.num_made + 1)
    for page in made:
        _require(
            allocator.refs[page] == holders[page],
            f"page {page}: counted {allocator.refs[page]} holders, {holders[page]} sequences hold it",
        )
    held = [page for page in made if holders[page]]
    everything = sorted([*free, *resting, *held])
    _require(everything == list(made), f"pages free, resting and held are {everything}, expected each of {made} once")
    _require(set(holders) <= set(made), f"sequences hold pages {sorted(set(holders) - set(made))} that do not exist")
    _require(allocator.num_held == len(held), f"counted {allocator.num_held} held pages, there are {len(held)}")
    limit = pool.num_pages
    _require(limit is None or allocator.num_made <= limit, f"{allocator.num_made} pages made, the limit is {limit}")


def _check_index(pool: Bookkeeping) -> None:
    index, published = pool.index, pool.index.published
    for page in published:
        before, tokens = index.published[page]
        _require(index.find(before, tokens) == page, f"page {page} is not found under its own text")
        _require(len(tokens) == pool.page_size, f"page {page} is published with {len(tokens)} tokens")
        _require(
            before == ROOT or before in index.published, f"page {page} follows page {before}, which is not published"
        )
    order = {page: place for place, page in enumerate(index.resting)}
    for page in published:
        _require((page in order) == (pool.allocator.refs[page] == 0), f"page {page} rests although it is held")
        before = index.published[page][0]
        if before in order:
            _require(order.get(page, len(order)) < order[before], f"page {before} would go before page {page}")


def _check_sequence(pool: Bookkeeping, number: int, sequence: PooledSequence) -> None:
    size, pages = pool.page_size, sequence.pages
    room = len(pages) * size
    where = f"sequence {number}"
    _require(len(set(pages)) == len(pages), f"{where} holds a page twice: {pages}")
    _require(max(sequence.filled.values(), default=0) <= room, f"{where} filled {sequence.filled} of {room} slots")
    _require(min(sequence.filled.values(), default=0) >= 0, f"{where} filled {sequence.filled}")
    _require(set(sequence.filled) == set(pool.stores), f"{where} knows the models {sorted(sequence.filled)}")
    _require(0 <= sequence.agreed <= sequence.length, f"{where}: {sequence.agreed} agreed of {sequence.length} slots")
    _require(sequence.published * size <= sequence.agreed, f"{where}: more is published than agreed")
    _require(
        all(page in pool.index.published for page in pages[: sequence.published]), f"{where}: not all is published"
    )
    for i, page in enumerate(pages):
        if page in pool.index.published:
            before = pool.index.published[page][0]
            _require(before == (pages[i - 1] if i else ROOT), f"{where}: page {page} follows another than {before}")
            _require(sequence.agreed >= min((i + 1) * size, sequence.length), f"{where} does not agree on page {page}")
        if not pool.allocator.shared(page):
            continue
        for name, store in pool.stores.items():
            held = min(sequence.filled[name], sequence.agreed) - i * size
            _require(store.settled[page] >= min(held, size), f"{where}: page {page} of {name!r} may be overwritten")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise CacheStateError(f"pool integrity: {message}")
