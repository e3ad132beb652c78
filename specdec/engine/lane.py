"""Lanes: the running requests that share a drafter and a rule, each lane one batch that they join and leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.decision import Decided
from specdec.drafters import Budget, FallbackGuard
from specdec.drafters.base import depth_limits, levels_within
from specdec.engine.law import DraftingLaw, LaneLaw
from specdec.engine.step_output import StepOutput, step_output
from specdec.engine.task import Acceptance, LaneKey, State, Task
from specdec.kv.faults import from_outside
from specdec.kv.paged import PagedKVCache
from specdec.kv.pool import KVPool
from specdec.plain_order import PlainBatch
from specdec.stopping import Opinions, StopRules
from specdec.verify import DraftTree, Rows
from specdec.verify.purity import decides_by_row


class Emitted(NamedTuple):
    """What one step gave one request. accepted: draft tokens kept, before any stop rule's cut. reason: why it is
    finished, or None."""

    task: Task
    output: StepOutput
    accepted: int
    reason: str | None


class Lane(Batch):
    """The requests with one `LaneKey`: a batch that they join and leave.

    A row's text, noise, law and K/V are its request's own: whoever else is in the lane leaves no trace in it. What a
    request's own processors and criteria raise is told and ends nobody else's step.

    Args:
        drafter: a clone of its own, None for plain decoding.
        cache: a view of the pool without rows.

    Attributes:
        nodes: drafted tokens of one row under a budget of so many levels, at most.
    """

    law: LaneLaw
    cache: PagedKVCache

    def __init__(
        self, key: LaneKey, drafter: FallbackGuard | None, cache: PagedKVCache, vocab: int, device: torch.device
    ):
        super().__init__(
            Rows.empty(device), cache, LaneLaw(), drafter, key.rule, key.do_sample, vocab, [], [],
            in_order=key.in_order, isolates=True,
        )  # fmt: skip
        self.key = key
        self.tasks: dict[int, Task] = {}
        self.acceptance = Acceptance(0 if drafter is None else drafter.max_depth)
        self._num_faults = 0
        self._num_positions = None if drafter is None else drafter.num_positions
        self.nodes = [0]
        if drafter is not None:
            self.nodes += [drafter.nodes_within(depth) for depth in range(1, drafter.max_depth + 1)]
        self.open(DraftingLaw(self.law))

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
        stop = self.stops[row] = StopRules(task.request.criteria, self.rows, task.opinions)
        stop.pads_finished = True  # nobody waits for other rows' ends
        self.law.join(row, task.request.processors, stop.ends)
        if self.order is not None:
            if task.batch is None:
                task.batch = PlainBatch(task.request.processors, stop, [row], self.rows.prefix(row).clone()[None])
            task.batch.resume(stop, [row], len(task.text))
            self.order.join(task.batch)
        self.noise.join(row, task.seed, 0)
        if self.races is not None:
            self.races.join(row, task.seed, 0)
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
        if self.order is not None:
            self.order.leave(row)
        self.stops.pop(row, None)
        self.tasks.pop(row, None)
        task.row = -1
        if self.drafter is not None:
            self.drafter.stop([row])

    def limit(self, task: Task) -> int:
        """Levels the request may draft at most."""
        if self.drafter is None or task.steps < self.first_draft:
            return 0
        deepest = levels_within(self._num_positions, self.drafter.max_depth, len(task.text))
        return depth_limits(deepest, [self.stops[task.row].remaining(task.row)])[0]

    def budget(self) -> Budget:
        """What this step's trees may cost: the depths that the requests were given."""
        nodes = 0 if self.drafter is None else self.drafter.max_nodes
        return Budget(tuple(task.depth for task in self.live), nodes)

    def emitted(self, decided: Decided, ended: Mapping[int, int], left_out: Collection[Task]) -> list[Emitted]:
        """What everybody but `left_out` got of a step that has been advanced; their texts grow by it."""
        decision, out = decided.decision, []
        for i, task in enumerate(self.live):
            if task in left_out:
                continue
            if i in ended:
                task.ending = "length" if self.stops[task.row].by_length_alone(task.row) else "stop"
            output = step_output(decided, i, len(task.text) - task.prompt_length, task.params.logprobs)
            task.text.extend(output.token_ids)
            task.steps += 1
            out.append(Emitted(task, output, decision.accepted[i], task.ending))
        return out

    def take_faults(self) -> int:
        """Drafter faults since the last call."""
        if self.drafter is None:
            return 0
        new = self.drafter.num_faults - self._num_faults
        self._num_faults = self.drafter.num_faults
        return new

    def _failed_laws(self) -> dict[int, BaseException]:
        of_row = self.law.take_failed()
        return {i: of_row[row] for i, row in enumerate(self.rows.live) if row in of_row} if of_row else {}


class Lanes:
    """Lanes by their key.

    Args:
        drafters: by name; lanes clone them. names: under which of the pool's models each keeps its K/V, if any.
        vocab, device: the target's.
    """

    def __init__(
        self,
        pool: KVPool,
        drafters: Mapping[str, FallbackGuard | None],
        names: Mapping[str, str],
        vocab: int,
        device: torch.device,
    ):
        self._pool, self._drafters, self._names = pool, drafters, names
        self._vocab, self._device = vocab, device
        self._lanes: dict[LaneKey, Lane] = {}

    @property
    def live(self) -> list[Lane]:
        """Those with somebody in them."""
        return [lane for lane in self._lanes.values() if lane.rows.live]

    def of(self, key: LaneKey) -> Lane:
        """The lane of such requests."""
        if key not in self._lanes:
            names = {"draft": self._names[key.draft]} if key.draft in self._names else {}
            drafter, cache = _own(self._drafters[key.draft]), PagedKVCache(self._pool, (), names)
            self._lanes[key] = Lane(key, drafter, cache, self._vocab, self._device)
        return self._lanes[key]

    def leave(self, task: Task) -> None:
        """Take a running request out of its lane."""
        self._lanes[task.lane].leave(task)

    def close(self) -> None:
        """Let go of all of them, with their drafters and sessions."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()


def _own(drafter: FallbackGuard | None) -> FallbackGuard | None:
    """A drafter for one lane; None, which is plain decoding, where it cannot be had."""
    try:
        return None if drafter is None else drafter.clone()
    except BaseException as fault:
        if from_outside(fault):
            raise
        return None


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
