"""Which page holds which text: a chain of full, committed pages, so that equal prompts are stored once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch

ROOT = 0
"""Stands before the first page of every text (page 0 is never handed out)."""

Key = tuple[int, tuple[int, ...]]
"""(page of the text before, the page's own tokens)."""


Tokens = Sequence[int] | torch.Tensor
"""Token ids of one text."""


def plain(tokens: Tokens) -> Sequence[int]:
    """Token ids as Python integers: the elements of a tensor are equal only to themselves as keys."""
    return tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens


class PrefixIndex:
    """Published pages by the text they end: `(page before, own tokens) -> page`.

    Because a page stands for its whole prefix, equal keys mean equal texts: the chain needs no digest and knows no
    collisions. Only full pages of committed tokens are published; their K/V never changes again.

    A published page that no sequence holds *rests*: it keeps its K/V until its place is needed. Pages rest in the order
    in which they were left (least recently used first), the last page of a text before the pages it follows. Whoever
    holds a page holds all pages before it, so a page never rests longer than the pages that continue it, and the page
    that has rested longest has no successor left.

    Example (page size 2): texts 5 6 7 8 and 5 6 9 9 are published as pages 1, 2 and 1, 3:
        (0, (5, 6)) -> 1,  (1, (7, 8)) -> 2,  (1, (9, 9)) -> 3.
    """

    def __init__(self, page_size: int):
        self.page_size = page_size
        self._pages: dict[Key, int] = {}
        self.published: dict[int, Key] = {}
        """Every published page, and what it holds."""
        self._resting: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self.published)

    @property
    def num_resting(self) -> int:
        return len(self._resting)

    @property
    def resting(self) -> list[int]:
        """Pages no sequence holds, the one to go first in front."""
        return list(self._resting)

    def find(self, before: int, tokens: Sequence[int]) -> int | None:
        """The page that continues page `before` with `tokens`."""
        return self._pages.get((before, tuple(tokens)))

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The longest published run of full pages at the start of `tokens`."""
        found: list[int] = []
        for start in range(0, len(tokens) - self.page_size + 1, self.page_size):
            page = self.find(found[-1] if found else ROOT, tokens[start : start + self.page_size])
            if page is None:
                break
            found.append(page)
        return found

    def add(self, before: int, tokens: Sequence[int], page: int) -> None:
        """Publish a page that a sequence holds."""
        key = (before, tuple(tokens))
        assert key not in self._pages, "a text has one page"
        assert page not in self.published, "a page has one text"
        self._pages[key] = page
        self.published[page] = key

    def rest(self, page: int) -> None:
        """The last sequence let go of a published page."""
        self._resting[page] = None

    def wake(self, page: int) -> None:
        """A sequence holds a resting page again."""
        del self._resting[page]

    def evict(self) -> int:
        """Withdraw the page that has rested longest."""
        page, _ = self._resting.popitem(last=False)
        del self._pages[self.published.pop(page)]
        return page
