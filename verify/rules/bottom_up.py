"""What the bottom-up tree rules share: sibling tables, levels, and the leaf-first choice of the accepted node.

Both `traversal` and `budget_flow` give every node v a weight h(v), a function of the tree and of p alone: the
probability that v is kept once everything below it has been turned down. All weights are computed level by level;
one coin per node is then compared with them, and the first kept node in post-order (children before their parent,
siblings in order) is the verdict. The root's weight is 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.verify.tree import DraftTree

TINY = torch.finfo(torch.float64).tiny


class Plan(NamedTuple):
    """Index tensors of one batch of trees.

    children: int64 `[rows, nodes, ranks]`, node of each child by rank among its siblings, -1 for none.
    levels: per depth, int64 `[rows, width]`: the nodes that have children, padded with the spare index `nodes`.
    post: int64 `[rows, nodes]`, place of each node in post-order (padding nodes come last).
    """

    children: Tensor
    levels: list[Tensor]
    post: Tensor


def plan_tree(tree: DraftTree, sampled_last: bool = False) -> Plan:
    """Siblings rank by node index, sampled ones after all others if `sampled_last`."""
    rows, nodes = tree.tokens.shape
    index = torch.arange(nodes, device=tree.tokens.device)
    real = tree.valid & (index > 0)
    order = index + nodes * tree.sampled.long() if sampled_last else index.expand(rows, nodes)
    siblings = (tree.parents[:, :, None] == tree.parents[:, None, :]) & real[:, :, None] & real[:, None, :]
    earlier = siblings & (order[:, None, :] < order[:, :, None])
    rank = earlier.sum(-1)
    ranks = _most_children(tree, rank, real)
    flat = torch.full((rows, nodes * ranks + 1), -1, dtype=torch.int64, device=index.device)
    slot = torch.where(real, tree.parents * ranks + rank, nodes * ranks)  # what is not real goes to the spare column
    flat.scatter_(1, slot, index.expand(rows, nodes).contiguous())
    children = flat[:, :-1].view(rows, nodes, ranks)
    below = (tree.ancestor_mask & tree.valid[:, :, None]).double()
    size = below.sum(1)
    start = torch.bmm(tree.ancestor_mask.double(), torch.bmm(earlier.double(), size[:, :, None]))[:, :, 0]
    post = torch.where(tree.valid, (start + size).long() - 1, nodes)
    return Plan(children, _levels(tree, children), post)


def _most_children(tree: DraftTree, rank: Tensor, real: Tensor) -> int:
    if tree.topology is not None:
        parents = tree.topology.parents[1:]
        return max((parents.count(parent) for parent in set(parents)), default=0)
    return int(torch.where(real, rank + 1, 0).max())


def _levels(tree: DraftTree, children: Tensor) -> list[Tensor]:
    _, nodes, ranks = children.shape
    if ranks == 0:
        return []
    has_child = children[:, :, 0] >= 0
    depth = torch.arange(tree.max_depth, device=children.device)
    inner = has_child[:, None, :] & (tree.depths[:, None, :] == depth[:, None])  # [rows, depths, nodes]
    if tree.topology is not None:
        own = set(tree.topology.parents)
        widths = [sum(node in own for node in level) for level in tree.topology.levels[:-1]]
    else:
        widths = inner.sum(-1).amax(0).tolist()
    first = torch.where(inner, torch.arange(nodes, device=children.device), nodes).sort(-1).values
    return [first[:, level, :width] for level, width in enumerate(widths)]


def first_kept(plan: Plan, kept: Tensor) -> Tensor:
    """The first node in post-order that is kept, int64 `[rows]`; the root if there is none.

    Args:
        kept: bool `[rows, nodes]`, False for padding.
    """
    nodes = kept.shape[1]
    place = torch.where(kept, plan.post, nodes)
    best = place.argmin(1)
    return torch.where(place.gather(1, best[:, None])[:, 0] < nodes, best, 0)


def first_kept_law(plan: Plan, chance: Tensor) -> Tensor:
    """The law of `first_kept` when node i is kept with probability `chance[:, i]`, float64 `[rows, nodes]`.

    Args:
        chance: float64 `[rows, nodes]`, 0 for padding.
    """
    order = plan.post.argsort(1)
    own = chance.clamp(max=1.0).gather(1, order)
    refused = (1.0 - own).cumprod(1)
    before = torch.cat([torch.ones_like(refused[:, :1]), refused[:, :-1]], dim=1)
    law = torch.zeros_like(chance).scatter_(1, order, own * before)
    law[:, 0] += refused[:, -1]
    return law


class Level(NamedTuple):
    """One level's inner nodes and their rows: gathered once, then narrowed as siblings are tried.

    nodes: int64 `[rows, width]` (`spare` where padded); p, q: `[rows, width, vocab]`, q None without sampled nodes.
    children: int64 `[rows, width, ranks]`.
    """

    nodes: Tensor
    p: Tensor
    q: Tensor | None
    children: Tensor


def level_rows(tree: DraftTree, p: Tensor, plan: Plan, nodes: Tensor) -> Level:
    """Copies of the level's p and q rows (p may be written to)."""
    rows = torch.arange(nodes.shape[0], device=nodes.device)[:, None]
    at = nodes.clamp(max=p.shape[1] - 1)
    q = None
    if tree.q is not None and tree.q_row is not None:
        q = tree.q[rows, tree.q_row[rows, at].clamp(min=0)].to(p.dtype)
    children = torch.where((nodes < p.shape[1])[:, :, None], plan.children[rows, at], -1)
    return Level(nodes, p[rows, at], q, children)


