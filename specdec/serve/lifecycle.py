"""Who is being served, and how a server ends: what has begun is finished, what comes is turned away."""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from specdec.serve.errors import Refusal
from specdec.serve.options import ServeOptions


class Served(Protocol):
    """A generation under way."""

    def abort(self) -> None:
        """End it with an error that says that the server ends."""


class Lifecycle:
    """To be used in the event loop only, but for `drain`, which a signal handler may call.

    Attributes:
        draining: nothing new is begun.
    """

    def __init__(self, options: ServeOptions):
        self._options = options
        self._active: set[Served] = set()
        self._deadline: float | None = None

    @property
    def draining(self) -> bool:
        return self._deadline is not None

    @property
    def num_active(self) -> int:
        return len(self._active)

    def enter(self, one: Served) -> None:
        """Raises Refusal: 503 while the server ends, 429 where too many are served already."""
        self.refuse_draining()
        if len(self._active) >= self._options.max_concurrent:
            raise Refusal(
                429, f"{len(self._active)} generations are under way, which is the limit: try again later",
                code="too_many_requests",
            )  # fmt: skip
        self._active.add(one)

    def refuse_draining(self) -> None:
        if self.draining:
            raise Refusal(503, "the server is shutting down", code="shutting_down")

    def leave(self, one: Served) -> None:
        """It is done. Repeating it is no error."""
        self._active.discard(one)

    def drain(self) -> None:
        """From now on nothing new is begun, and what has begun has `drain_seconds` left."""
        if self._deadline is None:
            self._deadline = monotonic() + self._options.drain_seconds

    def drained(self) -> bool:
        """Whether the server may end now. After the deadline whoever is left is aborted."""
        if self._deadline is None:
            return False
        if monotonic() >= self._deadline:
            for one in list(self._active):
                one.abort()
        return not self._active
