"""Naive speculative sampling: draw from the target, stay in the tree while the draw is a child."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, residual_or, row_at, sample_from, verdict_at
from specdec.verify.rules.greedy import deepest_reached
from specdec.verify.tree import DraftTree, Verdict


class Naive(AcceptanceRule):
    """y ~ p(.|node); if y is a child go there, else emit y (SpecInfer arXiv 2305.09781; algorithms A.2).

    Needs no q, so it takes every tree, and it is optimal for deterministic ones. The draw is split: the node's
    coin u decides among the children by the intervals `[lo, lo + p(child))`; only if it falls beyond them is one
    residual row, p without the children, sampled. That is the same law with one vocabulary row per request.

    Example: p(a)=.5, p(b)=.2 for children a, b: u in [0,.5) keeps a, [.5,.7) keeps b, else p without {a, b}.
    """

    name = "naive"
    top_down = True

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        mass, earlier, is_child = _masses(tree, p)
        low = (earlier * mass[:, None, :]).sum(-1)
        u = noise.accept.gather(1, tree.parents.clamp(min=0))
        kept = (low <= u) & (u < low + mass)
        kept[:, 0] = True
        node = deepest_reached(tree, kept)
        law = row_at(p, node)
        rest = _without(law, tree.tokens, is_child & (tree.parents == node[:, None]))
        return verdict_at(tree, node, sample_from(residual_or(rest, law), noise.residual))

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        mass, _, _ = _masses(tree, p)
        below = torch.zeros_like(mass).scatter_add_(1, tree.parents.clamp(min=0), mass)
        return reach(tree, mass) * (1.0 - below).clamp(min=0)


def reach(tree: DraftTree, step: Tensor) -> Tensor:
    """Probability of walking from the root to each node, `[rows, nodes]`.

    Args:
        step: `[rows, nodes]`, probability of going to the node once its parent is reached (the root's is ignored).
    """
    step = step.clone()
    step[:, 0] = 1.0
    return torch.where(tree.ancestor_mask, step[:, None, :], 1.0).prod(-1)


def _masses(tree: DraftTree, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each child's own probability (float64 `[rows, nodes]`), which nodes are its earlier siblings (bool
    `[rows, nodes, nodes]`), and which nodes are children at all (bool `[rows, nodes]`)."""
    rows, nodes = tree.tokens.shape
    row = torch.arange(rows, device=p.device)[:, None]
    mass = p[row, tree.parents.clamp(min=0), tree.tokens].to(torch.float64)
    is_child = tree.valid.clone()
    is_child[:, 0] = False
    index = torch.arange(nodes, device=p.device)
    earlier = (tree.parents[:, :, None] == tree.parents[:, None, :]) & (index[:, None] > index)
    earlier = earlier & is_child[:, None, :]
    repeated = (earlier & (tree.tokens[:, :, None] == tree.tokens[:, None, :])).any(-1)
    return torch.where(is_child & ~repeated, mass, 0.0), earlier, is_child  # an equal sibling adds no mass of its own


def _without(law: Tensor, tokens: Tensor, removed: Tensor) -> Tensor:
    """`law` `[rows, vocab]` with the `removed` ones of `tokens` `[rows, nodes]` set to zero."""
    rows, vocab = law.shape
    padded = torch.cat([law, law.new_zeros(rows, 1)], dim=1)  # kept nodes point at the spare column
    padded.scatter_(1, torch.where(removed, tokens, vocab), 0.0)
    return padded[:, :vocab]
