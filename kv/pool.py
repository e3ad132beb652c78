"""The paged layout: one pool of pages, one block table per sequence, storage for every model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from transformers import PreTrainedModel

from specdec.kv.base import owners_of
from specdec.kv.errors import CacheStateError
from specdec.kv.limits import MOST_PAGES, checked_count
from specdec.kv.paged_store import PagedStore
from specdec.kv.pages import PageAllocator
from specdec.kv.pool_check import check_pool
from specdec.kv.pool_pages import PooledSequence, SequencePages
from specdec.kv.pool_size import DEFAULT_PAGE_SIZE, checked_page_size, pages_within
from specdec.kv.prefix import PrefixIndex, Tokens, plain
from specdec.kv.quantised import Quantised
from specdec.kv.support import num_cache_layers


class KVPool:
    """K/V of many sequences, and of several models for each of them, in pages that are handed out as texts grow.

    A sequence has one block table, one length and one tail for all models: same tokens, same positions. Each model has
    its own tensors, addressed by the same page numbers, and may lag. Slots mean what they mean in `KVCache`: slot ==
    position for committed tokens, node `i` of a draft lies in slot `length + i` until commit or rollback.

    Pages may be shared. `fork` shares all pages of a sequence, `open` those that hold the beginning of the text and
    were published. A shared page is copied before a write that not all its holders agree on (copy-on-write); where they
    agree on the tokens (a drafter catching up on a shared prompt), it is written once, in place, for all.

    The pool checks neither tokens nor models: `open`, `publish` and `close` must be told the true text.

    Args:
        num_layers: per model name, how many layers its cache has, e.g. `{"target": 32, "draft": 16}`.
        num_pages: pages the pool may use; None lets it grow without a limit. `KVPool.sized` takes bytes instead.
        page_size: slots per page, 1 to 256.
        first_pages: pages an unlimited pool allocates at first.
        borrows: models without storage of their own, and whose they read and write their tails to (see `KVCache`).
        quantised: keep K/V of all models in 8 bits: lossy.

    Attributes:
        owners: whose storage each model uses.
        sharing: whether published prefixes are found. Set it to False where K/V of the same text may be another one.

    Raises:
        UnsupportedArgumentError: page size or number of pages out of range.

    Example:
        pool = KVPool.sized({"target": target, "draft": draft}, num_bytes=4 << 30)
        row = pool.open(prompt[:-1])                     # shares what is there; pool.filled(row, "target") is done
        cache = PagedKVCache(pool, [row, *others])       # the rows of one forward pass
        ...                                              # prefill through cache.writing(...), cache.set_length(...)
        pool.publish(row, prompt[:-1])                   # others may share it from now on
        ...                                              # steps: a tree pass, then cache.commit(paths)
        pool.close(row, text[:-1])
    """

    def __init__(
        self,
        num_layers: Mapping[str, int],
        num_pages: int | None = None,
        page_size: int = DEFAULT_PAGE_SIZE,
        first_pages: int = 64,
        borrows: Mapping[str, str] = MappingProxyType({}),
        quantised: Quantised | None = None,
    ):
        page_size = checked_page_size(page_size)
        if num_pages is not None:
            num_pages = checked_count("num_pages", num_pages, 1, MOST_PAGES, "give at least 1, or None for no limit")
        first_pages = checked_count("first_pages", first_pages, 1, MOST_PAGES)
        self.page_size, self.quantised = page_size, quantised
        self._limit = num_pages
        self._first_pages = first_pages if num_pages is None else num_pages
        self._next = 0
        self.sharing = True
        self.index = PrefixIndex(page_size)
        self.allocator = PageAllocator(num_pages, self.index)
        self.stores: dict[str, PagedStore] = {}
        self.sequences: dict[int, PooledSequence] = {}
        self.pages = SequencePages(self.allocator, self.index, self.stores, self.sequences, page_size)
        self.owners, self.num_layers = owners_of(num_layers, borrows), dict(num_layers)
        for name, count in num_layers.items():
            if name not in borrows:
                self.add_model(name, count)

    @classmethod
    def sized(
        cls,
        models: Mapping[str, PreTrainedModel],
        num_bytes: int,
        page_size: int = DEFAULT_PAGE_SIZE,
        borrows: Mapping[str, str] = MappingProxyType({}),
        quantised: Quantised | None = None,
    ) -> KVPool:
        """A pool for these models, and for those that borrow from them, with as many pages as fit `num_bytes`.

        A token's bytes are measured by running each model over one token.

        Raises:
            UnsupportedArgumentError: not even one page fits, or more than the models' device has memory for.
        """
        layers = {name: num_cache_layers(model) for name, model in models.items()}
        layers |= {name: layers[owner] for name, owner in borrows.items()}
        num_pages = pages_within(models, num_bytes, page_size, quantised)
        return cls(layers, num_pages, page_size, borrows=borrows, quantised=quantised)

    def add_model(self, name: str, num_layers: int) -> None:
        """One more model over the same sequences; it lags behind all of them."""
        if name in self.stores or self.owners.get(name, name) != name:
            raise CacheStateError(f"the pool already has a model {name!r}")
        pages = max(self._first_pages, self.allocator.num_made)
        self.owners[name], self.num_layers[name] = name, num_layers
        self.stores[name] = PagedStore(num_layers, self.page_size, pages, self._limit, self.quantised)
        for sequence in self.sequences.values():
            sequence.filled[name] = 0

    def open(self, tokens: Tokens = ()) -> int:
        """A new sequence, of which the longest published beginning of `tokens` is committed already.

        Pass the tokens whose K/V is wanted: the prompt without its last token, which is the root of the first step.

        Returns:
            the sequence's id. `length(id)` tokens (a multiple of the page size) are there; `filled(id, name)` says how
            many of them each model has.
        """
        return self._enter(self.pages.matched(plain(tokens) if self.sharing else ()))

    def fork(self, sequence: int) -> int:
        """A second sequence with the same text, sharing every page; pages are copied when the two part."""
        return self._enter(self.pages.forked(self.sequence(sequence)))

    def close(self, sequence: int, tokens: Tokens = ()) -> None:
        """Forget a sequence. With `tokens`, its text, its full pages are published first: whoever opens the same text
        finds them as long as no one needs their place."""
        self.publish(sequence, tokens)
        self.pages.release_from(self.sequences.pop(sequence), 0)

    def publish(self, sequence: int, tokens: Tokens) -> int:
        """Let other sequences share the full pages of committed text.

        Where another page with the same text is published already and holds all that this one holds, the sequence goes
        over to it. Cheap to repeat: pages that are published are not looked at again.

        Args:
            tokens: the sequence's text from its beginning, as far as the caller wants it shared; tokens that are not
                committed, or whose K/V no model holds, are ignored.

        Returns:
            how many leading tokens of the sequence are published now.

        Raises:
            CacheStateError: not the text that was published before.
        """
        found = self.sequence(sequence)
        return self.pages.publish(found, plain(tokens)) * self.page_size if self.sharing else 0

    def match_prefix(self, tokens: Tokens) -> int:
        """How many leading tokens `open(tokens)` would find committed. Changes nothing."""
        return len(self.index.match(plain(tokens))) * self.page_size if self.sharing else 0

    def length(self, sequence: int) -> int:
        """Committed tokens."""
        return self.sequence(sequence).length

    def filled(self, sequence: int, name: str) -> int:
        """Leading slots that hold valid K/V of model `name` (committed plus tail)."""
        return self.held(self.sequence(sequence), self.known(name))

    def held(self, sequence: PooledSequence, name: str) -> int:
        """See `filled`; of a borrower, what it can read: the owner's committed slots, and its own tail."""
        owner = self.owners[name]
        if owner == name:
            return sequence.filled[name]
        return sequence.tails.get(owner, {}).get(name) or min(sequence.filled[owner], sequence.length)

    def set_length(self, sequence: int, length: int) -> None:
        """Declare `length` committed tokens; models may lag behind. Of more than these, the rest is forgotten."""
        found = self.sequence(sequence)
        if length < found.length:
            self.pages.cut(found, length)
        found.length = length

    def truncate(self, sequence: int, length: int) -> None:
        """Forget committed slots from `length` on."""
        found = self.sequence(sequence)
        if length > found.length:
            raise CacheStateError(
                f"sequence {sequence} holds {found.length} committed tokens, cannot truncate to {length}"
            )
        self.pages.cut(found, length)

    def extend(self, sequence: int, count: int) -> None:
        """Reserve pages for the next `count` slots behind the committed text, so that no pass over them can fail for
        want of pages. Commit and rollback give back what was not used.

        Raises:
            OutOfPagesError: too few pages; nothing was taken.
        """
        found = self.sequence(sequence)
        self.pages.make_room([(found, found.length, found.length + count)])

    def pages_wanted(self, sequence: int, count: int) -> int:
        """Pages that `extend(sequence, count)` would take from the free ones."""
        found = self.sequence(sequence)
        return self.pages.wanted([(found, found.length, found.length + count)])

    def rollback(self, sequences: Iterable[int] | None = None) -> None:
        """Drop the tails of these sequences (default: of all), and give back reserved pages."""
        for sequence in list(self.sequences) if sequences is None else sequences:
            self.pages.drop_tail(self.sequence(sequence))

    def evict(self, count: int | None = None) -> int:
        """Free unreferenced prefixes, least recently used first (default: all); returns the number of pages freed.

        Never needed to make room: pages that nobody references count as free and are taken when no others are left.
        """
        return self.allocator.evict(self.index.num_resting if count is None else count)

    def reset(self) -> None:
        """Forget every sequence and every published prefix, for callers interrupted in the middle of a change, or
        whose models have changed. Storage follows if these now write K/V of another dtype or place."""
        for store in self.stores.values():
            store.reset()
        self.sequences.clear()
        self.index = PrefixIndex(self.page_size)
        self.allocator = PageAllocator(self._limit, self.index)
        self.pages = SequencePages(self.allocator, self.index, self.stores, self.sequences, self.page_size)

    def check_integrity(self) -> None:
        """Hold every count against every other: holders, free and resting pages, the chain of published prefixes,
        lengths and block tables.

        Raises:
            CacheStateError: naming the first disagreement.
        """
        check_pool(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The models."""
        return tuple(self.owners)

    @property
    def num_pages(self) -> int | None:
        """Pages the pool may use; None: no limit."""
        return self._limit

    @property
    def num_free_pages(self) -> int:
        """Pages that can be had now: unused ones and unreferenced prefixes."""
        return self.allocator.num_free

    @property
    def num_held_pages(self) -> int:
        """Pages that open sequences hold, each counted once."""
        return self.allocator.num_held

    @property
    def num_resting_pages(self) -> int:
        """Published pages that no sequence holds."""
        return self.index.num_resting

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all models; 0 before they first write."""
        return sum(store.page_bytes for store in self.stores.values())

    @property
    def bytes_held(self) -> int:
        """Bytes of K/V that open sequences hold, shared pages counted once."""
        return self.num_held_pages * self.page_bytes

    @property
    def peak_bytes_held(self) -> int:
        """The most `bytes_held` has been."""
        return self.allocator.peak_held * self.page_bytes

    def num_bytes(self) -> int:
        """Bytes allocated for K/V of all models (a limited pool allocates its budget at once)."""
        return sum(store.num_bytes() for store in self.stores.values())

    def sequence(self, sequence: int) -> PooledSequence:
        """What the pool knows of an open sequence."""
        found = self.sequences.get(sequence)
        if found is None:
            raise CacheStateError(f"expected an open sequence, got {sequence}; open are {sorted(self.sequences)}")
        return found

    def known(self, name: str) -> str:
        if name not in self.owners:
            raise CacheStateError(f"expected one of the pool's models {list(self.owners)}, got {name!r}")
        return name

    def _enter(self, sequence: PooledSequence) -> int:
        self._next += 1
        self.sequences[self._next] = sequence
        return self._next
