"""Cost tables corrected by what a call's steps really took, and the steps a call takes only to find out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from statistics import median

from specdec.planner.choice import Candidate
from specdec.planner.costs import Costs

StepKind = tuple[str, int]
"""Option and depth of a step; `PLAIN` for one without a draft."""
PLAIN: StepKind = ("", 0)

FEWEST = 2
"""Steps of a kind that one call must have taken to say what it takes."""
_FULL = 4
"""Steps of a kind from which a call counts fully."""
_RATE = 0.4
"""Share of what a call that counts fully says differently that is believed: it may have met a bad moment itself."""
_ENOUGH = 4
"""Steps of a kind that tell what it takes."""
_FIRST = 8
"""Steps by the best candidate before another one is tried."""
_NEAR = 0.88
"""A candidate that promises this share of the best one's speed may really be the better one: tables err by as much."""
_SHARE = 0.005
"""Share of a call so far that trying others may be expected to lose."""


class CostExplorer:
    """Times of one call's steps, by kind. A call that only ever takes the steps which its cost table calls the best can
    never find out that the table is wrong (see `refined`).

    Args:
        names: of the options. tries: whether other candidates are tried. Which ones depends on what they promise and
            on counts alone, not on the times.

    Attributes:
        took: milliseconds of steps by kind.
    """

    def __init__(self, names: Sequence[str], tries: bool):
        self.took: dict[StepKind, list[float]] = {}
        self._names, self._tries = names, tries
        self._tried: dict[StepKind, int] = {}
        self._lost = 0.0

    def add(self, kind: StepKind, ms: float) -> None:
        """One more step."""
        self.took.setdefault(kind, []).append(ms)

    def due(self, best: Candidate) -> bool:
        """Is it time to try another candidate than the best one?"""
        return self._tries and len(self.took.get(self._kind(best), ())) >= _FIRST

    def other(
        self, best: Candidate, candidates: Iterable[Candidate], allowed: Callable[[Candidate], bool], spent: float
    ) -> Candidate | None:
        """The allowed candidate for the coming step in place of the best one; the same again until it was _ENOUGH.

        Args:
            spent: milliseconds of the call so far, by the table.
        """
        near = [one for one in candidates if one.rate > _NEAR * best.rate and self._is_new(self._kind(one))]
        near.sort(key=lambda one: (self._kind(one) in self._tried, one.rate), reverse=True)
        chosen = next(filter(allowed, near), None)
        if chosen is None:
            return None
        kind, loss = self._kind(chosen), chosen.ms * max(0.0, 1 - chosen.rate / best.rate)
        if self._lost + loss * (1 if kind in self._tried else _ENOUGH) > _SHARE * spent:
            return None
        self._lost += loss
        self._tried[kind] = self._tried.get(kind, 0) + 1
        return chosen

    def _is_new(self, kind: StepKind) -> bool:
        return self._tried[kind] < _ENOUGH if kind in self._tried else kind not in self.took

    def _kind(self, candidate: Candidate) -> StepKind:
        return self._names[candidate.option], candidate.depth


def refined(costs: Costs, took: Mapping[StepKind, Sequence[float]]) -> Costs:
    """The table after one call. What it says of kinds of steps *relative to each other* is corrected: the whole machine
    is faster or slower from minute to minute, which changes no choice.

    A table is measured in less than a second, and a busy neighbour meanwhile makes drafts look dearer than they are for
    good. A correction of one depth counts for the others as well, the less the further they are away: what was wrong is
    mostly the drafter's share, which all of them have. Plain steps are what the others are compared with wherever a
    call took some, and stay as they are; no draft becomes cheaper than none.

    Args:
        took: milliseconds of whole steps by kind, of all rows that the table is for.
    """
    seen = {kind: times for kind, times in took.items() if len(times) >= FEWEST}
    if len(seen) < 2:  # nothing to compare
        return costs
    weights = {kind: min(1.0, len(times) / _FULL) for kind, times in seen.items()}
    gaps = {kind: log(median(times) / _told(costs, kind)) for kind, times in seen.items()}
    speed = sum(weights[kind] * gaps[kind] for kind in seen) / sum(weights.values())
    shifts = {kind: _RATE * weights[kind] * (gap - speed) for kind, gap in gaps.items()}
    base = shifts.get(PLAIN, 0.0)
    steps = {}
    for option, table in costs.steps.items():
        own = {depth: shift - base for (name, depth), shift in shifts.items() if name == option}
        depths = sorted({*table, *own})  # depths that were never measured get a place of their own
        steps[option] = {
            depth: max(costs.plain, costs.step(option, depth) * exp(_near(depth, own))) for depth in depths
        }
    return replace(costs, steps=steps)


def _told(costs: Costs, kind: StepKind) -> float:
    return costs.plain if kind == PLAIN else costs.step(*kind)


def _near(depth: int, shifts: Mapping[int, float]) -> float:
    """The correction of the nearest depth that was seen, by its share: 3 says three quarters of what 4 would."""
    near = max(shifts, key=lambda seen: min(depth, seen) / max(depth, seen), default=None)
    return 0.0 if near is None else shifts[near] * min(depth, near) / max(depth, near)
