"""The decode loop on ranks that hold a target together: the first rank's, which decides, and the others', which follow.

Every rank makes every pass of the target; but logits may differ in their last bit, and clocks and seeds at will. So the
first rank alone drafts and decides. Before each pass it tells, in one broadcast, what it decided after the last one and
which trees come next. On all other ranks the caller's processors, criteria and streamers are called as plain `generate`
calls them there, and their answers are the first rank's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.batch import Rerun
from specdec.decision import Decided, Decision, verdict_of
from specdec.kv.errors import LeadingRankError, TargetFaultError
from specdec.loop import DecodeLoop
from specdec.planner.measure import scratch_request
from specdec.ranks.channel import Ranks
from specdec.request import Request
from specdec.trace import StepTrace
from specdec.verify import DraftTree, Topology
from specdec.verify.host_integers import on_host
from specdec.verify.rules.registry import make_rule

Message = dict[str, Any]


class LeadingLoop(DecodeLoop):
    """The first rank's: it decides as a loop alone does, and tells the others.

    Args:
        scratch: its text is nobody's; steps are timed on it. rest: see `DecodeLoop`.
    """

    def __init__(self, ranks: Ranks, *rest: Any, scratch: bool = False, **named: Any):
        super().__init__(*rest, **named)
        self._ranks, self._scratch = ranks, scratch
        self._told: Message = {}
        self._answers: list[list[bool]] = []
        self.stop.heard = partial(_noted, self._answers)  # not of `self`: a cycle would keep the K/V alive
        self.passes.alone = False
        self.passes.announce = lambda tree: ranks.send({"again": _lists(tree)})

    def run(self) -> Any:
        self._ranks.send({"scratch": self.request.input_ids.tolist() if self._scratch else None})
        try:
            return super().run()
        except BaseException as fault:
            self._ranks.tell_failure(fault)
            raise
        finally:
            self._ranks.awaited = self._scratch  # they wait for the next loop then

    def _prefill(self) -> None:
        super()._prefill()
        self._ranks.awaited = True

    def _draft(self, step: int) -> DraftTree:
        tree = super()._draft(step)
        self._tell(tree)
        return tree

    def _verify(self, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        verified = super()._verify(tree)
        self._ranks.awaited = True
        return verified

    def _healthy_part(self, tree: DraftTree, logits: Tensor, sick: list[int]) -> tuple[DraftTree, Tensor]:
        part = super()._healthy_part(tree, logits, sick)
        self._ranks.awaited = True
        return part

    def decide(self, tree: DraftTree, logits: Tensor, steps: int | Sequence[int], rerun: Rerun) -> Decided:
        decided = super().decide(tree, logits, steps, rerun)
        self._told = {"decision": decided.decision.to_dict(), "rule": decided.rule.name}
        return decided

    def step(self) -> tuple[StepTrace, list[int]]:
        done = super().step()
        if not self.rows.live:
            self._tell(None)
        return done

    def _tell(self, tree: DraftTree | None) -> None:
        self._ranks.send({**self._told, "answers": self._answers, "tree": None if tree is None else _lists(tree)})
        self._told = {}
        self._answers.clear()


class FollowingLoop(DecodeLoop):
    """Any other rank's: what it drafts, keeps and ends is what it is told. Its own drafter is not asked."""

    def __init__(self, ranks: Ranks, request: Request, target: PreTrainedModel, rule: str, page_size: int | None):
        super().__init__(request, target, None, rule, page_size=page_size)
        self._ranks = ranks
        self._next: Message | None = None
        self._answers: list[list[bool]] = []
        self.rule = None  # the report names the one that decided
        self.stop.heard = partial(_told, self._answers)
        self.passes.alone = False
        self.report.notes.append(f"rank {ranks.rank} of {ranks.size}: drafts and decisions are rank 0's")

    def _draft(self, step: int) -> DraftTree:
        message, self._next = self._next or self._ranks.receive(), None
        return _tree(message["tree"], self.rows.device)

    def decide(self, tree: DraftTree, logits: Tensor, steps: int | Sequence[int], rerun: Rerun) -> Decided:
        message, known = self._ranks.receive(), self.passes.features
        if "again" in message:
            self.passes.reread()
        while "again" in message:
            again, here = self.passes.afresh(_tree(message["again"], self.rows.device))
            tree = again if again.tokens.shape[1] > tree.tokens.shape[1] else tree
            logits = _leading(here, logits)
            self.passes.features = [_leading(own, old) for own, old in zip(self.passes.features, known, strict=True)]
            message, known = self._ranks.receive(), self.passes.features
        self._next, self._answers[:] = message, message["answers"]
        decision, rule = Decision.from_dict(message["decision"]), make_rule(message["rule"])
        self.report.lossless = rule.lossless
        verdict = verdict_of(decision.paths, [run[-1] for run in decision.runs], tree)
        scores = logits
        if self.order is not None:
            healthy = torch.zeros_like(tree.tokens, dtype=torch.bool)
            scores = self.order.walk(tree, logits, healthy, lambda law: verdict).scores
        elif self.record is not None:
            scores = self.law(logits, self.rows, tree.tokens, tree.parents, range(tree.tokens.shape[1]))
        return Decided(tree, logits, scores, scores, verdict, rule, decision, self.order is not None)


def following(
    ranks: Ranks, request: Request, target: PreTrainedModel, rule: str, page_size: int | None
) -> FollowingLoop:
    """The loop of a call on a rank that follows; before, it takes part in what the first rank measures."""
    while (prompt := ranks.receive()["scratch"]) is not None:
        text = torch.tensor(prompt, device=request.input_ids.device)
        try:
            FollowingLoop(ranks, scratch_request(request, text), target, rule, None).run()
        except (LeadingRankError, TargetFaultError):  # enough was measured, or nothing can be
            continue
    return FollowingLoop(ranks, request, target, rule, page_size)


def _noted(answers: list[list[bool]], own: list[bool]) -> list[bool]:
    """What the criteria said here counts, and is remembered for the others."""
    answers.append(own)
    return own


def _told(answers: list[list[bool]], own: list[bool]) -> list[bool]:
    """What they said on the first rank counts."""
    return answers.pop(0)


def _leading(states: Tensor, others: Tensor) -> Tensor:
    """`states` of the first nodes, and for those behind them the `others`."""
    return torch.cat([states, others[:, states.shape[1] :]], dim=1)


def _lists(tree: DraftTree) -> Message:
    tokens, parents, counts = on_host(tree.tokens, tree.parents, tree.num_nodes)
    shape = None if tree.topology is None else tree.topology.parents
    return {"tokens": tokens, "parents": parents if shape is None else None, "counts": counts, "shape": shape}


def _tree(given: Message, device: torch.device) -> DraftTree:
    """The tree to run: where a token came from is nobody's business here."""
    tokens, counts = (torch.tensor(given[name], device=device) for name in ("tokens", "counts"))
    shape = None if given["shape"] is None else Topology(tuple(given["shape"]))
    if shape is None:
        parents = torch.tensor(given["parents"], device=device)
    else:
        parents = shape.parents_on(device).expand(tokens.shape)
    return DraftTree(tokens, parents, counts, torch.zeros_like(tokens, dtype=torch.bool), topology=shape)
