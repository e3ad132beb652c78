"""A cost table made better by what steps really took, once calls have used it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from statistics import median

from specdec.planner.costs import Costs

Kind = tuple[str, int]
"""Option and depth of a step; `PLAIN` for one without a draft."""
PLAIN: Kind = ("", 0)

FEWEST = 2
"""Steps of a kind that one call must have taken to say what it takes."""
_FULL = 4
"""Steps of a kind from which a call counts fully."""
_RATE = 0.4
"""Share of what a call that counts fully says differently that is believed: it may have met a bad moment itself."""


def refined(costs: Costs, took: Mapping[Kind, Sequence[float]]) -> Costs:
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


def _told(costs: Costs, kind: Kind) -> float:
    return costs.plain if kind == PLAIN else costs.step(*kind)


def _near(depth: int, shifts: Mapping[int, float]) -> float:
    """The correction of the nearest depth that was seen, by its share: 3 says three quarters of what 4 would."""
    near = max(shifts, key=lambda seen: min(depth, seen) / max(depth, seen), default=None)
    return 0.0 if near is None else shifts[near] * min(depth, near) / max(depth, near)
