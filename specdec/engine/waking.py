"""Tasks of an event loop that wait for an engine: one call into the loop wakes all whom a step concerns."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import ClassVar
from weakref import WeakKeyDictionary, ref

LOOK_SECONDS = 0.1
"""How often whoever waits looks whether the engine's thread is still there."""


class Waking:
    """Of one event loop. A call from another thread costs a system call and a turn of the loop, so whoever is woken
    while the loop has not turned yet goes with the call that is on its way."""

    _of_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, Waking]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = ref(loop)  # the key it is found by must not keep itself alive
        self._woken: deque[asyncio.Future[None]] = deque()
        self._called = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._looking = False

    @classmethod
    def here(cls) -> Waking:
        """The running loop's."""
        loop = asyncio.get_running_loop()
        if (found := cls._of_loop.get(loop)) is None:
            found = cls._of_loop[loop] = cls(loop)
        return found

    @contextmanager
    def future(self) -> Iterator[asyncio.Future[None]]:
        """To be waited for in the loop; it is done when woken, and now and then anyway."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.add(future)
        if not self._looking:
            self._looking = True
            loop.call_later(LOOK_SECONDS, self._look, loop)
        try:
            yield future
        finally:
            self._waiting.discard(future)

    def wake(self, future: asyncio.Future[None]) -> None:
        """From any thread."""
        self._woken.append(future)
        if not self._called:
            self._called = True
            loop = self._loop()
            with suppress(RuntimeError):  # closed: nobody is waiting there any more
                if loop is not None:
                    loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._called = False  # first: who comes during the loop below must call again
        while self._woken:
            _done(self._woken.popleft())

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._looking = bool(self._waiting)
        if self._looking:
            loop.call_later(LOOK_SECONDS, self._look, loop)
        for future in self._waiting:
            _done(future)


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
