"""A world for the planner in which nothing is random but acceptance and nothing takes time but the cost table."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from specdec.planner.costs import Costs
from specdec.planner.options import Option
from specdec.planner.plan import Planner
from specdec.planner.summary import PlanReport
from specdec.report import StepTrace

DEPTH = 12


@dataclass(frozen=True)
class World:
    """Costs in units of a plain step of any number of rows.

    draft, verify: milliseconds per drafted token. acceptance: (row, position) -> chance of a drafted token.
    found: chance that a row has a proposal at all, where the drafter may be empty.
    """

    draft: float = 0.17
    verify: float = 0.1
    catch_up: float = 0.003
    prefill: float = 0.05
    prompt: int = 128
    tokens: int = 256
    rows: int = 1
    found: float | None = None
    acceptance: Callable[[int, int], float] = lambda row, position: 0.0

    @property
    def costs(self) -> Costs:
        steps = {depth: 1.0 + depth * (self.draft + self.verify) for depth in range(1, DEPTH + 1)}
        return Costs(self.rows, 1.0, {"model": steps}, self.catch_up, self.prefill)

    @property
    def plain(self) -> float:
        """What the whole call takes without drafts."""
        return self.prefill * self.prompt + self.tokens

    def planner(self) -> tuple[Planner, Any]:
        """A planner of one call in this world, and the stand-in for its `Options`."""
        drafter: Any = SimpleNamespace(
            kind=None, num_cache_layers=int(self.found is None), max_depth=DEPTH, max_nodes=DEPTH
        )
        option = Option("model", "model", drafter, (1,) * DEPTH, may_be_empty=self.found is not None)
        options: Any = SimpleNamespace(options=(option,), max_depth=DEPTH, used=None, asked=[], heard=None)
        return Planner(options, lambda rows: self.costs, self.rows, self.prompt), options

    def run(self, seed: int, fixed: int | None = None, clock: Callable[[], float] = lambda: 1.0) -> Outcome:
        """One call: planned, or with chains of one length.

        Args:
            clock: what the steps take on the wall, as a multiple of what the table says.
        """
        rng = random.Random(seed)
        planner, options = self.planner()
        left = [self.tokens] * self.rows
        spent, behind = self.prefill * self.prompt, self.prompt
        depths: list[int] = []
        while any(left):
            live = [row for row in range(self.rows) if left[row]]
            if fixed is None:
                wanted = list(planner.budget(live, [left[row] for row in live]).depths)
            else:
                wanted = [min(fixed, left[row] - 1) for row in live]
            if self.found is not None and max(wanted):
                asked = [depth if rng.random() < self.found else 0 for depth in wanted]
                options.asked = [(0, sum(map(bool, asked)))]
                wanted = asked
            accepted = [
                self._accepted(rng, row, self.tokens - left[row], d) for row, d in zip(live, wanted, strict=True)
            ]
            reached = [min(depth, kept + 1) for depth, kept in zip(wanted, accepted, strict=True)]
            depth = max(wanted)
            ms = self.costs.step("model", depth)
            if depth:
                ms += self.catch_up * behind if behind > 2 and self.found is None else 0.0
                behind = 0
            else:
                behind += 1
            spent += ms
            options.used = 0 if depth else None
            runs = [[0] * (kept + 1) for kept in accepted]
            trace = StepTrace(len(depths), live, wanted, accepted, runs, [], 0.0, ms * clock(), 0.0)
            if fixed is None:
                planner.learn(trace, reached)
            options.asked = []
            depths.append(depth)
            for row, kept in zip(live, accepted, strict=True):
                left[row] = max(0, left[row] - kept - 1)
        return Outcome(spent, depths, planner.report)

    def _accepted(self, rng: random.Random, row: int, position: int, depth: int) -> int:
        kept = 0
        while kept < depth and rng.random() < self.acceptance(row, position + kept):
            kept += 1
        return kept

    def mean(self, fixed: int | None = None, calls: int = 12) -> float:
        """What a call takes on average."""
        return sum(self.run(seed, fixed).spent for seed in range(calls)) / calls


@dataclass(frozen=True)
class Outcome:
    """What a call took, and how deep each step drafted."""

    spent: float
    depths: list[int]
    report: PlanReport
