"""What is drafted while costs are measured, step by step, and how long each step took."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.drafters import Budget, Drafter, Session
from specdec.drafters.base import CACHE_NAME
from specdec.planner.acceptance import AcceptanceHistory, counterfactual_outcomes
from specdec.planner.base import Planner
from specdec.planner.options import Option, OptionBudget, Options, chains
from specdec.trace import StepTrace
from specdec.verify import DraftTree
from specdec.verify.draft_kind import DraftKind
from specdec.verify.topology import Topology

MOST_ROUNDS = 10
_DEPTHS = (1, 2, 3, 5, 6, 8, 11, 16)
"""Depths measured, others are interpolated: both sides of where passes get dearer at once, with the root seven and
thirteen tokens, because native ones take six at a time."""
_COARSE = (1, 4, 5)
"""Depths measured where steps are so slow that few are affordable; the rest is interpolated."""

PLAIN, _FORGET = (-1, 0), (-2, 0)
_CHAINS = DraftKind("chain", "deterministic")


class EnoughMeasured(Exception):
    """Ends the measuring loop."""


class FillingDrafter(Drafter):
    """Around a drafter that may have nothing to propose: asks it, then proposes as many tokens as the budget allows,
    whatever the answer was. So what is timed does not depend on what the scratch text happens to repeat.

    Attributes:
        said: the chain it had for every row, last time; None where it proposes anything else than chains.
    """

    def __init__(self, drafter: Drafter):
        self._drafter = drafter
        self.max_depth = self.max_nodes = drafter.max_nodes
        self.said: list[list[int]] | None = None

    @property
    def kind(self) -> DraftKind:
        return _CHAINS

    def start(self, session: Session) -> None:
        self._session = session
        self._drafter.start(session)

    def finish(self) -> None:
        self._drafter.finish()

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        tree = self._drafter.propose(budget, uniforms)
        self.said = chains(tree) if self._drafter.kind == _CHAINS else None
        roots = self._session.rows.roots()
        tokens = torch.arange(budget.max_depth, device=roots.device) % self._session.vocab
        return DraftTree.build(
            Topology.chain(budget.max_depth), torch.cat([roots[:, None], tokens.expand(len(roots), -1)], dim=1)
        )


class MeasuringPlanner(Planner):
    """Orders every kind of step that is to be timed, by turns, and notes how long each took.

    First come three plain steps, then rounds of all orders. The first round also pays for what is done once per process
    (kernels are chosen): its times count only where there is no time for another round.
    """

    def __init__(
        self, options: Options, rows: int, seconds: float, clock: Callable[[], float], room: int | None = None
    ):
        self.depths = [measured_depths(option) for option in options.options]
        self.batch: Batch | None = None
        self.ms: dict[tuple[int, int], list[float]] = {}
        self.catch_up_ms: list[tuple[float, int]] = []
        self._options, self._rows, self._seconds, self._clock, self._room = options, rows, seconds, clock, room
        self._queue: list[tuple[int, int]] = [PLAIN] * 3
        self._pending: tuple[int, int] | None = None
        self._forgotten = 0
        self._rounds = 0
        self._begun = self._last = clock()
        self.asked: dict[str, list[float]] = {}
        self.history = {option.family: AcceptanceHistory(options.max_depth, 1) for option in options.options}

    def budget(self, live: Sequence[int], left: Sequence[int | None], lengths: Sequence[int] = ()) -> OptionBudget:
        if self._pending is not None:
            self._note(1e3 * (self._clock() - self._last), self._pending)
        if not self._queue:
            self._next_round()
        order = self._queue.pop(0)
        if order == _FORGET:
            assert self.batch is not None
            self.batch.cache.forget(CACHE_NAME)
            self._forgotten = max(self.batch.rows.num_tokens)
            order = self._queue.pop(0)
        if self._room is not None and max(lengths) + order[1] > self._room:  # a model could not read it to its end
            raise EnoughMeasured
        self._pending = order
        self._last = self._clock()
        option, depth = order
        if depth == 0:
            return OptionBudget((0,) * self._rows, 0)
        return OptionBudget((depth,) * self._rows, self._options.options[option].drafter.max_nodes, option)

    def _note(self, ms: float, order: tuple[int, int]) -> None:
        if self._forgotten:
            self.catch_up_ms.append((ms, self._forgotten))
            self._forgotten = 0
        else:
            self.ms.setdefault(order, []).append(ms)

    def _next_round(self) -> None:
        if self._rounds == 0:
            if 4 * self._plain_seconds() * sum(map(len, self.depths)) > self._seconds:
                self.depths = [[d for d in depths if d in _COARSE or len(depths) == 1] for depths in self.depths]
        elif self._rounds == 1:
            self._begun = self._clock()
            if 2 * self._plain_seconds() * sum(map(len, self.depths)) > 3 * self._seconds:
                raise EnoughMeasured
        else:
            spent = self._clock() - self._begun
            if self._rounds > MOST_ROUNDS or spent * self._rounds / (self._rounds - 1) > self._seconds:
                raise EnoughMeasured
        self._rounds += 1
        self._queue += [PLAIN, PLAIN]
        for option, depths in enumerate(self.depths):
            if self._options.options[option].drafter.keeps_kv:
                self._queue += [_FORGET, (option, depths[0])]
            self._queue += [(option, depth) for depth in depths]

    def _plain_seconds(self) -> float:
        return min(self.ms[PLAIN]) / 1e3

    def learn(self, trace: StepTrace, reached: Sequence[int]) -> None:
        """How the drafts fared; the clock is read between orders."""
        index, depth = self._pending or PLAIN
        if depth == 0 or not any(trace.drafted):
            return
        option = self._options.options[index]
        history, drafter = self.history[option.family], option.drafter
        if not isinstance(drafter, FillingDrafter):
            history.add(option.widths, trace.rows, reached, trace.accepted)
        elif drafter.said is not None:
            heard = counterfactual_outcomes(drafter.said, trace)
            history.add(option.widths, *heard)
            self.asked[option.name] = [*self.asked.get(option.name, ()), len(heard.rows) / len(trace.rows)]


def measured_depths(option: Option) -> list[int]:
    """Depths of `option` whose cost is measured."""
    deepest = len(option.widths)
    return [*(d for d in _DEPTHS if d < deepest), deepest] if option.any_depth else [deepest]
