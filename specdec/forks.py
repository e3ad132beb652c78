"""After a fork: locks that nobody in the child can release, and threads that the child does not have."""

from __future__ import annotations

import os
import warnings
import weakref
from abc import abstractmethod
from threading import Lock
from typing import Any, Protocol

import torch

_FIRST = os.getpid()


class Forked(Protocol):
    """Something with a lock."""

    @abstractmethod
    def after_fork(self) -> None:
        """In the child, by its only thread: let go of what other threads of the parent held."""


_known: weakref.WeakSet[Any] = weakref.WeakSet()
_guard = Lock()
"""Held while `_known` changes: a fork in another thread looks through it."""


def renewed_after_fork(one: Forked) -> None:
    """Have `one.after_fork()` called in every child that this process forks from now on."""
    with _guard:
        _known.add(one)


def held_by_another(lock: Any) -> bool:
    """Whether an RLock that was held at a fork was held by a thread that is gone in this child."""
    if lock._is_owned():
        return False
    free = bool(lock.acquire(blocking=False))
    if free:
        lock.release()
    return not free


def settle() -> None:
    """To be called before work: in a process that was forked torch gets one thread. OpenMP's other threads stayed in
    the parent, and GNU's OpenMP would wait for them for ever; torch's own data loaders use one thread, too."""
    if os.getpid() != _FIRST and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        warnings.warn(
            "this process was forked from one that uses several threads, which it does not have: decoding with one; "
            'start workers with multiprocessing\'s "spawn" method to use more',
            RuntimeWarning,
            stacklevel=4,
        )


def _in_child() -> None:
    global _guard
    _guard = Lock()
    for one in list(_known):
        one.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
