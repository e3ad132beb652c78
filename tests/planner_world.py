"""A world for the planner in which nothing is random but acceptance and nothing takes time but the cost table."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from specdec.planner.acceptance import Known
from specdec.planner.batch_planner import BatchPlanner
from specdec.planner.costs import Costs
from specdec.planner.options import Option
from specdec.planner.summary import PlanReport
from specdec.trace import StepTrace
from specdec.verify.draft_kind import DraftKind

DEPTH = 12
Acceptance = Callable[[int, int], float]
"""(row, position) -> chance that a token drafted for it is accepted."""
Fixed = tuple[str, int]
"""A drafter and how deep it drafts at every step; depth 0 decodes plainly."""


@dataclass(frozen=True)
class Drafting:
    """One drafter. draft: milliseconds per drafted token. found: chance of a proposal, None for always."""

    name: str
    draft: float
    acceptance: Acceptance
    found: float | None = None

    def option(self) -> Option:
        kind = DraftKind("chain", "sampled" if self.found is None else "deterministic")
        drafter: Any = SimpleNamespace(kind=kind, keeps_kv=self.found is None, max_depth=DEPTH, max_nodes=DEPTH)
        return Option(self.name, self.name, drafter, (1,) * DEPTH, may_be_empty=self.found is not None)


class Luck:
    """What a text would do to every drafter: one number per row and position, whoever drafts there and how deep."""

    def __init__(self, seed: int, world: World):
        rng = random.Random(seed)
        self._accept, self._find = (
            {
                d.name: [[rng.random() for _ in range(world.tokens + DEPTH)] for _ in range(world.rows)]
                for d in world.all
            }
            for _ in range(2)
        )

    def run(self, drafting: Drafting, row: int, position: int) -> int | None:
        """Tokens of its chain that would be accepted; None where it has nothing to propose."""
        if drafting.found is not None and self._find[drafting.name][row][position] >= drafting.found:
            return None
        coins, kept = self._accept[drafting.name][row], 0
        while kept < DEPTH and coins[position + kept] < drafting.acceptance(row, position + kept):
            kept += 1
        return kept


@dataclass(frozen=True)
class World:
    """Costs in any unit, of a step of any number of rows.

    draft, verify: milliseconds per drafted token. acceptance: of the model's tokens.
    found: chance that a row has a proposal at all, where the only drafter may be empty.
    ngram: of the tokens of a second drafter, which costs nothing and finds something at `ngram_found` of positions.
    """

    draft: float = 0.17
    verify: float = 0.1
    catch_up: float = 0.003
    prefill: float = 0.05
    prompt: int = 128
    tokens: int = 256
    rows: int = 1
    step: float = 1.0
    found: float | None = None
    acceptance: Acceptance = lambda row, position: 0.0
    ngram: Acceptance | None = None
    ngram_found: float = 0.5

    @property
    def all(self) -> list[Drafting]:
        own = [Drafting("model", self.draft, self.acceptance, self.found)]
        return own if self.ngram is None else [*own, Drafting("ngram", 0.0, self.ngram, self.ngram_found)]

    @property
    def costs(self) -> Costs:
        steps = {one.name: {depth: self.step + depth * (one.draft + self.verify) for depth in range(1, DEPTH + 1)}
                 for one in self.all}  # fmt: skip
        return Costs(self.rows, self.step, steps, self.catch_up, self.prefill)

    @property
    def plain(self) -> float:
        """What the whole call takes without drafts."""
        return self.prefill * self.prompt + self.tokens * self.step

    def planner(
        self, known: Known | None = None, believed: Costs | None = None, explores: bool = False
    ) -> tuple[BatchPlanner, Any]:
        """A planner of one call in this world, and the stand-in for its `Options`.

        Args:
            believed: the cost table it plans by, if not the true one.
        """
        chosen = tuple(one.option() for one in self.all)
        options: Any = SimpleNamespace(options=chosen, max_depth=DEPTH, used=None, asked=[], heard=None)
        costs = self.costs if believed is None else believed
        return BatchPlanner(options, lambda rows: costs, self.rows, self.prompt, known, explores), options

    def run(
        self,
        seed: int,
        fixed: int | Fixed | None = None,
        clock: Callable[[], float] = lambda: 1.0,
        known: Known | None = None,
        believed: Costs | None = None,
        explores: bool = False,
    ) -> Outcome:
        """One call: planned, or with chains of one drafter (the model where only a length is given) and length.

        Args:
            clock: what the steps take on the wall, as a multiple of what the table says.
        """
        luck, (planner, options) = Luck(seed, self), self.planner(known, believed, explores)
        left = [self.tokens] * self.rows
        spent, behind = self.prefill * self.prompt, self.prompt
        costs, drafters = self.costs, self.all
        plans: list[tuple[str, int]] = []
        seen: list[Seen] = []
        while any(left):
            live = [row for row in range(self.rows) if left[row]]
            remaining = [left[row] for row in live]
            at = [self.tokens - tokens for tokens in remaining]
            plan: Any = _always(fixed, drafters, remaining) if fixed is not None else planner.budget(live, remaining)
            options.used, options.asked, options.heard = None, [], None
            drafted, accepted = [0] * len(live), [0] * len(live)
            if plan.max_depth and plan.beside is not None:
                chains = [luck.run(drafters[plan.beside], *place) for place in zip(live, at, strict=True)]
                options.heard = plan.beside, [[] if n is None else [0] * n + [1] * (DEPTH - n) for n in chains]
            while plan is not None and plan.max_depth:
                one = drafters[plan.option]
                runs = [luck.run(one, *place) for place in zip(live, at, strict=True)]
                found = sum(run is not None and depth > 0 for run, depth in zip(runs, plan.depths, strict=True))
                if one.found is not None:
                    options.asked.append((plan.option, found))
                if one.found is None or found >= max(1, plan.least_rows):
                    options.used = plan.option
                    drafted = [0 if run is None else depth for run, depth in zip(runs, plan.depths, strict=True)]
                    accepted = [min(run or 0, depth) for run, depth in zip(runs, drafted, strict=True)]
                    break
                plan = plan.otherwise
            name = "plain" if options.used is None else drafters[options.used].name
            ms = costs.plain if options.used is None else costs.step(name, max(drafted))
            if name != "plain" and drafters[options.used].found is None:
                ms += self.catch_up * behind if behind > 2 else 0.0
                behind = 0
            else:
                behind += max(accepted) + 1
            spent += ms
            emitted = [[0] * (kept + 1) for kept in accepted]
            trace = StepTrace(len(plans), live, drafted, accepted, emitted, [], 0.0, ms * clock(), 0.0)
            reached = [min(depth, kept + 1) for depth, kept in zip(drafted, accepted, strict=True)]
            if fixed is None:
                planner.learn(trace, reached)
            seen.append(Seen(live, remaining, options.used, options.asked, options.heard, trace, reached))
            plans.append((name, max(drafted)))
            for row, kept in zip(live, accepted, strict=True):
                left[row] = max(0, left[row] - kept - 1)
        return Outcome(spent, plans, planner.report, planner.known, seen, planner.explorer.took)

    def mean(self, fixed: int | Fixed | None = None, calls: int = 12) -> float:
        """What a call takes on average."""
        return sum(self.run(seed, fixed).spent for seed in range(calls)) / calls


def _always(fixed: int | Fixed, drafters: Sequence[Drafting], left: Sequence[int]) -> Any:
    """The same draft as ever."""
    name, depth = fixed if isinstance(fixed, tuple) else (drafters[0].name, fixed)
    depths = tuple(min(depth, tokens - 1) for tokens in left)
    option = [one.name for one in drafters].index(name)
    return SimpleNamespace(
        option=option, depths=depths, max_depth=max(depths), least_rows=0, otherwise=None, beside=None
    )


@dataclass(frozen=True)
class Seen:
    """One step as the planner met it: what it was asked, what became of the drafts."""

    live: list[int]
    left: list[int]
    used: int | None
    asked: list[tuple[int, int]]
    heard: tuple[int, list[list[int]]] | None
    trace: StepTrace
    reached: list[int]


@dataclass(frozen=True)
class Outcome:
    """What a call took, and what each step drafted with and how deep."""

    spent: float
    plans: list[tuple[str, int]]
    report: PlanReport
    known: Known
    seen: list[Seen]
    took: dict[tuple[str, int], list[float]]

    @property
    def depths(self) -> list[int]:
        return [depth for _, depth in self.plans]
