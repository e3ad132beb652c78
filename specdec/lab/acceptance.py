"""Realised acceptance against theory, from every decision of the real loop: rule, coins and draft law."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from time import perf_counter

import torch
from torch import Tensor

from specdec.lab.findings import Finding, Status
from specdec.lab.optimal import Root, optimal_acceptance, optimum, root_of, scannable
from specdec.lab.stats import SumTest, sum_test
from specdec.monitor import AcceptanceMonitor
from specdec.verify import AcceptanceRule, DraftTree, Verdict
from specdec.verify.rules.block import block_weights
from specdec.verify.rules.chain import view_chain

ROOT_ENTRIES = 1 << 21
"""Probabilities kept for the optimality figures: a fair sample of all root laws, at most 512."""
MOST_SCANS = 16
"""Roots for which the optimum of two sampled children is worked out, while there is time."""


class Sums:
    """A sum of martingale differences with the sum of their conditional variances, on the device."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.variance: Tensor | float = 0.0
        self.num: Tensor | int = 0

    def add(self, difference: Tensor, variance: Tensor, counted: Tensor) -> None:
        """All of one shape; entries that are not `counted` are left out."""
        self.total = self.total + torch.where(counted, difference, 0.0).sum()
        self.variance = self.variance + torch.where(counted, variance, 0.0).sum()
        self.num = self.num + counted.sum()

    def test(self, bound: float, alpha: float) -> SumTest:
        """See `sum_test`. Conditional laws come in float32: what their rounding can add up to is no evidence."""
        count = int(self.num)
        total = float(self.total)
        rounding = 2.0**-20 * bound * count
        shrunk = max(0.0, abs(total) - rounding)
        return sum_test(shrunk if total > 0 else -shrunk, float(self.variance), count, bound, alpha)


