"""The middle of a step, between the forward passes: noise, law, rule and verdict for the rows of one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters import Budget, FallbackGuard
from specdec.drafters.base import NodeLaw
from specdec.verify import DraftTree, Noise, NoiseStream, Rows
from specdec.verify.kinds import NO_DRAFTS, DraftKind
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

    def __init__(self, packed: list[list[int]], width: int):
        self.sick = [row[3] >= 1 for row in packed]
        self.sick_path = [row[3] >= 2 for row in packed]
        self.accepted = [row[0] for row in packed]
        self.drafted = [row[4] for row in packed]
        self.reached = [row[5] for row in packed]
        self.paths = [row[6 : 7 + row[0]] for row in packed]
        self.runs = [[*row[7 + width : 7 + width + row[0]], row[1]] for row in packed]
        self.kinds = [["accepted"] * row[0] + ["recovered" if row[2] else "bonus"] for row in packed]


def read_verdict(tree: DraftTree, law: Tensor, verdict: Verdict) -> Decision:
    """Bring the verdict to the host: the one synchronisation of a step.

    Args:
        law: float `[rows, nodes, vocab]`, what the rule was given.
    """
    drafted = tree.num_nodes - 1
    if tree.is_shared_chain:  # a path is a prefix of the nodes
        children = verdict.num_accepted < drafted
        tokens = tree.tokens
    else:
        node = verdict.path.gather(1, verdict.num_accepted[:, None])
        children = ((tree.parents == node) & tree.valid).any(1)
        tokens = tree.tokens.gather(1, verdict.path.clamp(min=0))
    sick = law.amax(-1).isnan()
    sick_path = sick.gather(1, verdict.path.clamp(min=0))
    flags = sick.any(1).long() + sick_path.any(1)
    reached = verdict.num_accepted + children
    head = torch.stack([verdict.num_accepted, verdict.next_token, children, flags, drafted, reached], dim=1)
    return Decision(torch.cat([head, verdict.path, tokens], dim=1).tolist(), verdict.path.shape[1])


def undrafted(law: Tensor, noise: Noise) -> Verdict:
    """Where nothing was drafted, every lossless rule draws from the target's law, with this very uniform.

    Args:
        law: float `[rows, 1, vocab]`.
    """
    nothing = torch.zeros(len(law), dtype=torch.int64, device=law.device)
    return Verdict(nothing[:, None], nothing, sample_from(law[:, 0], noise.residual))


class Decided(NamedTuple):
    """scores, law: float `[rows, nodes, vocab]`; rule: the one that decided."""

    scores: Tensor
    law: Tensor
    verdict: Verdict
    rule: AcceptanceRule
    decision: Decision


class Decider:
    """Asks a drafter for trees and a rule for verdicts, each row with its own noise.

    Args:
        rule: None when it depends on each tree, because the drafter does not say what it proposes.
        sampling: False means greedy decoding.
        noise: of the rows there are, and of those that join. race: only where the rule runs one.
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
    ):
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

    def decide(self, tree: DraftTree, logits: Tensor, steps: int | Sequence[int]) -> Decided:
        """Scores and law of every node, and what the rule keeps. A repeated decision may use the same noise: nothing
        of the first one was emitted.

        Args:
            logits: `[rows, nodes, vocab]`; steps: as given to `propose`.
        """
        scores = self._law(logits, self._rows, tree.tokens, tree.parents, range(tree.tokens.shape[1]))
        law = F.softmax(scores, dim=-1) if self._sampling else scores
        rule = self._rule
        if rule is None:
            rule = auto_rule(NO_DRAFTS if tree.tokens.shape[1] == 1 else DraftKind.of(tree))
        noise = self._accept_noise(tree, steps)
        bare = tree.tokens.shape[1] == 1 and self._sampling and rule.lossless and not rule.uses_race
        verdict = undrafted(law, noise) if bare else rule(tree, law, noise)
        return Decided(scores, law, verdict, rule, read_verdict(tree, law, verdict))

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
