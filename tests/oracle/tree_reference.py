"""Scalar references of the tree rules, and the table of all references."""

from __future__ import annotations

import math
from collections.abc import Sequence

from oracle.instances import Law, Number
from oracle.reference import (
    Coins,
    Rule,
    Tree,
    block,
    greedy,
    naive,
    norm,
    one_hot,
    positive,
    rejection,
    without,
)


def recursive_rejection(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.3, node by node from the root: r <- norm((r - q)+), and without replacement q <- norm(q without x)."""
    node = 0
    while True:
        r, q = tree.p(node), tree.q(node)
        for child in tree.children(node):
            token, sampled = tree.token(child), tree.sampled[child]
            drawn = q if sampled else one_hot(token, r)
            if coins.accept(child, min(1, r[token] / drawn[token])):
                node = child
                break
            r = norm(positive([a - b for a, b in zip(r, drawn, strict=True)]))
            if sampled and not tree.instance.replacement:
                q = norm(without(q, token))
        else:
            return node, r


Emitted = tuple[int, Law] | None


def traversal(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.6, literally."""
    found = _traverse(tree, coins, 0, 1)
    assert found is not None, "the root turned down with weight 1"
    return found


def _traverse(tree: Tree, coins: Coins, node: int, w: Number) -> Emitted:
    p, q = tree.p(node), tree.q(node)
    for child in tree.children(node):
        token, sampled = tree.token(child), tree.sampled[child]
        drawn = q if sampled else one_hot(token, p)
        found = _traverse(tree, coins, child, min(1, w * p[token] / drawn[token]))
        if found is not None:
            return found
        residual = positive([w * a - b for a, b in zip(p, drawn, strict=True)])
        surplus = sum(residual)
        w = surplus / (surplus + 1 - w) if surplus else 0 * surplus
        p = norm(residual)
        if sampled and not tree.instance.replacement:
            q = norm(without(q, token))
    return (node, p) if coins.accept(node, w) else None


def budget_flow(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.8.2, literally; the sampled child is tried last."""
    found = _flow(tree, coins, 0, 1)
    assert found is not None, "the root turned down with weight 1"
    return found


def flow_shares(tree: Tree, node: int, w: Number) -> tuple[list[tuple[int, Number]], list[Number]]:
    """W of each child in the order they are tried, and A(y) of every token."""
    p, q = tree.p(node), tree.q(node)
    children = sorted(tree.children(node), key=lambda child: tree.sampled[child])
    fixed = {tree.token(child) for child in children if not tree.sampled[child]}
    drawn = [child for child in children if tree.sampled[child]]
    assert len(drawn) <= 1, "budget flow was given several sampled siblings"
    flow = [w * p[y] if y in fixed else min(q[y], w * p[y]) if drawn else 0 * w for y in range(len(p))]
    left = 1 - sum(flow[y] for y in range(len(p)) if y not in fixed)
    share: Number = 0 * p[0]
    for child in drawn:
        token = tree.token(child)
        share = 0 * p[0] if token in fixed else min(1 + 0 * p[0], w * p[token] / q[token])
    shares: list[tuple[int, Number]] = []
    seen: set[int] = set()
    for child in children:
        token = tree.token(child)
        part = (1 - share) * w * p[token] / left if left and token not in seen else 0 * w
        shares.append((child, share if tree.sampled[child] else part))
        seen.add(token)
    return shares, flow


def _flow(tree: Tree, coins: Coins, node: int, w: Number) -> Emitted:
    shares, flow = flow_shares(tree, node, w)
    remaining: Number = 1 + 0 * tree.p(node)[0]
    for child, share in shares:
        found = _flow(tree, coins, child, share / remaining if share else share)
        if found is not None:
            return found
        remaining -= share
    total = sum(flow)
    if coins.accept(node, (w - total) / (1 - total) if w > total else 0 * w):
        return node, positive([w * mass - taken for mass, taken in zip(tree.p(node), flow, strict=True)])
    return None


def typical(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.10: keep x while p(x) > min(.09, .3 exp(-H(p))); the deepest node so reached, then the likeliest, then the
    first; the token after it comes from p."""
    best, level = (0, 1.0, 0), [(0, 1.0)]
    depth = 0
    while level:
        following = []
        depth += 1
        for node, path in level:
            p = tree.p(node)
            entropy = -sum(float(mass) * math.log(mass) for mass in p if mass > 0)
            for child in tree.children(node):
                mass = p[tree.token(child)]
                if mass > min(0.09, 0.3 * math.exp(-entropy)):
                    following.append((child, path * float(mass)))
        for child, path in following:
            if depth > best[0] or path > best[1] * (1 + 1e-5):
                best = (depth, path, child)
        level = following
    return best[2], tree.p(best[2])


def coupled(tree: Tree, race: Sequence[Sequence[float]]) -> tuple[int, int]:
    """A.9b: the accepted node and the token after it, given E of every depth below the root and every token."""
    node = depth = 0
    while True:
        arrive = [
            time / float(mass) if mass else math.inf for time, mass in zip(race[depth], tree.p(node), strict=True)
        ]
        token = arrive.index(min(arrive))
        matching = [child for child in tree.children(node) if tree.token(child) == token]
        if not matching:
            return node, token
        node, depth = matching[0], depth + 1


REFERENCES: dict[str, Rule] = {
    "greedy": greedy,
    "naive": naive,
    "rejection": rejection,
    "block": block,
    "recursive_rejection": recursive_rejection,
    "traversal": traversal,
    "budget_flow": budget_flow,
    "typical": typical,
}
"""Of every rule that needs no more than coins; `coupled` is not one of them."""
