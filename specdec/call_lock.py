"""One call at a time: calls from several threads wait for each other on one Speculator."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from specdec.forks import held_by_another, renewed_after_fork, settle
from specdec.kv import UnsupportedArgumentError


class CallLock:
    """A re-entrant lock that a copy of its owner does not share: copies and pickles get one of their own. In a forked
    child it is free, unless the child goes on with the very call that holds it.

    Attributes:
        busy: whether whoever holds it is decoding.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.busy = False
        renewed_after_fork(self)

    def __enter__(self) -> bool:
        settle()
        return self._lock.__enter__()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock for one whole call: calls from other threads wait. A call from one of its own callbacks would
        wait for itself, and is refused.

        Raises:
            UnsupportedArgumentError: it comes from a callback.
        """
        with self:
            if self.busy:
                raise UnsupportedArgumentError(
                    "this Speculator is already decoding, and this call comes from one of that call's callbacks: build "
                    "another Speculator for it"
                )
            self.busy = True
            try:
                yield
            finally:
                self.busy = False

    def after_fork(self) -> None:
        if held_by_another(self._lock):
            self._lock, self.busy = threading.RLock(), False

    def __reduce__(self) -> tuple[type[CallLock], tuple[Any, ...]]:
        return CallLock, ()
