"""Pages of a KV pool: which are free, and how many sequences hold each of the others."""

from __future__ import annotations

import sys

from specdec.kv.errors import OutOfPagesError
from specdec.kv.prefix import PrefixIndex

ZERO_PAGE = 0
"""Read in place of pages a row does not have; never written, never handed out."""


class PageAllocator:
    """Hands out page numbers and counts their holders.

    A page is *free*, *held* (by `refs[page] > 0` sequences), or *resting* (published in `index`, held by none; it is
    evicted when no free page is left). Numbers are used from 1 up, so storage needs to reach to `num_made` only.

    Args:
        num_pages: most pages there may be; None for no limit.
        index: published pages.
    """

    def __init__(self, num_pages: int | None, index: PrefixIndex):
        self.num_pages = sys.maxsize if num_pages is None else num_pages
        self.refs = [0]
        self._index = index
        self._free: list[int] = []
        self.peak_held = 0
        """Most pages that sequences held at any time."""

    @property
    def num_made(self) -> int:
        """Pages ever handed out; their numbers are `1 .. num_made`."""
        return len(self.refs) - 1

    @property
    def num_free(self) -> int:
        """Pages that can be had now, resting ones included."""
        return self.num_pages - self.num_held

    @property
    def num_held(self) -> int:
        return self.num_made - len(self._free) - self._index.num_resting

    @property
    def free_pages(self) -> list[int]:
        """Pages that were handed out before and are free again."""
        return list(self._free)

    def require(self, count: int) -> None:
        """Raises OutOfPagesError if `count` pages cannot be had."""
        if count > self.num_free:
            raise OutOfPagesError(count, self.num_free, self.num_pages)

    def take(self, count: int) -> list[int]:
        """`count` pages with one holder each; the pages that have rested longest are evicted when they must be.

        Raises:
            OutOfPagesError: too few; none was taken.
        """
        self.require(count)
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            elif self.num_made < self.num_pages:
                page = len(self.refs)
                self.refs.append(0)
            else:
                page = self._index.evict()
            self.refs[page] = 1
            pages.append(page)
        self.peak_held = max(self.peak_held, self.num_held)
        return pages

    def share(self, page: int) -> None:
        """One more sequence holds a held or resting page."""
        if self.refs[page] == 0:
            self._index.wake(page)
            self.peak_held = max(self.peak_held, self.num_held)
        self.refs[page] += 1

    def release(self, page: int) -> None:
        """A sequence lets go of a page; without another holder it rests if it is published, else it is free."""
        assert self.refs[page] > 0, f"page {page} is held by nobody"
        self.refs[page] -= 1
        if self.refs[page]:
            return
        if page in self._index.published:
            self._index.rest(page)
        else:
            self._free.append(page)

    def evict(self, count: int) -> int:
        """Free up to `count` resting pages; returns how many there were."""
        count = min(count, self._index.num_resting)
        self._free.extend(self._index.evict() for _ in range(count))
        return count

    def shared(self, page: int) -> bool:
        """May its K/V be changed by no single holder: another sequence, or the index, relies on it."""
        return self.refs[page] > 1 or page in self._index.published
