"""One step of the engine: who drafts how much, one pass of the target, what everybody gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from time import monotonic

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.deciding import Decided
from specdec.drafters import FallbackGuard
from specdec.engine.allotment import Allotment
from specdec.engine.lane import Emitted, Lane
from specdec.engine.metrics import Counters
from specdec.engine.passes import EnginePasses, one_row
from specdec.engine.scheduler import Chunk, Limits, Scheduler
from specdec.engine.setup import Pooled
from specdec.engine.task import LaneKey, State, Task
from specdec.kv import SpecdecError, TargetFaultError
from specdec.kv.paged import PagedKVCache
from specdec.verify import DraftTree


class Stepping:
    """Lanes, scheduler and passes of one engine; not safe to be called from several threads at once.

    Args:
        drafters: by name; lanes clone them. pooled: the pool, and under which names it holds the drafters' K/V.
        adaptive: share drafts by what they bring (see `Allotment`).
    """

    def __init__(
        self,
        target: PreTrainedModel,
        drafters: Mapping[str, FallbackGuard | None],
        pooled: Pooled,
        limits: Limits,
        counters: Counters,
        adaptive: bool,
    ):
        self.drafters = drafters
        self.pool = pooled.pool
        self.limits = limits
        self.num_steps = 0
        self._names = pooled.names
        self._counters = counters
        self._passes = EnginePasses(target, self.pool)
        self.device = self._passes.device
        self._lanes: dict[LaneKey, Lane] = {}
        self.scheduler = Scheduler(self.pool, limits, lambda task: self._lanes[task.lane].leave(task))
        self._allotment = Allotment(limits, adaptive)
        self._finished: list[Task] = []

    @property
    def vocab(self) -> int:
        return self._passes.vocab

    def contexts(self) -> list[AbstractContextManager[object]]:
        """To be entered in this order, and left in the opposite one, around any number of steps."""
        drafting = [drafter.running() for drafter in self.drafters.values() if drafter is not None]
        return [self._passes.prepared(), *drafting]

    def step(self) -> list[Task]:
        """One step. Returns the requests that are done with it; their handles have been told."""
        self._finished = []
        self._sweep()
        for task in self.scheduler.admit(self.num_steps):
            task.started = task.started or monotonic()
        self._plan()
        chunks = self.scheduler.chunks(self._allotment.left_for_prefill(self._live_lanes(), self.scheduler.prefilling))
        lanes = self._live_lanes()  # whoever had to give way is gone
        if lanes:
            chunks = self._decode(lanes, chunks)
        if chunks:
            self._prefill(chunks)
        for task in [task for task in self.scheduler.prefilling if task.done == task.wanted]:
            assert task.sequence is not None
            self.pool.publish(task.sequence, task.text[: task.wanted])
            self.scheduler.started(task)
            self._lane(task.lane).join(task)
        self.num_steps += 1
        self._counters.totals["num_steps"] = self.num_steps
        self._counters.totals["num_preemptions"] = self.scheduler.num_preemptions
        return self._finished

    def fail(self, task: Task, error: SpecdecError) -> None:
        """End a request with an error."""
        self.scheduler.release(task, publish=False)
        self.done(task, "error", error)

    def restart(self, tasks: Sequence[Task]) -> None:
        """Drop lanes and all K/V, whatever state they are in; these requests wait again, nobody else is known."""
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            lane.close()
        self.pool.reset()
        self.scheduler.restart(tasks)

    def close(self) -> None:
        """Let go of drafters and their sessions."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes = {}

    def _live_lanes(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if lane.rows.live]

    def _lane(self, key: LaneKey) -> Lane:
        if key not in self._lanes:
            drafter = self.drafters[key.draft]
            names = {"draft": self._names[key.draft]} if key.draft in self._names else {}
            cache = PagedKVCache(self.pool, (), names)
            self._lanes[key] = Lane(key, None if drafter is None else drafter.clone(), cache, self.vocab, self.device)
        return self._lanes[key]

    def _sweep(self) -> None:
        """End what was cancelled, and what has run out of time."""
        now = monotonic()
        for task in [*self.scheduler.waiting, *self.scheduler.active]:
            late = task.params.timeout is not None and now - task.submitted > task.params.timeout
            if task.cancelled or late:
                self.scheduler.release(task, publish=True)
                self.done(task, "cancelled" if task.cancelled else "timeout")

    def _plan(self) -> None:
        """Depths of this step's drafts, and pages for them."""
        self._allotment.plan(self._live_lanes(), bool(self.scheduler.prefilling))
        slots = self._allotment.slots(self._live_lanes())
        for task in sorted(self.scheduler.running, key=lambda task: task.urgency(0)):
            if task.state is State.RUNNING:
                self.scheduler.reserve(task, slots)

    def _prefill(self, chunks: Sequence[Chunk]) -> None:
        """Run these chunks; a request on which the target fails ends, the others get theirs."""
        wanted = {chunk.task: chunk.task.done + chunk.num_tokens for chunk in chunks}
        try:
            self._passes.prefill(chunks)
        except Exception:
            for chunk in chunks:
                if chunk.task.done == wanted[chunk.task]:
                    continue
                try:
                    self._passes.prefill([chunk])
                except Exception as fault:
                    self.fail(
                        chunk.task, self._passes.fault(chunk.task, f"{type(fault).__name__} in the prefill: {fault}")
                    )
        done = [chunk for chunk in chunks if chunk.task.state is State.PREFILLING]
        self._counters.add("num_prefilled_tokens", sum(chunk.num_tokens for chunk in done))

    def _decode(self, lanes: Sequence[Lane], chunks: list[Chunk]) -> list[Chunk]:
        """Draft, verify and emit for every running request, with the chunks of prefill in the target's pass.

        Returns:
            chunks that are still to be run: all of them where that pass failed.
        """
        start = monotonic()
        levels = max(task.depth for lane in lanes for task in lane.live)
        trees = [lane.propose() for lane in lanes]
        errors: dict[Task, TargetFaultError] = {}
        logits, left = self._verified(lanes, trees, chunks)
        if logits is None:  # perhaps one request's fault, perhaps too large a pass: each by itself
            logits = [
                torch.zeros(*tree.tokens.shape, self.vocab, dtype=torch.float32, device=tree.tokens.device)
                for tree in trees
            ]
            for i, lane in enumerate(lanes):
                trees[i], logits[i] = self._apart(lane, trees[i], logits[i], range(len(lane.live)), errors)
        for lane, tree, scores in zip(lanes, trees, logits, strict=True):
            decided, whole = self._decided(lane, tree, scores, errors)
            live = lane.live
            for i, raised in decided.failed.items():
                errors.setdefault(live[i], self._passes.fault(live[i], f"{type(raised).__name__} of its own: {raised}"))
            out, stopped = lane.advance(decided, whole, set(errors))
            for emitted in out:
                self._emit(lane, emitted)
            for task, raised in stopped.items():
                errors[task] = self._passes.fault(task, f"{type(raised).__name__} of its own: {raised}")
            self._counters.add("num_drafter_faults", lane.take_faults())
        for task, error in errors.items():
            self.fail(task, error)
        width = max(tree.tokens.shape[1] for tree in trees)
        if not chunks:  # what a prompt costs says nothing about drafts
            self._allotment.took(width * sum(tree.tokens.shape[0] for tree in trees), levels, monotonic() - start)
        return left

    def _verified(
        self, lanes: Sequence[Lane], trees: Sequence[DraftTree], chunks: list[Chunk]
    ) -> tuple[list[Tensor] | None, list[Chunk]]:
        """Logits of all trees, None where they cannot be had together; chunks of prefill that are still to be run."""
        try:
            logits = self._passes.step(lanes, trees, chunks)
            self._counters.add("num_prefilled_tokens", sum(chunk.num_tokens for chunk in chunks))
            return logits, []
        except Exception:
            if chunks:  # a prompt's fault must leave no trace in anybody's draft
                return self._verified(lanes, trees, [])[0], chunks
            return None, chunks

    def _decided(
        self, lane: Lane, tree: DraftTree, logits: Tensor, errors: dict[Task, TargetFaultError]
    ) -> tuple[Decided, Tensor]:
        """The lane's verdicts; rows with NaN among their nodes are run again without the nodes that bring it."""
        decided = lane.decide(tree, logits)
        live = lane.live
        sick = [i for i, flag in enumerate(decided.decision.sick) if flag and live[i] not in errors]
        if sick:
            tree, logits = self._apart(lane, tree, logits, sick, errors)
            decided = lane.decide(tree, logits, again=True)
            for i in sick:
                if decided.decision.sick_path[i] and live[i] not in errors:
                    errors[live[i]] = self._passes.fault(live[i], "NaN in its logits")
        return decided, logits

    def _apart(
        self, lane: Lane, tree: DraftTree, logits: Tensor, rows: Sequence[int], errors: dict[Task, TargetFaultError]
    ) -> tuple[DraftTree, Tensor]:
        """The given rows' nodes again, each request by itself; those the target fails on get an error."""
        counts, logits = tree.num_nodes.clone(), logits.clone()
        live = lane.live
        for i in rows:
            try:
                kept, own = self._passes.alone(lane, live[i], one_row(tree, i))
            except TargetFaultError as fault:
                errors[live[i]] = self._passes.fault(live[i], str(fault))
                logits[i] = 0.0
                continue
            counts[i] = kept.num_nodes[0]
            logits[i] = 0.0
            logits[i, : own.shape[1]] = own[0]
        return replace(tree, num_nodes=counts), logits

    def _emit(self, lane: Lane, emitted: Emitted) -> None:
        """Tokens to the handle, figures to the counters, the end if it is one."""
        task, now = emitted.task, monotonic()
        if emitted.tokens:  # first: what nobody was told is taken again after an interruption, and must not be known
            task.handle.push(emitted.tokens)
        task.num_draft_tokens += emitted.drafted
        task.num_accepted_tokens += emitted.accepted
        if lane.drafter is not None:
            self._counters.drafted(emitted.drafted, emitted.accepted)
        if task.acceptance is not None and task.depth:
            task.acceptance.observe(task.depth, emitted.accepted)
        if emitted.tokens:
            self._counters.add("num_generation_tokens", len(emitted.tokens))
            if task.last_token is None:
                task.first_token = now
                self._counters.first_token.add(now - task.submitted)
            else:
                self._counters.between.add((now - task.last_token) / len(emitted.tokens), len(emitted.tokens))
            task.last_token = now
        if emitted.reason is not None:
            self.scheduler.release(task, publish=True)
            self.done(task, emitted.reason)

    def done(self, task: Task, reason: str, error: SpecdecError | None = None) -> None:
        """The request holds nothing any more: tell its handle, and count it."""
        now = monotonic()
        task.state = State.DONE
        self._finished.append(task)
        self._counters.finished[reason] = self._counters.finished.get(reason, 0) + 1
        self._counters.whole.add(now - task.submitted)
        if task.started is not None:
            self._counters.queued.add(task.started - task.submitted)
        self._counters.add("num_prefix_hit_tokens", task.num_cached_tokens)
        task.handle.finish(None if error is not None else task.result(reason, now), error)