class Child(NamedTuple):
    """The children of one rank, all `[rows, width]`: `there` is False where a node has none of this rank.

    p, q: float64, what the level's rows hold for the child's token (q = 0 without q).
    """

    node: Tensor
    there: Tensor
    sampled: Tensor
    p: Tensor
    q: Tensor


def take_child(tree: DraftTree, level: Level, rank: int) -> Child:
    """Read the child of this rank and remove its token from the level's p, so that no later sibling can have it."""
    child = level.children[:, :, rank]
    there = child >= 0
    at = child.clamp(min=0)
    token = tree.tokens.gather(1, at)[:, :, None]
    own = level.p.gather(2, token)
    level.p.scatter_(2, token, torch.where(there[:, :, None], torch.zeros_like(own), own))
    drawn = torch.zeros_like(own) if level.q is None else level.q.gather(2, token)
    sampled = tree.sampled.gather(1, at) & there
    spare = torch.full_like(child, tree.tokens.shape[1])
    node = torch.where(there, child, spare)
    return Child(node, there, sampled, own[:, :, 0].double(), drawn[:, :, 0].double())


def without_children(tree: DraftTree, plan: Plan, node: Tensor, law: Tensor) -> Tensor:
    """`law` `[rows, vocab]` with the tokens of all children of `node` (int64 `[rows]`) set to zero."""
    rows, vocab = law.shape
    if plan.children.shape[2] == 0:
        return law
    children = plan.children[torch.arange(rows, device=law.device), node]
    tokens = torch.where(children >= 0, tree.tokens.gather(1, children.clamp(min=0)), vocab)
    padded = torch.cat([law, law.new_zeros(rows, 1)], dim=1)  # missing children point at the spare column
    return padded.scatter_(1, tokens, 0.0)[:, :vocab]


def q_at(tree: DraftTree, node: Tensor, like: Tensor) -> Tensor:
    """The q row that the sampled children of `node` (int64 `[rows]`) came from, `[rows, vocab]` in `like`'s dtype.

    Zero without q; meaningless (some row) where the node owns none.
    """
    if tree.q is None or tree.q_row is None:
        return torch.zeros_like(like)
    row = tree.q_row.gather(1, node[:, None])[:, 0].clamp(min=0)
    return tree.q[torch.arange(node.shape[0], device=node.device), row].to(like.dtype)
