"""Whose turn it is: calls from several threads take turns on one Speculator."""

from __future__ import annotations

import threading
from typing import Any


class Turn:
    """A re-entrant lock that a copy of its owner does not share: copies and pickles get one of their own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> bool:
        return self._lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turn], tuple[Any, ...]]:
        return Turn, ()
