"""Shapes of draft trees: what `tree=` may be, level order, budgets; Sequoia's dynamic program against brute force."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.drafters.best_first import BestFirst
from specdec.drafters.sequoia import best_tree, expected_tokens, sequoia_tree
from specdec.drafters.shapes import Static, from_paths, leading_nodes, level_order, shape_of, to_paths
from specdec.kv import InvalidTreeError, UnsupportedArgumentError
from specdec.verify import Topology

TOPOLOGIES = (
    st.integers(1, 12)
    .flatmap(lambda nodes: st.tuples(*(st.integers(0, i) for i in range(nodes))))
    .map(lambda rest: Topology((-1, *rest)))
)


def form(topology: Topology, node: int = 0) -> tuple:
    """The ordered tree below a node, without its numbering."""
    return tuple(form(topology, child) for child, parent in enumerate(topology.parents) if parent == node)


@settings(max_examples=200)
@given(TOPOLOGIES)
def test_level_order_renumbers_the_same_tree(topology: Topology) -> None:
    ordered = level_order(topology)
    assert form(ordered) == form(topology)
    assert list(ordered.depths) == sorted(ordered.depths)
    assert list(ordered.parents) == sorted(ordered.parents), "siblings are side by side"
    assert level_order(ordered) == ordered


@settings(max_examples=200)
@given(TOPOLOGIES, st.randoms(use_true_random=False))
def test_paths_and_topologies_are_inverse(topology: Topology, random: object) -> None:
    paths = to_paths(level_order(topology))
    random.shuffle(paths)  # type: ignore[attr-defined]
    assert from_paths(paths) == level_order(topology)


def test_paths_as_configurations_give_them() -> None:
    assert from_paths([[0], [0, 0], [1]]) == Topology((-1, 0, 0, 1))
    assert from_paths([(1,), (0,), (1, 0)]) == Topology((-1, 0, 0, 2))
    assert from_paths([[0], [2], [2, 5]]) == from_paths([[0], [1], [1, 0]])
    assert from_paths([[0], [1], [0, 0], [0, 1], [1, 0], [1, 1]]) == Topology.widths((2, 2))


@settings(max_examples=100)
@given(TOPOLOGIES, st.integers(0, 6), st.integers(0, 12))
def test_a_budget_keeps_leading_nodes(topology: Topology, depth: int, nodes: int) -> None:
    ordered = level_order(topology)
    kept = leading_nodes(ordered, depth, nodes)
    assert kept.parents == ordered.parents[: kept.num_nodes]
    assert kept.num_nodes - 1 <= nodes
    assert max(kept.depths) <= depth
    if kept.num_nodes < ordered.num_nodes:
        assert kept.num_nodes - 1 == nodes or ordered.depths[kept.num_nodes] > depth


def test_a_budget_needs_level_order() -> None:
    with pytest.raises(InvalidTreeError, match="level order"):
        leading_nodes(Topology((-1, 0, 1, 0)), 2, 2)


@pytest.mark.parametrize("tree", [(2, 1), [2, 1], Topology.widths((2, 1)), [[0], [1], [0, 0], [1, 0]]])
def test_one_tree_in_every_form(tree: object) -> None:
    shape = shape_of(tree)
    assert isinstance(shape, Static)
    assert shape.topology == Topology((-1, 0, 0, 1, 2))
    assert (shape.max_depth, shape.max_nodes) == (2, 4)


def test_shapes_pass_through() -> None:
    shape = BestFirst(depth=2, top_k=3, num_nodes=5)
    assert shape_of(shape) is shape
    assert (shape.max_depth, shape.max_nodes) == (2, 5)


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ((), "expected tree widths"),
        ((2, 0), "expected tree widths"),
        ((2, True), "expected tree widths"),
        ("2,1", "expected tree widths"),
        (3, "expected tree widths"),
        ([[0], 1], "expected tree widths"),
        ([[0], []], "ranks >= 0"),
        ([[0], [-1]], "ranks >= 0"),
        ([[0], [0]], "twice"),
        ([[0], [1, 0]], "add \\[1\\]"),
        (Topology.chain(0), "bare root"),
    ],
)
def test_malformed_trees_are_refused(tree: object, said: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=said):
        shape_of(tree)


@cache
def forests(nodes: int, depth: int) -> list[tuple]:
    """Every ordered list of trees with `nodes` nodes in all and at most `depth` levels."""
    if nodes == 0:
        return [()]
    if depth == 0:
        return []
    return [
        (first, *rest)
        for size in range(1, nodes + 1)
        for first in forests(size - 1, depth - 1)
        for rest in forests(nodes - size, depth)
    ]


def topology_of(children: tuple) -> Topology:
    parents = [-1]
    pending = [(0, children)]
    while pending:
        node, below = pending.pop()
        for child in below:
            parents.append(node)
            pending.append((len(parents) - 1, child))
    return level_order(Topology(tuple(parents)))


def brute_force(acceptance: np.ndarray, nodes: int, depth: int) -> float:
    """The best promise of all trees of at most `nodes` drafted tokens, each looked at."""
    return max(
        expected_tokens(topology_of(children), acceptance)
        for count in range(nodes + 1)
        for children in forests(count, depth)
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.booleans())
def test_the_dynamic_program_finds_the_best_tree(
    seed: int, nodes: int, depth: int, ranks: int, by_depth: bool, unordered: bool
) -> None:
    rng = np.random.default_rng(seed)
    table = rng.dirichlet(np.ones(ranks + 1), size=rng.integers(1, depth + 1) if by_depth else 1)[:, :ranks]
    if not unordered:
        table = -np.sort(-table, axis=1)
    tree = sequoia_tree(table if by_depth else table[0], nodes, depth)
    assert tree.num_nodes - 1 <= nodes
    assert max(tree.depths) <= depth
    assert level_order(tree) == tree
    assert abs(expected_tokens(tree, table) - brute_force(table, nodes, depth)) < 1e-12


def test_the_check_against_brute_force_can_fail() -> None:
    """Negative control: widths chosen without the table are found wanting by the same comparison."""
    table = np.array([0.5, 0.3, 0.1])
    assert expected_tokens(Topology.widths((3, 1)), table) < brute_force(table, 6, 4) - 0.01


def test_known_trees() -> None:
    assert sequoia_tree([0.6, 0.2], 3, 3) == Topology.chain(3)
    assert sequoia_tree([0.5, 0.4], 3, 3) == Topology((-1, 0, 0, 1))
    assert sequoia_tree([0.5, 0.4, 0.05], 3, 1) == Topology.widths((3,))
    assert sequoia_tree([[0.5, 0.4], [0.0, 0.0]], 6, 3) == Topology.widths((2,)), "worthless nodes are left out"
    assert abs(expected_tokens(Topology.widths((2, 1)), [0.5, 0.3]) - (1 + 0.8 + 0.8 * 0.5)) < 1e-12


def test_large_trees_grow_in_reasonable_time_and_never_lose() -> None:
    table = 0.45 * 0.55 ** np.arange(16)
    promised = [expected_tokens(sequoia_tree(table, nodes, 10), table) for nodes in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert all(a < b for a, b in itertools.pairwise(promised))
    for widths in ((4, 2, 1, 1), (2, 2, 2, 2), (1,) * 8, (3, 2, 1)):
        topology = Topology.widths(widths)
        best = sequoia_tree(table, topology.num_nodes - 1, len(widths))
        assert expected_tokens(best, table) >= expected_tokens(topology, table)


def test_the_size_follows_the_costs() -> None:
    table = [0.6, 0.2, 0.1]
    sizes = (0, 1, 2, 4, 8, 16, 32)
    free = best_tree(table, dict.fromkeys(sizes, 10.0), 0.01, max_depth=6)
    assert free.topology.num_nodes == 33
    dear = best_tree(table, {n: 10.0 + 10.0 * n for n in sizes}, 5.0, max_depth=6)
    assert dear.topology == Topology.chain(0), "decode plainly"
    assert dear == (Topology.chain(0), 1.0, 10.0)
    costs = {n: 10.0 + 0.3 * n for n in sizes}
    found = best_tree(table, costs, [2.0, 1.0, 1.0, 1.0], max_depth=4, overhead_ms=1.0)
    every = [
        (sum([2.0, 1.0, 1.0, 1.0][:depth]) + costs[n] + 1.0) / expected_tokens(sequoia_tree(table, n, depth), table)
        for n in sizes[1:]
        for depth in range(1, 5)
    ]
    assert abs(found.ms_per_token - min(every)) < 1e-9
    assert abs(found.tokens_per_step - expected_tokens(found.topology, table)) < 1e-9


@pytest.mark.parametrize(
    ("table", "nodes", "depth"),
    [([], 1, 1), ([0.5], 0, 1), ([0.5], 1, 0), ([-0.1], 1, 1), ([0.7, 0.7], 2, 2), ([float("nan")], 1, 1)],
)
def test_malformed_tables_are_refused(table: list[float], nodes: int, depth: int) -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"expected|acceptance"):
        sequoia_tree(table, nodes, depth)


def test_malformed_costs_are_refused() -> None:
    for costs, draft in (({}, 1.0), ({4: 0.0}, 1.0), ({4: 1.0}, [1.0])):
        with pytest.raises(UnsupportedArgumentError, match="_ms: expected"):
            best_tree([0.5], costs, draft, max_depth=2)
