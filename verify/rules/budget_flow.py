"""Budget-flow verification: trees of deterministic children plus at most one sampled child per node."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.draft_kind import DraftKind
from specdec.verify.noise import Noise
from specdec.verify.rules.base import (
    AcceptanceRule,
    residual_or,
    row_at,
    sample_from,
    verdict_at,
)
from specdec.verify.rules.bottom_up import (
    TINY,
    Level,
    Plan,
    first_kept,
    first_kept_law,
    level_rows,
    plan_tree,
    q_at,
    take_child,
    without_children,
)
from specdec.verify.tree import DraftTree, Verdict


class BudgetFlow(AcceptanceRule):
    """Conditional optimal transport from the leaves up (UniVer arXiv 2605.04543; algorithms A.8.2).

        at v with weight w, deterministic children T and one sampled child x ~ q:
            S = sum off T of (w p - q)+;   W(x) = min(1, w p(x)/q(x)), 0 if x is in T
            W(t) = (1 - W(x)) w p(t) / (S + 1 - w + w p(T))  for t in T
            a child's weight = W(child) / (1 - W of the siblings before it), x last
        nothing below kept: keep v with probability S/(S + 1 - w), then Y ~ (w p - q)+ off T

    The mass left to later siblings is the nominal one: using what the drawn subtrees really left would bias the
    output. Without deterministic children this is block verification, without a sampled child naive sampling.
    """

    name = "budget_flow"

    def refusal(self, kind: DraftKind) -> str | None:
        if kind.shape == "chain" or kind.nodes != "sampled":
            return None
        return (
            f"rule {self.name!r} takes at most one sampled child per node, got {kind} with several: use "
            "rule='traversal' or rule='recursive_rejection'"
        )

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        self.check(tree)
        plan = plan_tree(tree, sampled_last=True)
        budget, chance, draws = _budgets(tree, p, plan)
        node = first_kept(plan, (noise.accept < chance) & tree.valid)
        law = row_at(p, node)
        residual = budget.gather(1, node[:, None]).to(law.dtype) * law
        if tree.q is not None and tree.q_row is not None:
            taken = (residual - q_at(tree, node, law)).clamp(min=0)
            residual = torch.where(draws.gather(1, node[:, None]), taken, residual)
        residual = without_children(tree, plan, node, residual)
        return verdict_at(tree, node, sample_from(residual_or(residual, law), noise.residual))

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        self.check(tree)
        plan = plan_tree(tree, sampled_last=True)
        _, chance, _ = _budgets(tree, p, plan)
        return first_kept_law(plan, torch.where(tree.valid, chance, 0.0))


def _budgets(tree: DraftTree, p: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Each node's budget (`[rows, nodes + 1]`: one spare column takes what is written for padding), its chance of
    being kept once everything below it failed (`[rows, nodes]`), and whether it has a sampled child."""
    rows, nodes = tree.tokens.shape
    budget = torch.ones(rows, nodes + 1, dtype=torch.float64, device=p.device)
    keep = torch.ones_like(budget)
    draws = torch.zeros(rows, nodes + 1, dtype=torch.bool, device=p.device)
    for at in plan.levels:
        _weigh(tree, level_rows(tree, p, plan, at), budget, keep, draws)
    inner = torch.zeros(rows, nodes, dtype=torch.bool, device=p.device)
    if plan.levels:
        inner = plan.children[:, :, 0] >= 0
    return budget, torch.where(inner, keep[:, :nodes], budget[:, :nodes]), draws


def _weigh(tree: DraftTree, level: Level, budget: Tensor, keep: Tensor, draws: Tensor) -> None:
    """Write the budgets of the level's children, and each node's chance once nothing below it was kept."""
    w = budget.gather(1, level.nodes)
    children = [take_child(tree, level, rank) for rank in range(level.children.shape[2])]
    fixed = torch.zeros_like(w)
    drawn = torch.zeros_like(w)
    over = torch.zeros_like(w)  # (w p - q)+ of the drawn token, which take_child removed from the row
    has_draw = torch.zeros_like(w, dtype=torch.bool)
    for child in children:  # sampled children rank last, so their p is zero already if a fixed sibling has the token
        fixed = fixed + torch.where(child.there & ~child.sampled, child.p, 0.0)
        ratio = (w * child.p / child.q.clamp(min=TINY)).clamp(max=1.0)
        drawn = torch.where(child.sampled & (child.q > 0), ratio, drawn)
        over = torch.where(child.sampled, (w * child.p - child.q).clamp(min=0), over)
        has_draw = has_draw | child.sampled
    surplus = w * (1.0 - fixed)
    if level.q is not None:
        dense = (w.to(level.p.dtype)[:, :, None] * level.p - level.q).clamp_(min=0).sum(-1).double()
        surplus = torch.where(has_draw, dense + over, surplus)
    left = surplus + 1.0 - w + w * fixed
    remaining = torch.ones_like(w)
    for child in children:
        share = torch.where(child.sampled, drawn, (1.0 - drawn) * w * child.p / left.clamp(min=TINY))
        budget.scatter_(1, child.node, (share / remaining.clamp(min=TINY)).clamp(max=1.0))
        remaining = remaining - torch.where(child.there, share, 0.0)
    keep.scatter_(1, level.nodes, surplus / (surplus + 1.0 - w).clamp(min=TINY))
    draws.scatter_(1, level.nodes, has_draw)
