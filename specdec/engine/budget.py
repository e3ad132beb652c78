"""How many tokens to draft for whom: a draft is worth its place in a pass only if it is likely enough to be kept.

Everything here looks at earlier steps alone, never at the tokens about to be drafted (algorithms B.5), so the law of
what is emitted is untouched. The text of a sampled request does depend on how much is drafted for it; requests that
must be reproducible are therefore left out (`Seat.fixed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from specdec.engine.costs import StepCosts
from specdec.engine.lane import Lane
from specdec.engine.scheduler import Limits
from specdec.engine.task import Acceptance, Task

_LEAST_GAIN = 0.03
"""Levels that are kept more rarely than this are not drafted, even where there is room for them."""
PROBING = 0.01
"""Part of the time that may be lost by trying other depths than the best one, to see whether they have become it."""
_PROBE_EVERY = 24
"""Least steps between two of those trials."""
_HOPE = 1.5
"""A depth whose cost is not known yet is tried if it would be best at so much more speed than it promises."""


@dataclass(frozen=True)
class Seat:
    """One running row, as the budget sees it.

    limit: levels it may use at most (its drafter's depth, what is left of its length).
    nodes: `nodes[d]`, drafted tokens of a tree cut to d levels; nodes[0] == 0.
    fixed: its text depends on how much is drafted, and is promised: it drafts `limit` levels, always.
    """

    limit: int
    nodes: Sequence[int]
    acceptance: Acceptance
    fixed: bool = False


class Split(NamedTuple):
    """Depths for the rows that may be cut, and the tokens per unit of cost they promise."""

    depths: dict[int, int]
    rate: float
    tokens: int
    levels: int


class DraftBudget:
    """Shares the draft tokens of a step over its rows so that emitted tokens per second are most (algorithms B.3, B.6).

    For every number of levels, expected tokens are divided by the measured cost of such a step, and the best number
    wins; zero is a possible answer. The target's pass is as wide for all rows as for the widest, so within it a row's
    further nodes cost next to nothing, and rows differ only where their history says that they keep next to nothing
    (they get no draft), or where the step's nodes do not suffice: then those likeliest to be kept come first.

    Attributes:
        expected: tokens per second the last choice promised; None without a choice.
    """

    def __init__(self, costs: StepCosts):
        self.costs = costs
        self.expected: float | None = None
        self._steps = 0
        self._credit = 0.0
        self._trials = 0

    def depths(self, seats: Sequence[Seat], most_nodes: int) -> list[int]:
        """Levels each row may draft in this step.

        Args:
            most_nodes: drafted tokens of all rows.
        """
        chosen = [seat.limit if seat.fixed else 0 for seat in seats]
        free = [i for i, seat in enumerate(seats) if not seat.fixed and seat.limit > 0]
        if not free:
            return chosen
        self._steps += 1
        fixed_nodes = sum(seats[i].nodes[depth] for i, depth in enumerate(chosen))
        fixed_gain = len(seats) + sum(
            sum(seat.acceptance.survival()[: seat.limit]) for seat in seats if seat.fixed and seat.limit
        )
        widest = max(seat.nodes[depth] for seat, depth in zip(seats, chosen, strict=True))
        levels = _Levels(seats, free, most_nodes - fixed_nodes)
        found = (
            self._within(levels, depth, widest, fixed_gain, max([depth, *chosen]))
            for depth in range(levels.deepest + 1)
        )
        splits = [split for split in found if split is not None]  # of 0 levels, of 1, ...
        best = max(range(len(splits)), key=lambda depth: splits[depth].rate)
        self.expected = splits[best].rate / self.costs.scale
        tried = self._experiment(best, splits)
        split = splits[tried].depths
        if tried != best or self._steps % _PROBE_EVERY == 0:  # rows that were left out may have changed
            split, _, _ = levels.within(tried, everybody=True)
        for i, depth in split.items():
            chosen[i] = depth
        return chosen

    def _within(self, levels: _Levels, depth: int, widest: int, gain: float, deepest: int) -> Split | None:
        """The split in which rows have up to `depth` levels, beside rows that bring `gain` and draft `widest` nodes for
        certain; None where the nodes do not suffice for any row to get that deep."""
        split, added, nodes = levels.within(depth)
        if max(split.values()) < depth:
            return None
        tokens = levels.num_rows * (1 + max(widest, nodes))  # the pass is as wide for every row as for the widest
        return Split(split, (gain + added) / self.costs.cost(tokens, deepest), tokens, deepest)

    def _experiment(self, best: int, splits: Sequence[Split]) -> int:
        """The best split, or another one where it is time to learn what that brings."""
        hope = splits[best].rate / _HOPE
        unknown = [
            i
            for i, split in enumerate(splits)
            if split.rate > hope and not self.costs.known(split.tokens, split.levels)
        ]
        if unknown:
            return max(unknown, key=lambda depth: splits[depth].rate)
        self._credit += PROBING
        other = best - 1 if self._trials % 3 == 2 else best + 1  # deeper levels are known least
        if not 0 <= other < len(splits):
            self._trials += 1
            return best
        if self._credit < max(1 - splits[other].rate / splits[best].rate, PROBING * _PROBE_EVERY):
            return best
        self._credit = 0.0
        self._trials += 1
        return other


class _Levels:
    """What every further level of every row is expected to add, and how many nodes it takes.

    A level counts as no better than the one above it, so that taking the best ones first takes them in order.
    """

    def __init__(self, seats: Sequence[Seat], free: Sequence[int], most: int):
        self.num_rows = len(seats)
        self.deepest = max(seats[i].limit for i in free)
        self._seats, self._free, self._most = seats, free, most
        self._entries: list[tuple[float, int, int, float]] = []  # gain per node, level, row, gain
        for i in free:
            survival, worth = seats[i].acceptance.survival(), float("inf")
            for level in range(seats[i].limit):
                nodes = seats[i].nodes[level + 1] - seats[i].nodes[level]
                worth = min(worth, survival[level] / max(nodes, 0.1))
                self._entries.append((worth, level, i, survival[level]))
        self._entries.sort(key=lambda entry: (-entry[0], entry[1]))
        # Where nobody gains anything, leaving rows out would hide the level from the comparison, and from trials.
        self._useful = {level for _, level, _, gain in self._entries if gain >= _LEAST_GAIN}

    def within(self, depth: int, everybody: bool = False) -> tuple[dict[int, int], float, int]:
        """Every row's depth when it may have `depth` levels, the best ones first as far as there are nodes for them;
        the tokens they add; the nodes of the row with most.

        Args:
            everybody: also rows that gain next to nothing.
        """
        split, added, left = dict.fromkeys(self._free, 0), 0.0, self._most
        for _, level, i, gain in self._entries:
            useless = gain < _LEAST_GAIN and level in self._useful and not everybody
            if level >= depth or split[i] != level or useless:
                continue
            nodes = self._seats[i].nodes[level + 1] - self._seats[i].nodes[level]
            if nodes <= left:
                split[i], left, added = level + 1, left - nodes, added + gain
        return split, added, max(self._seats[i].nodes[own] for i, own in split.items())


class DraftDepths:
    """Sets `task.depth` of all running requests, and learns from every step what steps cost.

    Args:
        adaptive: False lets every request draft as deep as its drafter does.
    """

    def __init__(self, limits: Limits, adaptive: bool):
        self._limits = limits
        self._adaptive = adaptive
        self.costs = StepCosts()
        self.budget = DraftBudget(self.costs)

    def assign(self, lanes: Sequence[Lane], prefilling: bool) -> None:
        """Set `depth` of every task of these lanes."""
        tasks = [(lane, task) for lane in lanes for task in lane.live]
        if not tasks:
            return
        seats = [self._seat(lane, task) for lane, task in tasks]
        reserved = self._limits.prefill_share if prefilling else 0
        depths = self.budget.depths(seats, self._limits.max_step_tokens - reserved - len(tasks))
        for (_, task), depth in zip(tasks, depths, strict=True):
            task.depth = depth

    def slots(self, lanes: Sequence[Lane]) -> int:
        """Slots behind a row's text that this step may write, drafters included."""
        wide = max((lane.nodes[task.depth] + 1 for lane in lanes for task in lane.live), default=1)
        tails = (lane.drafter.tail_slots for lane in lanes if lane.drafter and any(t.depth for t in lane.live))
        return max([wide, *tails])

    def left_for_prefill(self, lanes: Sequence[Lane], prefilling: Sequence[Task]) -> int:
        """Tokens of this step that decoding does not use."""
        used = sum(lane.nodes[task.depth] + 1 for lane in lanes for task in lane.live)
        return max(0, self._limits.max_step_tokens - used) if prefilling else 0

    def took(self, tokens: int, levels: int, seconds: float) -> None:
        """The step's decoding, with a pass of so many nodes, roots and padding included, took so long."""
        self.costs.observe(tokens, levels, seconds)

    def _seat(self, lane: Lane, task: Task) -> Seat:
        limit, kept = lane.limit(task), task.acceptance or Acceptance(0)
        return Seat(limit, lane.nodes[: limit + 1], kept, fixed=task.pinned or not self._adaptive)
