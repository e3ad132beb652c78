"""A view of a cache in which some rows take no part in the passes of one model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from specdec.kv.base import KVCache, PassCache
from specdec.kv.write import Write


class IdleRows(PassCache):
    """All active rows of a cache, some of them idle in the passes of model `name`.

    An idle row is in a pass only because a pass has one row for each row of the cache. Its text counts as ending where
    its K/V ends, and nothing that the pass computes for it is kept. So the other rows need no batch of their own, and
    their pass is no longer than they need it, even where an idle row is longer than the model can read. Valid until
    rows move or K/V of the model is written in another way.

    Args:
        idle: per active row.
    """

    def __init__(self, cache: KVCache, name: str, idle: Sequence[bool]):
        self._cache, self._idle = cache, idle
        self.num_rows, self.quantised = cache.num_rows, cache.quantised
        lengths, filled = cache.lengths[: cache.num_rows], cache.filled(name)
        self.lengths = [have if out else length for length, have, out in zip(lengths, filled, idle, strict=True)]

    def row(self, row: int) -> PassCache:
        return self._cache.row(row)

    def filled(self, name: str) -> list[int]:
        """See `KVCache.filled`."""
        return self._cache.filled(name)

    def writing(
        self, name: str, starts: Sequence[int], width: int, valid: Sequence[int] | None = None
    ) -> AbstractContextManager[Write]:
        real = [width] * self.num_rows if valid is None else valid
        return self._cache.writing(
            name, starts, width, [0 if out else count for count, out in zip(real, self._idle, strict=True)]
        )
