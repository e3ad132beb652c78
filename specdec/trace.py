"""What one decode step did and how long it took: `StepTrace`, and the clock around the step."""

from __future__ import annotations

from time import perf_counter
from typing import NamedTuple


class StepTrace(NamedTuple):
    """One decode step. Lists are per row that took part, in the order of `rows` (indices into the batch).

    drafted, accepted: draft tokens proposed and kept. emitted: the token ids the step added (after any stop rule's
    cut). kinds: per emitted token "accepted", "recovered" (drawn after a rejection) or "bonus" (nothing was left
    to reject). Times in milliseconds.
    """

    step: int
    rows: list[int]
    drafted: list[int]
    accepted: list[int]
    emitted: list[list[int]]
    kinds: list[list[str]]
    ms_draft: float
    ms_verify: float
    ms_rest: float


class Stopwatch:
    """Milliseconds by phase. Wraps the step from outside so that the algorithm holds no clock."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    def phase(self, name: str) -> _Phase:
        return _Phase(self.ms, name)

    def take(self, name: str) -> float:
        """The phase's time since the last `take`."""
        return self.ms.pop(name, 0.0)


class _Phase:
    """Adds the time spent inside to `ms[name]`. A class: a generator would cost four times as much, every step."""

    __slots__ = ("_ms", "_name", "_start")

    def __init__(self, ms: dict[str, float], name: str):
        self._ms, self._name = ms, name

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *fault: object) -> None:
        self._ms[self._name] = self._ms.get(self._name, 0.0) + 1e3 * (perf_counter() - self._start)
