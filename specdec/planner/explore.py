"""What the steps of a call took, and which other step to take now and then to find out what that one takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from specdec.planner.choice import Candidate
from specdec.planner.refine import Kind

_ENOUGH = 4
"""Steps of a kind that tell what it takes."""
_FIRST = 8
"""Steps by the best plan before another one is tried."""
_NEAR = 0.88
"""A plan that promises this share of the best one's speed may really be the better one: tables err by as much."""
_SHARE = 0.005
"""Share of a call so far that trying others may be expected to lose."""


class Explorer:
    """Times of one call's steps, by kind. A call that only ever takes the steps which its cost table calls the best can
    never find out that the table is wrong (see `refine`).

    Args:
        names: of the options. tries: whether other plans are tried. Which ones, depends on plans and counts alone, not
            on the times.

    Attributes:
        took: milliseconds of steps by kind.
    """

    def __init__(self, names: Sequence[str], tries: bool):
        self.took: dict[Kind, list[float]] = {}
        self._names, self._tries = names, tries
        self._tried: dict[Kind, int] = {}
        self._lost = 0.0

    def add(self, kind: Kind, ms: float) -> None:
        """One more step."""
        self.took.setdefault(kind, []).append(ms)

    def due(self, best: Candidate) -> bool:
        """Is it time to try another plan than the best one?"""
        return self._tries and len(self.took.get(self._kind(best), ())) >= _FIRST

    def other(
        self, best: Candidate, plans: Iterable[Candidate], allowed: Callable[[Candidate], bool], spent: float
    ) -> Candidate | None:
        """The allowed plan to take for the coming step in place of the best one; the same again until it was _ENOUGH.

        Args:
            spent: milliseconds of the call so far, by the table.
        """
        near = [plan for plan in plans if plan.rate > _NEAR * best.rate and self._is_new(self._kind(plan))]
        near.sort(key=lambda plan: (self._kind(plan) in self._tried, plan.rate), reverse=True)
        chosen = next(filter(allowed, near), None)
        if chosen is None:
            return None
        kind, loss = self._kind(chosen), chosen.ms * max(0.0, 1 - chosen.rate / best.rate)
        if self._lost + loss * (1 if kind in self._tried else _ENOUGH) > _SHARE * spent:
            return None
        self._lost += loss
        self._tried[kind] = self._tried.get(kind, 0) + 1
        return chosen

    def _is_new(self, kind: Kind) -> bool:
        return self._tried[kind] < _ENOUGH if kind in self._tried else kind not in self.took

    def _kind(self, plan: Candidate) -> Kind:
        return self._names[plan.option], plan.depth
