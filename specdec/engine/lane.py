"""A lane: the running requests that share a drafter and a rule, decoded as one batch that they join and leave."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.deciding import Decided, Decider
from specdec.drafters import Budget, FallbackGuard, Session
from specdec.drafters.base import depth_limits
from specdec.engine.budget import Acceptance
from specdec.engine.law import DraftingLaw, LaneLaw
from specdec.engine.task import LaneKey, State, Task
from specdec.kv.faults import from_outside
from specdec.kv.paged import PagedKVCache
from specdec.plain_order import PlainBatch, PlainOrder
from specdec.stopping import Opinions, StopRules
from specdec.verify import DraftTree, NoiseStream, Rows
from specdec.verify.draft_kind import NO_DRAFTS
from specdec.verify.purity import decides_by_row
from specdec.verify.race import RaceStream
from specdec.verify.rules import choose_rule


class Emitted(NamedTuple):
    """What one step gave one request. tokens: after any stop rule's cut. reason: why it is finished, or None."""

    task: Task
    tokens: list[int]
    drafted: int
    accepted: int
    reason: str | None


class Lane:
    """Rows, law, noise, rule and drafter session of the requests with one `LaneKey`.

    A row's text, noise, law and K/V are its request's own: whoever else is in the lane leaves no trace in it. What a
    request's own processors and criteria raise is reported with the decision and ends nobody else's step.

    Args:
        drafter: a clone of its own, None for plain decoding.
        cache: a view of the pool without rows.
    """

    def __init__(
        self, key: LaneKey, drafter: FallbackGuard | None, cache: PagedKVCache, vocab: int, device: torch.device
    ):
        self.key = key
        self.drafter = drafter
        self.cache = cache
        self.rows = Rows.empty(device)
        self.law = LaneLaw()
        kind = NO_DRAFTS if drafter is None else drafter.kind
        rule = choose_rule(key.rule, key.do_sample, kind, top_down=key.in_order)
        race = RaceStream([], [], vocab, device) if rule is not None and rule.uses_race else None
        noise = NoiseStream([], [], device)
        self._order = PlainOrder(self.rows, key.do_sample, isolates=True) if key.in_order else None
        self.decider = Decider(self.rows, self.law, drafter, rule, key.do_sample, noise, race, self._order)
        self.tasks: dict[int, Task] = {}
        self.acceptance = Acceptance(0 if drafter is None else drafter.max_depth)
        self._stops: dict[int, StopRules] = {}
        self._num_faults = 0
        if drafter is not None:
            drafter.start(Session(self.rows, cache, DraftingLaw(self.law), key.do_sample, vocab, self.decider.race))

    @property
    def live(self) -> list[Task]:
        """The lane's requests, in the order of the cache's rows."""
        return [self.tasks[row] for row in self.rows.live]

    def join(self, task: Task) -> None:
        """A request whose K/V is complete up to its root takes part from the next step on."""
        assert task.sequence is not None
        row = task.row = self.rows.join(task.text)
        self.cache.join(task.sequence)
        if task.opinions is None and not all(map(decides_by_row, task.request.criteria)):
            task.opinions = Opinions()
        stop = self._stops[row] = StopRules(task.request.criteria, self.rows, task.opinions)
        stop.pads_finished = True  # nobody waits for other rows' ends
        self.law.join(row, task.request.processors, stop.ends)
        if self._order is not None:
            if task.batch is None:
                task.batch = PlainBatch(task.request.processors, stop, [row], self.rows.prefix(row).clone()[None])
            task.batch.resume(stop, [row], len(task.text))
            self._order.join(task.batch)
        self.decider.join(row, task.seed)
        self.tasks[row] = task
        task.state = State.RUNNING
        if task.acceptance is None and self.drafter is not None:
            task.acceptance = Acceptance(self.drafter.max_depth, self.acceptance)
        if self.drafter is not None:
            self.drafter.join([row])

    def leave(self, task: Task) -> None:
        """A request is finished, cancelled or preempted, or failed to join; the last row takes its place. Its sequence
        stays open."""
        row, place = task.row, self.rows.live.index(task.row)
        self.cache.leave(place)
        self.rows.leave(place)
        self.law.leave(row)
        if self._order is not None:
            self._order.leave(row)
        self._stops.pop(row, None)
        self.tasks.pop(row, None)
        task.row = -1
        if self.drafter is not None:
            self.drafter.stop([row])

    def limit(self, task: Task) -> int:
        """Levels the request may draft at most."""
        if self.drafter is None:
            return 0
        deepest = self.drafter.levels_below(len(task.text))
        return depth_limits(deepest, [self._stops[task.row].remaining(task.row)])[0]

    def propose(self) -> DraftTree:
        """Trees of the depths the budget gave."""
        tasks = self.live
        nodes = 0 if self.drafter is None else self.drafter.max_nodes
        return self.decider.propose(Budget(tuple(task.depth for task in tasks), nodes), [t.steps for t in tasks])

    def decide(self, tree: DraftTree, logits: Tensor, again: bool = False) -> Decided:
        """See `Decider.decide`; nothing that a row's own code raises comes out of it."""
        decided = self.decider.decide(tree, logits, [task.steps for task in self.live], again)
        of_row = self.law.take_failed()
        if decided.in_order or not of_row:  # in plain order the law only drafts
            return decided
        return decided._replace(failed={i: of_row[row] for i, row in enumerate(self.rows.live) if row in of_row})

    def nodes(self, depth: int) -> int:
        """Drafted tokens of one row under a budget of so many levels, at most."""
        return 0 if self.drafter is None or not depth else min(self.drafter.max_nodes, self.drafter.nodes_within(depth))

    def advance(
        self, decided: Decided, logits: Tensor, failed: Collection[Task]
    ) -> tuple[list[Emitted], dict[Task, BaseException]]:
        """Commit, append, cut where plain decoding stops. Everyone stays in the lane, the finished and the failed
        included; the latter get nothing.

        Returns:
            what everybody else got, and the requests whose stop rules failed, with what they raised.
        """
        decision, tasks = decided.decision, self.live
        for i, task in enumerate(tasks):
            if task in failed:
                decision.paths[i], decision.runs[i] = [], []
        self.cache.commit(decision.paths)
        self.rows.extend(decision.runs)
        out: list[Emitted] = []
        raised: dict[Task, BaseException] = {}
        for i, task in enumerate(tasks):
            if task in failed:
                continue
            try:
                if not decided.in_order:
                    self._stops[task.row].scan(task.row, decision.runs[i], None)
            except BaseException as fault:
                if from_outside(fault):
                    raise
                raised[task] = fault
                continue
            run, reason = self._cut(i, task, decision.runs[i])
            task.text.extend(run)
            task.steps += 1
            task.ending = reason
            out.append(Emitted(task, run, decision.drafted[i], decision.accepted[i], reason))
        if self.drafter is not None:
            self.drafter.observe(decided.verdict, logits)
        return out, raised

    def _cut(self, place: int, task: Task, run: list[int]) -> tuple[list[int], str | None]:
        """What the stop rules left of a run that is appended already, and why the request ends, if it does."""
        stop = self._stops[task.row]
        columns = stop.final_columns(task.row)
        if columns is None:
            return run, None
        run = run[: len(run) - (self.rows.ends[task.row] - columns)]
        if self.cache.lengths[place] > columns - 1:
            self.cache.truncate(place, columns - 1)
        return run, "length" if stop.by_length_alone(task.row) else "stop"

    def take_faults(self) -> int:
        """Drafter faults since the last call."""
        if self.drafter is None:
            return 0
        new = self.drafter.num_faults - self._num_faults
        self._num_faults = self.drafter.num_faults
        return new

    def close(self) -> None:
        if self.drafter is not None:
            self.drafter.finish()


def merged(lanes: Sequence[Lane], trees: Sequence[DraftTree]) -> DraftTree:
    """The trees of all lanes' rows as one batch, padded to the widest; without q, for a forward pass only."""
    if len(trees) == 1:
        return trees[0]
    width = max(tree.tokens.shape[1] for tree in trees)

    def wide(part: Tensor, fill: int = 0) -> Tensor:
        return torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill)

    tokens = torch.cat([wide(tree.tokens) for tree in trees])
    parents = torch.cat([wide(tree.parents) for tree in trees])
    counts = torch.cat([tree.num_nodes for tree in trees])
    return DraftTree(tokens, parents, counts, torch.zeros_like(tokens, dtype=torch.bool))
