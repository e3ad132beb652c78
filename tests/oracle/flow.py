"""Relatives of budget flow that only the oracle has: solved by linear programs, or from the root down."""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.optimize import linprog

from oracle.instances import Law, Number, draws
from oracle.reference import Coins, Tree, positive
from oracle.tree_reference import Emitted, flow_shares


def top_down_flow(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """Budget flow decided node by node from the root, each with weight 1."""
    node = 0
    while True:
        one = 1 + 0 * tree.p(node)[0]
        shares, flow = flow_shares(tree, node, one)
        remaining, here = one, node
        for child, share in shares:
            if coins.accept(child, share / remaining if share else share):
                node = child
                break
            remaining -= share
        if node == here:
            return node, positive([mass - taken for mass, taken in zip(tree.p(node), flow, strict=True)])


Shares = dict[tuple[frozenset[int], int], float]


@cache
def transport(
    p: Law, q: Law, count: int, w: float
) -> tuple[dict[tuple[frozenset[int], int], float], tuple[float, ...]]:
    """A.8.1 for `count` tokens drawn without replacement: the W(D, c) that moves the most, and A(c) = E[W(D, c)].

    Maximise sum of pi(D) W(D, c) with sum_c W(D, c) <= 1 for every drawn set D and A(c) <= w p(c).
    """
    chance: dict[frozenset[int], float] = {}
    for tokens, weight in draws(q, count, replacement=False):
        drawn = frozenset(tokens)
        chance[drawn] = chance.get(drawn, 0.0) + float(weight)
    moves = [(drawn, token) for drawn in chance for token in drawn]
    table = np.zeros((len(chance) + len(p), len(moves)))
    for column, (drawn, token) in enumerate(moves):
        table[list(chance).index(drawn), column] = 1.0
        table[len(chance) + token, column] = 1.0
    limits = [*chance.values(), *(w * float(mass) for mass in p)]
    moved = linprog(-np.ones(len(moves)), A_ub=table, b_ub=limits, method="highs").x
    shares = {move: float(amount) / chance[move[0]] for move, amount in zip(moves, moved, strict=True)}
    flow = [sum(amount for (_, token), amount in zip(moves, moved, strict=True) if token == y) for y in range(len(p))]
    return shares, tuple(float(mass) for mass in flow)


def optimal_flow(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """Budget flow over siblings drawn without replacement, with the weights of `transport` (float laws)."""
    found = _flow(tree, coins, 0, 1.0)
    assert found is not None, "the root turned down with weight 1"
    return found


def _flow(tree: Tree, coins: Coins, node: int, w: float) -> Emitted:
    children = tree.children(node)
    p = tree.p(node)
    if not children:
        return (node, p) if coins.accept(node, w) else None
    shares, flow = transport(p, tree.q(node), len(children), w)
    drawn = frozenset(tree.token(child) for child in children)
    remaining: Number = 1.0
    for child in children:
        share = shares[drawn, tree.token(child)]
        found = _flow(tree, coins, child, min(1.0, share / remaining) if share > 1e-12 else 0.0)
        if found is not None:
            return found
        remaining -= share
    total = sum(flow)
    # At the root the whole of w must go out; 1 - 1 would leave 0/0 there.
    chance = 1.0 if node == 0 else max(0.0, (w - total) / (1.0 - total)) if total < 1.0 else 0.0
    if coins.accept(node, chance):
        return node, positive([w * mass - taken for mass, taken in zip(p, flow, strict=True)])
    return None
