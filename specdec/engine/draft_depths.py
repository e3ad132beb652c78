"""How deep every request of the engine drafts in the coming step, what that may cost, and what it did cost."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.engine.budget import Acceptance, DraftBudget, Seat
from specdec.engine.costs import StepCosts
from specdec.engine.lane import Lane
from specdec.engine.scheduler import Limits
from specdec.engine.task import Task


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
