"""Recursive rejection sampling: siblings tried one after the other, from the root down."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.noise import Noise
from specdec.verify.rules.base import RESIDUAL_EPS, AcceptanceRule, row_at, sample_from, verdict_at
from specdec.verify.rules.bottom_up import TINY, plan_tree, q_at
from specdec.verify.rules.naive import reach
from specdec.verify.tree import DraftTree, Verdict


class RecursiveRejection(AcceptanceRule):
    """RSD arXiv 2402.14160, Sequoia 2402.12374; with replacement SpecInfer 2305.09781 (algorithms A.3).

        at a node, r = p: for each child x in order accept with min(1, r(x)/q(x)), else
            r <- norm((r - q)+);  q <- norm(q without x)  (q stays when siblings were drawn independently)
        no child accepted: Y ~ r

    Takes any tree: a deterministic child has q one-hot. One r and one q row per request, narrowed in place of the
    walk: depth x siblings reductions, however many nodes the tree has.

    Example: p=(.1,.5,.4), q=(.5,.4,.1), siblings 0 then 1: 0 is kept with probability .2; else r=(0,.25,.75) and
    q=(0,.8,.2), and 1 is kept with probability .3125.
    """

    name = "recursive_rejection"
    top_down = True

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        rows = tree.tokens.shape[0]
        children = plan_tree(tree).children
        index = torch.arange(rows, device=p.device)
        node = torch.zeros(rows, dtype=torch.int64, device=p.device)
        r = row_at(p, node)
        moving = torch.ones_like(tree.num_nodes, dtype=torch.bool)
        for _ in range(tree.max_depth):
            q = q_at(tree, node, r)
            nxt = node
            for rank in range(children.shape[2]):
                child = children[index, node, rank]
                trying = (child >= 0) & (nxt == node) & moving
                at = child.clamp(min=0)
                token, sampled = tree.tokens[index, at][:, None], tree.sampled[index, at][:, None]
                q_x = torch.where(sampled, q.gather(1, token), 1.0)
                r_x = r.gather(1, token)
                hit = noise.accept[index, at] * q_x[:, 0].double() < r_x[:, 0].double()
                accepted = trying & hit & (q_x[:, 0] > 0)
                turned_down = (trying & ~accepted)[:, None]
                r, q = _after_rejection(r, q, token, sampled, turned_down, tree.replacement)
                nxt = torch.where(accepted, child, nxt)
            moving = nxt != node
            node = nxt
            r = torch.where(moving[:, None], row_at(p, node), r)
        return verdict_at(tree, node, sample_from(r, noise.residual))

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        """Tries the children of all nodes side by side: as many vocabulary rows as the tree has nodes."""
        rows, nodes = tree.tokens.shape
        children = plan_tree(tree).children
        r, q = p, torch.zeros_like(p)
        if tree.q is not None and tree.q_row is not None:
            row = torch.arange(rows, device=p.device)[:, None]
            q = tree.q[row, tree.q_row.clamp(min=0)].to(p.dtype)
        step = torch.zeros(rows, nodes + 1, dtype=torch.float64, device=p.device)  # the spare column: no such child
        refused = torch.ones(rows, nodes, dtype=torch.float64, device=p.device)
        for rank in range(children.shape[2]):
            child = children[:, :, rank]
            there, at = child >= 0, child.clamp(min=0)
            token, sampled = tree.tokens.gather(1, at)[:, :, None], tree.sampled.gather(1, at)[:, :, None]
            q_x = torch.where(sampled, q.gather(2, token), 1.0)[:, :, 0].double()
            chance = (r.gather(2, token)[:, :, 0].double() / q_x.clamp(min=TINY)).clamp(max=1.0)
            chance = torch.where(there & (q_x > 0), chance, 0.0)
            step.scatter_(1, torch.where(there, child, nodes), refused * chance)
            refused = refused * (1.0 - chance)
            r, q = _after_rejection(r, q, token, sampled, there[:, :, None], tree.replacement)
        return reach(tree, step[:, :nodes]) * refused * tree.valid


def _after_rejection(
    r: Tensor, q: Tensor, token: Tensor, sampled: Tensor, turned_down: Tensor, replacement: bool
) -> tuple[Tensor, Tensor]:
    """The residual r and the draft law q (`[..., vocab]`) after `token` (`[..., 1]`) where it was turned down."""
    less = torch.where(sampled, r - q, r).clamp(min=0).scatter_(-1, token, 0.0)
    mass = less.sum(-1, keepdim=True)
    # No mass left means r = q: the rejection was rounding, and r itself is the law to go on with.
    r = torch.where(turned_down & (mass > RESIDUAL_EPS), less / mass.clamp(min=RESIDUAL_EPS), r)
    if not replacement:
        rest = q.scatter(-1, token, 0.0)
        rest = rest / rest.sum(-1, keepdim=True).clamp(min=TINY if r.dtype == torch.float64 else 1e-37)
        q = torch.where(turned_down & sampled, rest, q)
    return r, q
