"""Sequoia's dynamic program: the best static tree for a measured acceptance table, and the best size for a machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from specdec.drafters.shapes import level_order
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_NODES, checked_count, checked_number, shown
from specdec.verify.topology import Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_MOST_WORK = 10**10
"""Steps of the dynamic program: some ten seconds."""


class Choice(NamedTuple):
    """A tree and what it promises: tokens per step (the target's own token included), milliseconds per token."""

    topology: Topology
    tokens_per_step: float
    ms_per_token: float


def sequoia_tree(acceptance: ArrayLike, num_nodes: int, max_depth: int) -> Topology:
    """The tree of at most `num_nodes` drafted tokens and `max_depth` levels that emits most tokens per step.

    With a[d][r] the probability that the target, at a node of depth d, goes on with its r-th child, a tree promises
    the sum over its nodes (root included) of the product of a along the node's path (Sequoia arXiv 2402.12374,
    section 3.1; algorithms B.1). Nodes that add nothing are left out.

        F_d(m) = 1 + max_b G_d(b, m - 1);  G_d(b, m) = max_y G_d(b - 1, m - y) + a[d][b] F_{d+1}(y)

    Example: `sequoia_tree([0.6, 0.2], num_nodes=3, max_depth=3)` is a chain of three (0.6 + 0.36 + 0.216) and
    with `[0.5, 0.4]` it is two children of the root and one grandchild (0.5 + 0.4 + 0.25).

    Args:
        acceptance: `[ranks]`, or `[depths, ranks]` (deeper levels take the last row); probabilities whose rows sum
            to at most 1.
        num_nodes: most drafted tokens (the root is not one). max_depth: most levels below the root.

    Raises:
        UnsupportedArgumentError: a malformed table, a budget below one node or level or above `MOST_NODES`, or one that
            would take minutes to work out.
    """
    table = _Table(_checked(acceptance), num_nodes, max_depth)
    return table.tree(table.best(num_nodes))


def best_tree(
    acceptance: ArrayLike,
    verify_ms: Mapping[int, float],
    draft_ms: float | Sequence[float],
    max_depth: int,
    overhead_ms: float = 0.0,
) -> Choice:
    """The tree that minimises milliseconds per token: (draft + verify + overhead) / tokens per step.

    Args:
        acceptance: as in `sequoia_tree`.
        verify_ms: drafted tokens -> milliseconds of the target's pass over them and the root; only these sizes (and 0
            if it is there: decode plainly) are considered, so measure what may be used.
        draft_ms: milliseconds per level, one number or one per level.
        max_depth: most levels considered.
        overhead_ms: what every step costs besides.

    Raises:
        UnsupportedArgumentError: see `sequoia_tree`; also costs that are missing or not positive.
    """
    rows = _checked(acceptance)
    max_depth = checked_count("max_depth", max_depth, 1, MOST_NODES)
    overhead_ms = checked_number("overhead_ms", overhead_ms, 0.0)
    given = [draft_ms] * max_depth if isinstance(draft_ms, (int, float, Real)) else list(draft_ms)
    levels = [checked_number("draft_ms", ms, 0.0) for ms in given]
    if len(levels) < max_depth:
        raise UnsupportedArgumentError(
            f"draft_ms: expected {max_depth} costs >= 0, one per level, got {shown(draft_ms)}"
        )
    if not verify_ms:
        raise UnsupportedArgumentError("verify_ms: expected drafted tokens -> milliseconds > 0, got none")
    verify_ms = {
        checked_count("drafted tokens of verify_ms", size, 0, MOST_NODES): checked_number(
            "verify_ms", ms, 0.0, above=True
        )
        for size, ms in verify_ms.items()
    }
    choices = []
    if 0 in verify_ms:
        choices.append(Choice(Topology.chain(0), 1.0, verify_ms[0] + overhead_ms))
    sizes = sorted(size for size in verify_ms if size > 0)
    deepest = min(max_depth, sizes[-1]) if sizes else 0
    _check_work(sizes[-1] if sizes else 0, deepest * (deepest + 1) // 2, rows)
    for depth in range(1, deepest + 1):
        table = _Table(rows, sizes[-1], depth)
        for size in sizes:
            tokens = float(table.value[0][table.best(size)])
            ms = sum(levels[:depth]) + verify_ms[size] + overhead_ms
            if not choices or ms / tokens < choices[-1].ms_per_token:
                choices.append(Choice(table.tree(table.best(size)), tokens, ms / tokens))
    return choices[-1]


def expected_tokens(topology: Topology, acceptance: ArrayLike) -> float:
    """What `sequoia_tree` maximises, for any tree: tokens per step if children are accepted as the table says."""
    rows = _checked(acceptance)
    born = [0] * topology.num_nodes
    reach: list[float] = []
    for parent, depth in zip(topology.parents, topology.depths, strict=True):
        if parent < 0:
            reach.append(1.0)
            continue
        row = rows[min(depth - 1, len(rows) - 1)]
        reach.append(reach[parent] * float(row[born[parent]]) if born[parent] < len(row) else 0.0)
        born[parent] += 1
    return sum(reach)


def _checked(acceptance: ArrayLike) -> Floats:
    try:
        table = np.atleast_2d(np.asarray(acceptance, dtype=np.float64))
    except (TypeError, ValueError):  # words, or rows of different lengths
        table = np.empty((0, 0))
    if table.ndim != 2 or table.size == 0 or not np.isfinite(table).all() or table.min() < 0:
        raise UnsupportedArgumentError(
            f"acceptance: expected probabilities by rank, or by depth and rank, got {shown(acceptance)}"
        )
    if table.sum(1).max() > 1 + 1e-6:
        raise UnsupportedArgumentError(
            "acceptance: the probabilities of one node's children are those of exclusive events and sum to at most 1, "
            f"got {table.sum(1).max():.4f}: give P(the r-th child is the accepted one), not P(it, if it is tried)"
        )
    return table


def _check_work(num_nodes: int, levels: int, acceptance: Floats) -> None:
    """Refuse what would take minutes. `levels`: of all tables together."""
    ranks = min(acceptance.shape[1], num_nodes)
    work = num_nodes**2 * levels * ranks
    if work > _MOST_WORK:
        raise UnsupportedArgumentError(
            f"trees of {num_nodes} nodes, {levels} levels and {ranks} ranks: expected num_nodes**2 * levels * ranks <= "
            f"{_MOST_WORK:.0e}, got {work:.0e}: give fewer nodes, levels or ranks"
        )


class _Table:
    """F and G for every depth, all sizes at once: each (depth, rank) is one (max, +) product of two vectors.

    value[d][m]: the best promise of a subtree of m nodes whose root is at depth d, -inf if there is none.
    """

    def __init__(self, acceptance: Floats, num_nodes: int, max_depth: int):
        num_nodes = checked_count("num_nodes", num_nodes, 1, MOST_NODES)
        max_depth = min(checked_count("max_depth", max_depth, 1, MOST_NODES), num_nodes)  # no tree is deeper
        _check_work(num_nodes, max_depth, acceptance)
        self.size = num_nodes + 1
        leaf = np.full(self.size + 1, -np.inf)
        leaf[1] = 1.0
        self.value: list[Floats] = [leaf]
        self._children: list[Ints] = [np.zeros(self.size + 1, dtype=np.int64)]
        self._splits: list[list[Ints]] = [[]]
        for depth in reversed(range(max_depth)):
            self._add_depth(acceptance[min(depth, len(acceptance) - 1)])

    def _add_depth(self, chances: Floats) -> None:
        """One level above the ones computed so far."""
        below, size = self.value[0], self.size
        possible = np.isfinite(below)
        forest = np.full(size + 1, -np.inf)
        forest[0] = 0.0
        best, children = forest.copy(), np.zeros(size + 1, dtype=np.int64)
        splits: list[Ints] = []
        given = np.arange(size + 1)[:, None] - np.arange(size + 1)[None, :]  # nodes left for the earlier siblings
        for rank, chance in enumerate(chances[:size], 1):
            gain = np.where(possible, chance * np.where(possible, below, 0.0), -np.inf)
            total = np.where(given >= 0, forest[given.clip(min=0)] + gain[None, :], -np.inf)
            split = total.argmax(1)
            forest = total[np.arange(size + 1), split]
            splits.append(split)
            better = forest > best
            best, children = np.where(better, forest, best), np.where(better, rank, children)
        value = np.full(size + 1, -np.inf)
        value[1:] = 1.0 + best[:-1]
        self.value.insert(0, value)
        self._children.insert(0, children)
        self._splits.insert(0, splits)

    def best(self, num_nodes: int) -> int:
        """The smallest node count (root included) up to `num_nodes + 1` with the largest promise."""
        promised = self.value[0][: num_nodes + 2]
        return int(np.argmax(promised >= promised.max() - 1e-12))

    def tree(self, nodes: int) -> Topology:
        """The tree behind `value[0][nodes]`."""
        parents: list[int] = []
        pending = [(-1, 0, nodes)]
        while pending:
            parent, depth, count = pending.pop(0)
            node = len(parents)
            parents.append(parent)
            left = count - 1
            sizes = []
            for rank in range(int(self._children[depth][left]), 0, -1):
                size = int(self._splits[depth][rank - 1][left])
                sizes.append(size)
                left -= size
            pending += [(node, depth + 1, size) for size in reversed(sizes)]
        return level_order(Topology(tuple(parents)))
