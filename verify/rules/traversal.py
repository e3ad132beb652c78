"""Traversal verification: trees judged from the leaves up, siblings by sequential residuals."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.noise import Noise
from specdec.verify.rules.base import RESIDUAL_EPS, AcceptanceRule, residual_or, row_at, sample_from, verdict_at
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


class Traversal(AcceptanceRule):
    """Weng et al. arXiv 2505.12398 (algorithms A.6): block verification carried over to trees, leaf first.

        at v with weight w, P = p(.|v), Q = q(.|v):  for each child c in order
            w_c = min(1, w P(c)/Q(c));  if nothing in c's subtree is kept:
            R = (w P - Q)+, S = sum R;  w <- S/(S + 1 - w);  P <- R/S;  Q <- norm(Q without c)
        no child left: keep v with probability w, then Y ~ P

    Takes any tree: a deterministic child has Q one-hot; siblings sampled independently leave Q as it is. On a chain
    it is block verification.

    Off the tokens already tried, P is (A p - B q)+ with two scalars per node, so a sibling costs one reduction over
    the vocabulary and no row of its own; a row is only built at the node that is kept.
    """

    name = "traversal"

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        plan = plan_tree(tree)
        weight, scale_p, scale_q = _weights(tree, p, plan)
        kept = (noise.accept < weight[:, : tree.tokens.shape[1]]) & tree.valid
        node = first_kept(plan, kept)
        law = row_at(p, node)
        residual = scale_p.gather(1, node[:, None]).to(law.dtype) * law
        if tree.q is not None and tree.q_row is not None:
            drawn = scale_q.gather(1, node[:, None]).to(law.dtype) * q_at(tree, node, law)
            residual = (residual - drawn).clamp(min=0)
        residual = without_children(tree, plan, node, residual)
        return verdict_at(tree, node, sample_from(residual_or(residual, law), noise.residual))

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        plan = plan_tree(tree)
        weight = _weights(tree, p, plan)[0][:, : tree.tokens.shape[1]]
        return first_kept_law(plan, torch.where(tree.valid, weight, 0.0))


def _weights(tree: DraftTree, p: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Each node's weight once everything below it failed, and the scalars A and B of its P; float64
    `[rows, nodes + 1]`, where one spare column takes what is written for padding."""
    rows, nodes = tree.tokens.shape
    weight = torch.ones(rows, nodes + 1, dtype=torch.float64, device=p.device)
    scale_p, scale_q = torch.ones_like(weight), torch.zeros_like(weight)
    for at in plan.levels:
        _weigh(tree, level_rows(tree, p, plan, at), weight, scale_p, scale_q)
    return weight, scale_p, scale_q


def _weigh(tree: DraftTree, level: Level, weight: Tensor, scale_p: Tensor, scale_q: Tensor) -> None:
    """Write the weights of the level's children, and each node's own weight and scalars once they all failed."""
    w = weight.gather(1, level.nodes)
    a, b, rest = torch.ones_like(w), torch.zeros_like(w), torch.ones_like(w)  # rest: q mass not drawn yet
    for rank in range(level.children.shape[2]):
        child = take_child(tree, level, rank)
        mass = (a * child.p - b * child.q).clamp(min=0)
        drawn = torch.where(child.sampled, child.q / rest.clamp(min=TINY), 1.0)
        weight.scatter_(1, child.node, torch.where(drawn > 0, (w * mass / drawn.clamp(min=TINY)).clamp(max=1.0), 0.0))
        next_a = w * a
        next_b = w * b + torch.where(child.sampled, 1.0 / rest.clamp(min=TINY), 0.0)
        surplus = w * (1.0 - mass)
        if level.q is not None:
            dtype = level.p.dtype
            dense = next_a.to(dtype)[:, :, None] * level.p - next_b.to(dtype)[:, :, None] * level.q
            surplus = torch.where(child.sampled, dense.clamp_(min=0).sum(-1).double(), surplus)
        alive = surplus > RESIDUAL_EPS
        step = torch.where(alive, 1.0 / surplus.clamp(min=RESIDUAL_EPS), 0.0)
        a, b = torch.where(child.there, next_a * step, a), torch.where(child.there, next_b * step, b)
        w = torch.where(child.there, torch.where(alive, surplus / (surplus + 1.0 - w), 0.0), w)
        if not tree.replacement:
            rest = rest - torch.where(child.sampled, child.q, 0.0)
    for target, value in ((weight, w), (scale_p, a), (scale_q, b)):
        target.scatter_(1, level.nodes, value)
