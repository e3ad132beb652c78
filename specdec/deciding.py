"""The middle of a step, between the forward passes: noise, law, rule and verdict for the rows of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters import Budget, FallbackGuard
from specdec.drafters.base import NodeLaw
from specdec.plain_order import PlainOrder
from specdec.verify import DraftTree, Noise, NoiseStream, Rows
from specdec.verify.draft_kind import NO_DRAFTS, DraftKind
from specdec.verify.host_integers import argmax, on_host
from specdec.verify.race import RaceStream
from specdec.verify.rules import AcceptanceRule, auto_rule
from specdec.verify.rules.base import sample_from
from specdec.verify.tree import Verdict


class Decision:
    """A verdict on the host: plain lists, one entry per live row.

    sick, sick_path: per row, is there NaN in the law of any node, and of any node on the kept path.
    accepted, drafted: draft tokens kept and proposed; reached: depths of the tree that a decision was taken at.
    paths: kept nodes, root first; runs: emitted tokens; kinds: "accepted", "recovered" or "bonus" for each of them.
    """

    def __init__(
        self,
        accepted: list[int],
        next_tokens: list[int],
        paths: list[list[int]],
        trees: Iterable[tuple[int, list[int], list[int], list[bool]]],
        kept_end: Sequence[bool] | None = None,
    ):
        """Args:
        trees: per row, its number of nodes, and of all nodes token, parent and sickness.
        kept_end: per row, whether the next token is one more draft token that was kept (see `Walk`).
        """
        self.accepted = accepted
        self.sick, self.sick_path, self.drafted, self.reached = [], [], [], []
        self.paths, self.runs, self.kinds = [], [], []
        for kept, end, padded, (count, tokens, parents, sick) in zip(accepted, next_tokens, paths, trees, strict=True):
            path = padded[: kept + 1]
            refused = path[kept] in parents[1:count]  # it had children, none of which was kept
            self.sick.append(any(sick))
            self.sick_path.append(any(sick[node] for node in path))
            self.drafted.append(count - 1)
            self.reached.append(kept + refused)
            self.paths.append(path)
            self.runs.append([*(tokens[node] for node in path[1:]), end])
            self.kinds.append([*["accepted"] * kept, "recovered" if refused else "bonus"])
        for row, also in enumerate(kept_end or ()):
            if also:
                accepted[row] += 1
                self.reached[row] = accepted[row]
                self.kinds[row][-1] = "accepted"


def read_verdict(tree: DraftTree, sick: Tensor, verdict: Verdict, kept_end: Sequence[bool] | None = None) -> Decision:
    """Bring the verdict to the host: the one synchronisation of a step.

    Args:
        sick: bool `[rows, nodes]`, is there NaN in the law of a node. kept_end: see `Decision`.
    """
    accepted, tokens, paths, *trees = on_host(
        verdict.num_accepted, verdict.next_token, verdict.path, tree.num_nodes, tree.tokens, tree.parents, sick
    )
    return Decision(accepted, tokens, paths, zip(*trees, strict=True), kept_end)


def undrafted(law: Tensor, noise: Noise | None) -> Verdict:
    """Where nothing was drafted, every lossless rule draws from the target's law, with this very uniform; greedy
    decoding (no noise) takes its largest entry.

    Args:
        law: float `[rows, 1, vocab]`.
    """
    nothing = torch.zeros(len(law), dtype=torch.int64, device=law.device)
    token = argmax(law)[:, 0] if noise is None else sample_from(law[:, 0], noise.residual)
    return Verdict(nothing[:, None], nothing, token)


class Decided(NamedTuple):
    """scores, law: float `[rows, nodes, vocab]`; rule: the one that decided.

    in_order: decided in plain order: the stop rules have been asked, and the law is that of the visited nodes only.
    failed: by live row, what its own processors or criteria raised; it gets nothing of this step.
    """

    scores: Tensor
    law: Tensor
    verdict: Verdict
    rule: AcceptanceRule
    decision: Decision
    in_order: bool = False
    failed: Mapping[int, BaseException] = MappingProxyType({})


class Decider:
    """Asks a drafter for trees and a rule for verdicts, each row with its own noise.

    Args:
        rule: None when it depends on each tree, because the drafter does not say what it proposes.
        sampling: False means greedy decoding.
        noise: of the rows there are, and of those that join. race: only where the rule runs one.
        order: what decides where processors must be called in plain order; `law` is then one to draft by.
    """

    def __init__(
        self,
        rows: Rows,
        law: NodeLaw,
        drafter: FallbackGuard | None,
        rule: AcceptanceRule | None,
        sampling: bool,
        noise: NoiseStream,
        race: RaceStream | None,
        order: PlainOrder | None = None,
    ):
        self._order = order
        self._rows, self._law, self._drafter, self._rule = rows, law, drafter, rule
        self._sampling = sampling
        self._noise, self._races = noise, race
        self._still = torch.zeros((), dtype=torch.float64, device=rows.device)

    @property
    def race(self) -> Callable[[int], Tensor] | None:
        """What a `Session` is given as its race: None unless the rule runs one."""
        return None if self._races is None else self.next_race

    def join(self, row: int, seed: int, request: int = 0) -> None:
        """`row` draws under this key from now on."""
        self._noise.join(row, seed, request)
        if self._races is not None:
            self._races.join(row, seed, request)

    def propose(self, budget: Budget, steps: int | Sequence[int]) -> DraftTree:
        """The drafter's trees; bare roots without a drafter.

        Args:
            steps: the number of this step, for all live rows or one for each of them.
        """
        if self._drafter is None or budget.max_depth <= 0:  # no noise is computed for drafts that are not asked for
            return DraftTree.root_only(self._rows.roots())
        count = self._drafter.num_uniforms
        if not self._sampling:
            return self._drafter.propose(budget, self._still.expand(len(self._rows.live), count))
        return self._drafter.propose(budget, self._noise.draft(self._rows.live, steps, count))

    def decide(self, tree: DraftTree, logits: Tensor, steps: int | Sequence[int], again: bool = False) -> Decided:
        """Scores and law of every node, and what the rule keeps. A repeated decision may use the same noise: nothing
        of the first one was emitted.

        Args:
            logits: `[rows, nodes, vocab]`; steps: as given to `propose`.
            again: the tree was already run again because of NaN in it. In plain order the first decision of such a
                tree asks nobody, and says only which rows are sick.
        """
        rule = self._rule
        if rule is None:
            kind = NO_DRAFTS if tree.tokens.shape[1] == 1 else DraftKind.of(tree)
            rule = auto_rule(kind, top_down=self._order is not None)
        noise = self._accept_noise(tree, steps)

        def judge(law: Tensor) -> Verdict:
            if tree.tokens.shape[1] == 1 and rule.lossless and not rule.uses_race:
                return undrafted(law, noise if self._sampling else None)
            return rule(tree, law, noise)

        if self._order is not None:
            return self._decide_in_order(self._order, tree, logits, rule, judge, again)
        scores = self._law(logits, self._rows, tree.tokens, tree.parents, range(tree.tokens.shape[1]))
        if self._sampling:
            law = F.softmax(scores, dim=-1)
            sick = law[..., 0].isnan()  # NaN anywhere in a row is NaN in its sum, hence everywhere
        else:
            law, sick = scores, scores.amax(-1).isnan()
            if scores is not logits:  # NaN that processors make is taken as it comes, as plain greedy decoding does
                sick = sick & logits.amax(-1).isnan()
        verdict = judge(law)
        return Decided(scores, law, verdict, rule, read_verdict(tree, sick, verdict))

    def _decide_in_order(
        self,
        order: PlainOrder,
        tree: DraftTree,
        logits: Tensor,
        rule: AcceptanceRule,
        judge: Callable[[Tensor], Verdict],
        again: bool,
    ) -> Decided:
        sick = logits.amax(-1).isnan()
        if not again and bool(sick.any()):
            verdict = undrafted(torch.zeros_like(logits[:, :1], dtype=torch.float32), None)
            return Decided(logits, logits, verdict, rule, read_verdict(tree, sick, verdict), in_order=True)
        walk = order.walk(tree, logits, sick, judge)
        decision = read_verdict(tree, sick, walk.verdict, walk.kept_end)
        decision.sick_path = walk.sick
        return Decided(walk.scores, walk.law, walk.verdict, rule, decision, True, walk.failed)

    def next_race(self, depths: int) -> Tensor:
        """The noise of the next `depths` positions of each live row's real text (see `Session.race`)."""
        assert self._races is not None
        return self._races(self._rows.live, self._rows.lengths(), depths)

    def _accept_noise(self, tree: DraftTree, steps: int | Sequence[int]) -> Noise:
        """Fresh uniforms for this step's rule; zeros where it uses none (greedy decoding, races)."""
        rows, nodes = tree.tokens.shape
        if self._sampling and self._races is None:
            return self._noise.accept(self._rows.live, steps, nodes)
        race = None if self._races is None else self.next_race(tree.max_depth + 1)
        return Noise(self._still.expand(rows, nodes), self._still.expand(rows), race)
