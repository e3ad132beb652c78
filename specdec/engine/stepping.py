"""One step of the engine: who drafts how much, one pass of the target, what everybody gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from time import monotonic, perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.decision import Decided
from specdec.drafters import FallbackGuard
from specdec.engine.budget import DraftDepths
from specdec.engine.errors import EngineFaultError
from specdec.engine.lane import Emitted, Lane, Lanes
from specdec.engine.metrics import Counters
from specdec.engine.passes import EnginePasses
from specdec.engine.scheduler import Chunk, Limits, Scheduler
from specdec.engine.setup import Pooled, models_of
from specdec.engine.task import State, Task
from specdec.kv import SpecdecError
from specdec.kv.faults import described, from_outside
from specdec.verify import DraftTree
from specdec.verify.passes.packed_copies import forget
from specdec.verify.weights import Weights


class Stepping:
    """Lanes, scheduler and passes of one engine; not safe to be called from several threads at once.

    Args:
        drafters: by name; lanes clone them. pooled: the pool, and under which names it holds the drafters' K/V.
        adaptive: share drafts by what they bring (see `DraftDepths`).
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
        self._counters = counters
        self._target, self._passes = target, EnginePasses(target, self.pool)
        self.device = self._passes.target.device
        self._lanes = Lanes(self.pool, drafters, pooled.names, self.vocab, self.device)
        self.scheduler = Scheduler(self.pool, limits, self._lanes.leave)
        self._draft_depths = DraftDepths(limits, adaptive)
        self._finished: list[Task] = []
        self._weights = Weights([target, *(model for one in drafters.values() for model in models_of(one))])

    @property
    def vocab(self) -> int:
        return self._passes.target.vocab

    @property
    def max_request_tokens(self) -> int:
        """What always fits an empty pool."""
        return self.scheduler.room - max([1, *(one.tail_slots for one in self.drafters.values() if one is not None)])

    def take(self, tasks: Sequence[Task]) -> None:
        """These requests have arrived."""
        self.scheduler.waiting.extend(tasks)
        self._counters.add("num_prompt_tokens", sum(task.prompt_length for task in tasks))

    def contexts(self) -> list[AbstractContextManager[object]]:
        """To be entered in this order, and left in the opposite one, around any number of steps."""
        drafting = [drafter.running() for drafter in self.drafters.values() if drafter is not None]
        return [self._passes.target.prepared(), *drafting]

    def step(self) -> list[Task]:
        """One step. Returns the requests that are done with it; their handles have been told."""
        self._finished = []
        self._sweep()
        for task in self.scheduler.admit(self.num_steps):
            task.started = monotonic() if task.started is None else task.started
        self._plan()
        chunks = self.scheduler.chunks(self._draft_depths.left_for_prefill(self._lanes.live, self.scheduler.prefilling))
        lanes = self._lanes.live  # whoever had to give way is gone
        if lanes:
            chunks = self._decode(lanes, chunks)
        if chunks:
            self._prefill(chunks)
        for task in [task for task in self.scheduler.prefilling if task.done == task.wanted]:
            self._join(task)
        self.num_steps += 1
        self._counters.totals["num_steps"] = self.num_steps
        self._counters.totals["num_preemptions"] = self.scheduler.num_preemptions
        return self._finished

    def fail(self, task: Task, error: SpecdecError) -> None:
        """End a request with an error."""
        self.scheduler.release(task, publish=False)
        self.done(task, "error", error)

    def models_changed(self) -> bool:
        """Is the K/V at hand that of earlier weights? Asked always before a request may be given some of it, and now
        and then for those that run."""
        return (self.scheduler.may_admit or perf_counter() >= self._weights.next_look) and self._weights.changed()

    def renew(self) -> None:
        """Forget all K/V: every request that has some computes it again from its text, and goes on from there."""
        active = self.scheduler.active
        for task in active:
            task.put_back()
        self.restart([*self.scheduler.waiting, *active])
        self.pool.sharing = self._weights.steady

    def read_anew(self) -> None:
        """The same after changes of weights that nobody sees: what was read of them is forgotten, too."""
        forget(self._target)
        self.renew()

    def abandon(self, tasks: Sequence[Task], fault: BaseException) -> None:
        """End these requests, which are all there are, whatever state they and the pool are in."""
        self.restart([])
        for task in tasks:
            task.put_back()
            error = EngineFaultError(f"a step of the engine failed ({described(fault)})", task.handle.token_ids)
            error.__cause__ = fault
            self.done(task, "error", error)

    def restart(self, tasks: Sequence[Task]) -> None:
        """Drop lanes and all K/V, whatever state they are in; these requests wait again, nobody else is known."""
        self._lanes.close()
        self.pool.reset()
        self.scheduler.restart(tasks)

    def close(self) -> None:
        """Let go of drafters and their sessions."""
        self._lanes.close()

    def _join(self, task: Task) -> None:
        """A request whose prefill is complete decodes from the next step on, unless its own code fails here."""
        assert task.sequence is not None
        self.pool.publish(task.sequence, task.text[: task.wanted])
        lane = self._lanes.of(task.lane)
        self.scheduler.started(task)
        try:
            lane.join(task)
        except BaseException as fault:
            if from_outside(fault):
                raise
            self.fail(task, task.fault("its processors or stop rules cannot be set up", fault))

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
        self._draft_depths.assign(self._lanes.live, bool(self.scheduler.prefilling))
        slots = self._draft_depths.slots(self._lanes.live)
        for task in sorted(self.scheduler.running, key=lambda task: task.urgency(0)):
            if task.state is State.RUNNING:
                self.scheduler.reserve(task, slots)

    def _prefill(self, chunks: Sequence[Chunk]) -> None:
        """Run these chunks; a request on which the target fails ends, the others get theirs."""
        wanted = {chunk.task: chunk.task.done + chunk.num_tokens for chunk in chunks}
        try:
            self._passes.prefill(chunks)
        except Exception as first:
            if from_outside(first):
                raise
            for chunk in chunks:
                if chunk.task.done == wanted[chunk.task]:
                    continue
                try:
                    self._passes.prefill([chunk])
                except Exception as fault:
                    why = f"in the prefill: {described(fault)}"
                    error = self._passes.fault(chunk.task, why)
                    error.__cause__ = fault
                    self.fail(chunk.task, error)
        done = [chunk for chunk in chunks if chunk.task.state is State.PREFILLING]
        self._counters.add("num_prefilled_tokens", sum(chunk.num_tokens for chunk in done))

    def _decode(self, lanes: Sequence[Lane], chunks: list[Chunk]) -> list[Chunk]:
        """Draft, verify and emit for every running request, with the chunks of prefill in the target's pass.

        Returns:
            chunks that are still to be run: all of them where that pass failed.
        """
        start = monotonic()
        levels = max(task.depth for lane in lanes for task in lane.live)
        steps = [[task.steps for task in lane.live] for lane in lanes]
        trees = [lane.propose(lane.budget(), own) for lane, own in zip(lanes, steps, strict=True)]
        errors: dict[Task, SpecdecError] = {}
        logits, left = self._verified(lanes, trees, chunks)
        if logits is None:  # perhaps one request's fault, perhaps too large a pass: each by itself
            logits = [
                torch.zeros(*tree.tokens.shape, self.vocab, dtype=torch.float32, device=tree.tokens.device)
                for tree in trees
            ]
            for i, lane in enumerate(lanes):
                trees[i], logits[i] = self._passes.apart(lane, trees[i], logits[i], range(len(lane.live)), errors)
        for lane, tree, raw, own in zip(lanes, trees, logits, steps, strict=True):
            self._advance(lane, lane.decide(tree, raw, own, partial(self._passes.apart, lane, errors=errors)), errors)
        for task, error in errors.items():
            self.fail(task, error)
        width = max(tree.tokens.shape[1] for tree in trees)
        if not chunks:  # what a prompt costs says nothing about drafts
            self._draft_depths.took(width * sum(tree.tokens.shape[0] for tree in trees), levels, monotonic() - start)
        return left

    def _verified(
        self, lanes: Sequence[Lane], trees: Sequence[DraftTree], chunks: list[Chunk]
    ) -> tuple[list[Tensor] | None, list[Chunk]]:
        """Logits of all trees, None where they cannot be had together; chunks of prefill that are still to be run."""
        try:
            logits = self._passes.step(lanes, trees, chunks)
            self._counters.add("num_prefilled_tokens", sum(chunk.num_tokens for chunk in chunks))
            return logits, []
        except Exception as fault:
            if from_outside(fault):
                raise
            if chunks:  # a prompt's fault must leave no trace in anybody's draft
                return self._verified(lanes, trees, [])[0], chunks
            return None, chunks

    def _advance(self, lane: Lane, decided: Decided, errors: dict[Task, SpecdecError]) -> None:
        """Give everybody in the lane what was decided; those who cannot go on get an entry in `errors` instead."""
        live = lane.live
        for i, targets in decided.faulty.items():
            if live[i] not in errors:
                errors[live[i]] = (
                    self._passes.fault(live[i], "NaN in its logits")
                    if targets
                    else live[i].fault("its logits processors left no law: NaN, or no token that is possible")
                )
        for i, raised in decided.failed.items():
            errors.setdefault(live[i], live[i].fault("its processors or stop rules failed", raised))
        advanced = lane.advance(decided, [i for i, task in enumerate(live) if task in errors])
        for i, raised in advanced.raised.items():
            errors[live[i]] = live[i].fault("its stop rules failed", raised)
        for emitted in lane.emitted(decided, advanced.ended, errors):
            self._emit(lane, emitted)
        self._counters.add("num_drafter_faults", lane.take_faults())

    def _emit(self, lane: Lane, emitted: Emitted) -> None:
        """Tokens to the handle, figures to the counters, the end if it is one."""
        task, output, now = emitted.task, emitted.output, monotonic()
        num_tokens = len(output.token_ids)
        if num_tokens:  # first: what nobody was told is taken again after an interruption, and must not be known
            task.handle.push(output)
        task.num_draft_tokens += output.num_draft_tokens
        task.num_accepted_tokens += emitted.accepted
        if lane.drafter is not None:
            self._counters.drafted(output.num_draft_tokens, emitted.accepted)
        if task.acceptance is not None and task.depth:
            task.acceptance.observe(task.depth, emitted.accepted)
        if num_tokens:
            self._counters.add("num_generation_tokens", num_tokens)
            if task.last_token is None:
                task.first_token = now
                self._counters.first_token.add(now - task.submitted)
            else:
                self._counters.between.add((now - task.last_token) / num_tokens, num_tokens)
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
