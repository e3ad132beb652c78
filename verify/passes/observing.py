"""Who hears of every forward pass, without a hook on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from transformers import PreTrainedModel

Observer = Callable[[PreTrainedModel, float], None]
"""Told of every pass: the model, and the seconds spent in it."""

_observers: ContextVar[tuple[Observer, ...]] = ContextVar("specdec_pass_observers", default=())


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Inside the block `observer` hears of every pass; hooks on a model would force its passes through its modules."""
    token = _observers.set((*_observers.get(), observer))
    try:
        yield
    finally:
        _observers.reset(token)


def observed(model: PreTrainedModel, seconds: float) -> None:
    """Tell whoever is listening of one pass."""
    for observer in _observers.get():
        observer(model, seconds)
