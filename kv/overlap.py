"""A change that several blocks rely on at once: made by the first, undone by the last, in whatever order they end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager


class _Made:
    def __init__(self) -> None:
        self.undo, self.users = ExitStack(), 0


_made: dict[Hashable, _Made] = {}
_lock = threading.RLock()


@contextmanager
def overlapping(key: Hashable, change: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Inside the block `change()` is in force.

    A change that puts back what it found, made by two blocks that do not end in the opposite order, would put back what
    the other one had made: passes of two models begin to need the same thing in any order.

    Args:
        key: what is changed. change: called by the first of the blocks with this key.
    """
    with _lock:
        made = _made.setdefault(key, _Made())
        if not made.users:
            try:
                made.undo.enter_context(change())
            except BaseException:
                del _made[key]
                raise
        made.users += 1
    try:
        yield
    finally:
        with _lock:
            made.users -= 1
            if not made.users:
                del _made[key]
                made.undo.close()
