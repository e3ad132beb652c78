"""Scalar references of the acceptance rules: the formulas, one number at a time, in the arithmetic of their input.

Given `Fraction` laws everything is exact. A rule is a pure function of a draft tree and of coins, and returns the
accepted node and the (unnormalised) law of the token emitted after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

from oracle.instances import Instance, Law, Number, Prefix


class Coins(Protocol):
    """One coin per tree node, each used at most once."""

    def choose(self, node: int, masses: Sequence[Number]) -> int | None:
        """Index of the mass the node's coin falls on when they are laid side by side from 0; None beyond them."""

    def accept(self, node: int, probability: Number) -> bool:
        """Does the node's coin fall below `probability`?"""


class Tree:
    """A draft tree whose nodes appear when their parent's `children` are first asked for."""

    def __init__(self, instance: Instance, draw: Callable[[Prefix], list[tuple[int, bool]]]):
        self.instance = instance
        self.prefixes: list[Prefix] = [()]
        self.parents = [-1]
        self.sampled = [False]
        self._draw = draw
        self._children: dict[int, list[int]] = {}

    def children(self, node: int) -> list[int]:
        if node not in self._children:
            first = len(self.prefixes)
            drawn = self._draw(self.prefixes[node])
            for token, sampled in drawn:
                self.prefixes.append((*self.prefixes[node], token))
                self.parents.append(node)
                self.sampled.append(sampled)
            self._children[node] = list(range(first, first + len(drawn)))
        return self._children[node]

    def complete(self) -> Tree:
        """Reveal everything, in level order."""
        node = 0
        while node < len(self.prefixes):
            self.children(node)
            node += 1
        return self

    def token(self, node: int) -> int:
        return self.prefixes[node][-1]

    def p(self, node: int) -> Law:
        return self.instance.p[self.prefixes[node]]

    def q(self, node: int) -> Law:
        return self.instance.q[self.prefixes[node]]


Rule = Callable[[Tree, Coins], tuple[int, Law]]


def positive(values: Sequence[Number]) -> Law:
    return tuple(max(value, 0 * value) for value in values)


def one_hot(token: int, like: Law) -> Law:
    return tuple(0 * mass + int(y == token) for y, mass in enumerate(like))


def chain_nodes(tree: Tree) -> list[int]:
    nodes = [0]
    while children := tree.children(nodes[-1]):
        assert len(children) == 1, "a chain rule was given siblings"
        nodes += children
    return nodes


def drafted_from(tree: Tree, node: int) -> Law:
    """The law the only child of `node` comes from: its q row, one-hot if fixed, zero if there is no child."""
    children = tree.children(node)
    if not children:
        return tuple(0 * mass for mass in tree.p(node))
    return tree.q(node) if tree.sampled[children[0]] else one_hot(tree.token(children[0]), tree.p(node))


def greedy(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """Follow the first argmax of p."""
    node = 0
    while True:
        p = tree.p(node)
        best = p.index(max(p))
        # Of equal siblings the one whose line goes deepest is kept; without a tie-break any would do.
        matching = [child for child in tree.children(node) if tree.token(child) == best]
        if not matching:
            return node, one_hot(best, p)
        node = max(matching, key=lambda child: _greedy_depth(tree, child))


def _greedy_depth(tree: Tree, node: int) -> int:
    p = tree.p(node)
    best = p.index(max(p))
    return 1 + max((_greedy_depth(tree, c) for c in tree.children(node) if tree.token(c) == best), default=0)


def naive(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.2: y ~ p; go to the child y if there is one. Of equal siblings the first is the child."""
    node = 0
    while True:
        p, first = tree.p(node), dict[int, int]()
        for child in tree.children(node):
            first.setdefault(tree.token(child), child)
        pick = coins.choose(node, [p[token] for token in first])
        if pick is None:
            return node, tuple(0 * mass if y in first else mass for y, mass in enumerate(p))
        node = list(first.values())[pick]


def rejection(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.1: accept with min(1, p/q); at the first rejection the residual is (p - q)+."""
    node = 0
    while children := tree.children(node):
        p, q = tree.p(node), drafted_from(tree, node)
        token = tree.token(children[0])
        if not coins.accept(children[0], min(1, p[token] / q[token])):
            return node, positive([a - b for a, b in zip(p, q, strict=True)])
        node = children[0]
    return node, tree.p(node)


def block_laws(tree: Tree) -> tuple[list[int], list[Number], list[Number]]:
    """A.4: the chain's nodes, P_0 .. P_k and h_1 .. h_k."""
    nodes = chain_nodes(tree)
    weights: list[Number] = [1]
    for parent, node in itertools.pairwise(nodes):
        token = tree.token(node)
        weights.append(min(1, weights[-1] * tree.p(parent)[token] / drafted_from(tree, parent)[token]))
    accepts: list[Number] = []
    for i in range(1, len(nodes)):
        if i == len(nodes) - 1:
            accepts.append(weights[i])
            continue
        rest = zip(tree.p(nodes[i]), drafted_from(tree, nodes[i]), strict=True)
        surplus = sum(max(weights[i] * a - b, 0) for a, b in rest)
        accepts.append(surplus / (surplus + 1 - weights[i]) if surplus else 0 * surplus)
    return nodes, weights, accepts


def block(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """A.4: the longest prefix whose own coin accepts; a shorter one's rejection does not stop it."""
    nodes, weights, accepts = block_laws(tree)
    for i in range(len(nodes) - 1, 0, -1):
        if coins.accept(nodes[i], accepts[i - 1]):
            return nodes[i], block_residual(tree, nodes, weights, i)
    return 0, block_residual(tree, nodes, weights, 0)


def block_residual(tree: Tree, nodes: list[int], weights: list[Number], kept: int) -> Law:
    p = tree.p(nodes[kept])
    if kept == len(nodes) - 1:
        return p
    q = drafted_from(tree, nodes[kept])
    return positive([weights[kept] * a - b for a, b in zip(p, q, strict=True)])


def norm(values: Law) -> Law:
    """`values` divided by their sum; all zeros stay."""
    total = sum(values)
    return tuple(value / total if total else value for value in values)


def without(values: Law, token: int) -> Law:
    return tuple(0 * value if y == token else value for y, value in enumerate(values))
