"""Errors of an engine as a service; what is wrong with a single request are the errors every call raises."""

from __future__ import annotations

import os

from specdec.kv import SpecdecError


class QueueFullError(SpecdecError, RuntimeError):
    """Too many requests wait already: try again later. The request was not taken."""


class EngineClosedError(SpecdecError, RuntimeError):
    """The engine was closed and takes no more requests."""


class RequestFaultError(SpecdecError, RuntimeError):
    """A request's own code failed: a logits processor, prefix function or stopping criterion raised, or left no valid
    law. Only this request ended with the error.

    Attributes:
        request: the handle's id. step: its decoding step (0 = first after the prefill).
        emitted: token ids it had emitted before.
        __cause__: what its code raised, None where that gave nonsense without raising.
    """

    def __init__(self, message: str, request: int, step: int, emitted: list[int]):
        super().__init__(message)
        self.request = request
        self.step = step
        self.emitted = emitted


class EngineFaultError(SpecdecError, RuntimeError):
    """A step failed in a way that no single request is to blame for; all requests of the engine ended with it. The
    engine itself goes on: its pool is empty, and it takes requests as before.

    Attributes:
        emitted: token ids this request had emitted before.
    """

    def __init__(self, message: str, emitted: list[int]):
        super().__init__(message)
        self.emitted = emitted


def refuse_forked(process: int) -> None:
    """Refuse to work in a forked child: requests, and the thread that may be in the middle of a step, stayed behind.

    Raises:
        EngineClosedError: this is a child of that process.
    """
    if process != os.getpid():
        raise EngineClosedError(
            "expected an engine of this process, this one was forked along with its requests: make one in each "
            "process, after the fork"
        )
