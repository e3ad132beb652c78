"""A cache some of whose rows sit the passes of one model out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from specdec.kv.base import KVCache, PassCache
from specdec.kv.write import Write


class IdleRows(PassCache):
    """All active rows of a cache, of which the idle ones are in a pass of model `name` for its shape only.

    Such a row's text ends, for these passes, where its K/V does, however long it really is; nothing of it is kept. So
    a pass over the other rows needs no batch of its own, and is no longer for a row that the model cannot read.
    Valid until rows move or any K/V of the model is written otherwise.

    Args:
        idle: per active row.
    """

    def __init__(self, cache: KVCache, name: str, idle: Sequence[bool]):
        self._cache, self._idle = cache, idle
        self.num_rows = cache.num_rows
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
