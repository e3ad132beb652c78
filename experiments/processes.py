"""Work in a process of its own, which inherits nothing: no freed pages, no threads, no tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")
_running: list[Iterator[Any]] = []


def fresh_process() -> ProcessPoolExecutor:
    """One process, begun by spawning: a forked child shares the parent's pages copy-on-write (its memory then says
    nothing), and OpenMP's threads do not survive a fork."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def yielded(make: Callable[..., Iterable[T]], *arguments: Any) -> Iterator[T]:
    """What `make(*arguments)` yields in a process of its own; it waits there until the next value is asked for."""
    with fresh_process() as process:
        process.submit(_begin, make, arguments).result()
        while (found := process.submit(_next).result()) is not None:
            yield found[0]


def _begin(make: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    _running.append(iter(make(*arguments)))


def _next() -> tuple[Any] | None:
    for value in _running[0]:
        return (value,)
    return None