class AcceptanceRecorder(AcceptanceMonitor):
    """Accumulates what the acceptance tests and the optimality figures need.

    coins: accepted tokens minus their mean *given the draft tree*: sees a wrong rule and coins that are not fresh.
    ratios, masses: over all sampled tokens x, min(1, p(x)/q(x)) and q(x) minus their means under q: see a q that is not
    the law the token was drawn from, and tokens withdrawn because of what they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.coins, self.ratios, self.masses = Sums(), Sums(), Sums()
        self.depth = 0
        self.steps = self.accepted = self.first_kept = 0.0
        self.block_sum = self.token_sum = 0.0
        self.is_chain = True
        self._random, self._seen = random.Random(0), 0
        self.roots: list[Root] = []

    def decided(self, rule: AcceptanceRule, tree: DraftTree, p: Tensor, verdict: Verdict) -> None:
        super().decided(rule, tree, p, verdict)
        if tree.tokens.shape[1] == 1:
            return
        drafted = tree.num_nodes > 1
        self.depth = max(self.depth, tree.max_depth)
        expected = rule.expected_accepted(tree, p)
        if expected is not None:
            self.coins.add(verdict.num_accepted.double() - expected.mean, expected.variance, drafted)
        self._judge_draft(tree, p)
        self._measure(tree, p, verdict, drafted)

    def _judge_draft(self, tree: DraftTree, p: Tensor) -> None:
        if tree.q is None or tree.q_row is None:
            return
        rows, nodes = tree.tokens.shape
        index = torch.arange(nodes, device=p.device)
        drawn = tree.sampled & tree.valid
        drawn[:, 0] = False
        # Later siblings may be drawn from what is left of q: only the first draw of a node follows q itself.
        earlier = (tree.parents[:, :, None] == tree.parents[:, None, :]) & (index[:, None] > index)
        drawn = drawn & ~(earlier & drawn[:, None, :]).any(-1)
        row = torch.arange(rows, device=p.device)[:, None]
        for node in range(1, nodes):  # node by node: one vocabulary row per request at a time
            here = drawn[:, node]
            parent = tree.parents[:, node].clamp(min=0)[:, None]
            q = tree.q[row[:, 0], tree.q_row.gather(1, parent)[:, 0].clamp(min=0)]
            law = p[row[:, 0], parent[:, 0]]
            token = tree.tokens[:, node : node + 1]
            ratio = (law / q.clamp(min=torch.finfo(q.dtype).tiny)).clamp(max=1.0)
            for sums, score in ((self.ratios, ratio), (self.masses, q)):
                mean = (q * score).sum(-1).double()
                spread = (q * (score - mean[:, None].to(q.dtype)).square()).sum(-1).double()
                sums.add(score.gather(1, token)[:, 0].double() - mean, spread, here)

    def _measure(self, tree: DraftTree, p: Tensor, verdict: Verdict, drafted: Tensor) -> None:
        self.steps += float(drafted.sum())
        self.accepted += float(verdict.num_accepted.sum())
        self.first_kept += float((verdict.num_accepted > 0).sum())
        self.is_chain = self.is_chain and tree.is_chain
        if tree.is_chain:
            chain = view_chain(tree, p)
            self.block_sum += float(torch.where(chain.real, block_weights(chain)[:, 1:], 0.0).sum())
            each = (chain.p_x / chain.q_x).clamp(max=1.0).cumprod(1)
            self.token_sum += float(torch.where(chain.real, each, 0.0).sum())
        keep = max(8, min(512, ROOT_ENTRIES // p.shape[2]))
        for i in drafted.nonzero()[:, 0].tolist():
            self._seen += 1
            slot = len(self.roots) if len(self.roots) < keep else self._random.randrange(self._seen)
            if slot < keep:
                self.roots[slot : slot + 1] = [root_of(tree, p, i)]

    def findings(self, alpha: float, seconds: float = math.inf) -> list[Finding]:
        """The acceptance tests, each judged at `alpha`, and how close to the best possible acceptance is: over as many
        roots as `seconds` allow."""
        found = []
        for name, sums, bound in (
            ("accepted | draft", self.coins, float(max(1, self.depth))),
            ("draft law, p/q", self.ratios, 1.0),
            ("draft law, q", self.masses, 1.0),
        ):
            num = int(sums.num)
            if num == 0:
                why = "the rule's coins are the drafter's" if sums is self.coins else "the drafter samples nothing"
                found.append(Finding(name, "skipped", why if self.steps else "nothing was drafted"))
                continue
            test = sums.test(bound, alpha)
            detail = f"p = {test.p_value:.2g}, mean excess {test.mean:+.4f} (z = {test.z:+.2f}), "
            detail += f"{num} {'drafts' if sums is self.coins else 'tokens'} see {test.detectable:.3f}"
            status: Status = "FAIL" if test.p_value < alpha else "pass"
            found.append(Finding(name, status, detail, {**test._asdict(), "alpha": alpha}, sees=test.detectable))
        if self.steps:
            found += [self._optimality(), self._best_at_root(seconds)]
        return found

    def _optimality(self) -> Finding:
        figures: dict[str, float] = {"accepted_per_draft": self.accepted / self.steps}
        detail = f"{figures['accepted_per_draft']:.3f} accepted tokens per draft"
        if self.is_chain:
            figures["best_for_these_chains"] = self.block_sum / self.steps
            figures["token_wise"] = self.token_sum / self.steps
            detail += f"; best rule for these chains {figures['best_for_these_chains']:.3f} (mean sum P_i), "
            detail += f"token-wise rejection {figures['token_wise']:.3f}"
        if self.z is not None:
            figures["acceptance_z"] = self.z
        return Finding("acceptance", "info", detail, figures)

    def _best_at_root(self, seconds: float) -> Finding:
        """Acceptance of the first drafted level against alpha* of its draft law (see `optimal_acceptance`)."""
        start = perf_counter()
        costly = any(root.num_sampled > 1 for root in self.roots)
        optima = _while_time_lasts(start + (seconds / 2 if costly else math.inf), map(optimum, self.roots))
        best = _mean(optima)
        measured = self.first_kept / self.steps
        figures = {"measured": measured, "alpha_star": best}
        detail = f"first level kept in {measured:.3f} of drafts; optimum of its draft law {best:.3f}"
        fit = [root for root in self.roots if root.num_sampled == 1 and not len(root.fixed)]
        pairs = [(root.p, root.q) for root in fit if root.q is not None and scannable(root.q, 2)][:MOST_SCANS]
        if pairs:  # of the very same roots, or their difference would be that of the texts
            gains = (optimal_acceptance(p, q, 2) - optimal_acceptance(p, q, 1) for p, q in pairs)
            figures["gain_of_two_children"] = gain = _mean(_while_time_lasts(start + seconds, gains))
            detail += f" ({gain:+.3f} with two sampled children)"
        return Finding("acceptance at the root", "info", f"{detail}, over {len(optima)} roots", figures)


def _while_time_lasts(deadline: float, values: Iterable[float]) -> list[float]:
    """The first of `values` in any case, the others as long as `perf_counter()` is below `deadline`."""
    found: list[float] = []
    for value in values:
        found.append(value)
        if perf_counter() >= deadline:
            break
    return found


NUM_SUMS = 3
"""Statistical tests among `AcceptanceRecorder.findings`."""


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
