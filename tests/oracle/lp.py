"""The best any lossless rule can do with a draft law: a linear program over all couplings (A.9)."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array

from oracle.enumerate import full_trees
from oracle.instances import Instance, Prefix


def optimum(instance: Instance) -> float:
    """max E[accepted draft tokens] over all rules whose step law is the target's.

    Variables b(T, v, y): probability that the node set drafted is T and that the step emits v's tokens and then y.
    Equality for the trees, `<=` with a hair of slack for the law: HiGHS sometimes calls pure equalities infeasible.
    """
    instance = instance.as_float()
    trees: dict[frozenset[Prefix], float] = {}
    for tree, weight in full_trees(instance):
        support = frozenset(tree.prefixes)
        trees[support] = trees.get(support, 0.0) + float(weight)
    rows_tree: list[tuple[int, int, float]] = []
    rows_law: list[tuple[int, int, float]] = []
    gains: list[float] = []
    sequences = {z: i for i, z in enumerate(itertools.product(range(instance.vocab), repeat=instance.depth + 1))}
    for at, support in enumerate(trees):
        for node, token in itertools.product(support, range(instance.vocab)):
            column = len(gains)
            gains.append(-float(len(node)))
            rows_tree.append((at, column, 1.0))
            rows_law += [(sequences[z], column, mass) for z, mass in continuations(instance, (*node, token))]
    law = np.array([mass_of(instance, z) for z in sequences]) + 1e-10
    result = linprog(
        gains,
        A_ub=_sparse(rows_law, (len(sequences), len(gains))),
        b_ub=law,
        A_eq=_sparse(rows_tree, (len(trees), len(gains))),
        b_eq=np.array(list(trees.values())),
        method="highs",
    )
    assert result.status == 0, result.message
    return -float(result.fun)


def mass_of(instance: Instance, sequence: Prefix) -> float:
    """The target's probability of a sequence."""
    mass = 1.0
    for i, token in enumerate(sequence):
        mass *= float(instance.p[sequence[:i]][token])
    return mass


def continuations(instance: Instance, start: Prefix) -> list[tuple[Prefix, float]]:
    """`start` continued by the target to `depth + 1` tokens, with the continuation's probability."""
    found = [(start, 1.0)]
    for _ in range(instance.depth + 1 - len(start)):
        found = [((*z, y), mass * float(p)) for z, mass in found for y, p in enumerate(instance.p[z])]
    return [(z, mass) for z, mass in found if mass > 0]


def _sparse(entries: list[tuple[int, int, float]], shape: tuple[int, int]) -> coo_array:
    rows, columns, values = zip(*entries, strict=True)
    return coo_array((values, (rows, columns)), shape=shape)
