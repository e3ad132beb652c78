"""Running one side of a call: what it returned or raised, what callbacks saw, what it left changed."""

from __future__ import annotations

import signal
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fuzz.log import Log

SECONDS = 30
"""A call that takes longer hangs: the slowest of these takes less than two."""


class Hang(BaseException):
    """No `Exception`: nothing on the way may take it for a fault of a drafter."""


@dataclass
class Outcome:
    """value: what was returned; error: what was raised instead; notes: categories of warnings; where: its traceback."""

    log: Log
    value: Any = None
    error: BaseException | None = None
    where: str = ""
    notes: set[str] = field(default_factory=set)

    @property
    def sequences(self) -> Tensor:
        found: Tensor = self.value if isinstance(self.value, Tensor) else self.value.sequences
        return found

    def told(self) -> str:
        """One line."""
        if self.error is not None:
            return f"{type(self.error).__name__}: {str(self.error).strip()[:300]!r}"
        return f"{getattr(self.value, 'sequences', self.value)!r}".replace("\n", "").replace("        ", "")


def outcome(side: Callable[[Log], Any]) -> Outcome:
    """Run `side` with a fresh log, under the watchdog."""
    found = Outcome(Log())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with watchdog(SECONDS):
                found.value = side(found.log)
        except (Exception, Hang) as error:
            found.error = error
            found.where = "".join(traceback.format_exception(error)[-4:])
    found.notes = {entry.category.__name__ for entry in caught}
    return found


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the main thread; an alarm that was set before goes on afterwards."""

    def ring(number: int, frame: Any) -> None:
        stack = "".join(traceback.format_stack(frame, limit=6))
        raise Hang(f"still running after {seconds} s, at\n{stack}")

    before = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        rest, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.01, left - (seconds - rest)), interval)


class Script:
    """Plain sampling that draws what was drawn before: `torch.multinomial` gives the tokens of a finished text.

    Whatever else plain `generate` does is left as it is; the probability of every token is kept.
    """

    def __init__(self, tokens: Tensor):
        """Args: tokens: int64 `[rows, new]`."""
        self.tokens, self.chances = tokens, torch.zeros(len(tokens), 0)

    def draw(self, chances: Tensor, num_samples: int, **options: Any) -> Tensor:
        step = self.chances.shape[1]
        if step >= self.tokens.shape[1]:
            raise TextGoesOn(f"plain decoding goes on after {step} tokens")
        drawn = self.tokens[:, step : step + 1]
        self.chances = torch.cat([self.chances, chances.gather(1, drawn)], 1)
        return drawn

    @contextmanager
    def drawn(self) -> Iterator[None]:
        real = torch.multinomial
        torch.multinomial = self.draw  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.multinomial = real


class TextGoesOn(Exception):
    """A text that plain decoding would not have ended here."""
