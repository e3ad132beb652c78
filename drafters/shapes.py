"""Which trees a drafter can be told to grow, and the static ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import Any, NamedTuple

from torch import Tensor

from specdec.drafters.growth import Grower, StaticGrower
from specdec.kv.errors import InvalidTreeError, UnsupportedArgumentError
from specdec.kv.limits import MOST_NODES, checked_count, shown
from specdec.verify.topology import Topology

Path = tuple[int, ...]


class Start(NamedTuple):
    """One step of growing.

    roots: int64 `[rows]`. depths: per row, levels it may have; max_nodes: drafted tokens each row may have.
    mode: one of `children.MODES`; "top" when nothing may be random.
    uniforms: float64 `[rows, num_uniforms]`, the only randomness to use.
    """

    roots: Tensor
    depths: tuple[int, ...]
    max_nodes: int
    mode: str
    uniforms: Tensor


class TreeShape(ABC):
    """A policy that decides, level by level, which nodes a draft gets. What a row gets may depend on that row only.

    max_depth: most levels below the root; max_nodes: most drafted tokens per row.
    max_children: most children a node is certain to get (a vocabulary must hold so many).
    modes: which `children.MODES` it can grow when the call samples, the default first.
    looks_ahead: see `Drafter.looks_ahead`.
    """

    max_depth: int
    max_nodes: int
    max_children: int = 1
    modes: tuple[str, ...]
    looks_ahead: bool = False

    @property
    def num_uniforms(self) -> int:
        """Uniforms per row and step that a sampled draft of this shape may look at."""
        return self.max_nodes + 1

    @property
    def num_slots(self) -> int:
        """Most slots of a row's tail in which the drafter runs nodes, the root's included."""
        return self.max_nodes + 1

    def nodes_within(self, depth: int) -> int:
        """Most drafted tokens of a tree cut to `depth` levels."""
        return self.max_nodes if depth > 0 else 0

    @abstractmethod
    def grower(self, start: Start) -> Grower:
        """What grows one step's trees, at least one level and one node deep."""


class Static(TreeShape):
    """The same topology at every step: `Static(Topology.widths((3, 2, 1)))`. Nodes are renumbered level by level."""

    modes = ("mixed", "top", "sampled")

    def __init__(self, topology: Topology):
        self.topology = level_order(topology)
        self.max_depth = len(self.topology.levels) - 1
        self.max_nodes = self.topology.num_nodes - 1
        self.max_children = max(self.topology.parents.count(parent) for parent in set(self.topology.parents))
        if self.max_nodes < 1:
            raise UnsupportedArgumentError("tree: expected at least one node below the root, got a bare root")

    def nodes_within(self, depth: int) -> int:
        return leading_nodes(self.topology, depth, self.max_nodes).num_nodes - 1

    def grower(self, start: Start) -> Grower:
        topology = leading_nodes(self.topology, max(start.depths), start.max_nodes)
        return StaticGrower(topology, start.roots, start.depths, start.mode, start.uniforms)

    def __repr__(self) -> str:
        return f"Static({self.topology})"


def shape_of(tree: Any) -> TreeShape:
    """The shape a user means by `tree=`.

    Args:
        tree: children per level, e.g. `(3, 2, 1)`; a `Topology`; a list of paths as Medusa's and EAGLE's
            configurations give them, e.g. `[[0], [0, 0], [1]]` (see `from_paths`); or a `TreeShape`.

    Raises:
        UnsupportedArgumentError: anything else, saying what was expected; more than `MOST_NODES` nodes.
    """
    if isinstance(tree, TreeShape):
        return tree
    if isinstance(tree, Topology):
        return Static(tree)
    if isinstance(tree, Sequence) and not isinstance(tree, (str, bytes)) and len(tree) > 0:
        checked_count("levels (or paths) of the tree", len(tree), 1, MOST_NODES)
        if all(_is_count(width) for width in tree):
            return Static(Topology.widths(tuple(int(width) for width in tree)))
        if all(isinstance(path, Sequence) and not isinstance(path, str) for path in tree):
            return Static(from_paths(tree))
    raise UnsupportedArgumentError(
        "tree: expected tree widths >= 1 such as (3, 2, 1), a Topology, a list of paths such as [[0], [0, 0], [1]] or "
        f"a TreeShape such as BestFirst(...), got {shown(tree)}"
    )


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and _is_whole(value, 1)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def from_paths(paths: Sequence[Sequence[int]]) -> Topology:
    """The tree that holds a node for every path, in level order.

    A path gives the rank of the child taken at each level, 0 being the drafter's best: `[[0], [1], [0, 0]]` is a
    root with two children, the better one of which has one child. Skipped ranks close up: `[[0], [2]]` is
    `[[0], [1]]`, whose second node takes a likelier token.

    Raises:
        UnsupportedArgumentError: a negative rank, an empty or repeated path, or one whose parent is not in the list.
    """
    checked_count("paths of the tree", len(paths), 0, MOST_NODES)
    known: dict[Path, int] = {(): 0}
    parents = [-1]
    for path in paths:
        if not 1 <= len(path) <= MOST_NODES or not all(_is_whole(rank, 0) for rank in path):
            raise UnsupportedArgumentError(
                f"tree: expected paths of 1 to {MOST_NODES} ranks >= 0, got {shown(list(path[: MOST_NODES + 1]))}"
            )
    for path in sorted(map(tuple, paths), key=lambda path: (len(path), path)):
        if path in known:
            raise UnsupportedArgumentError(f"tree: expected each path once, got {shown(list(path))} twice")
        if path[:-1] not in known:
            raise UnsupportedArgumentError(
                f"tree: path {shown(list(path))} has no parent in the list: add {shown(list(path[:-1]))} or leave it "
                "out"
            )
        known[path] = len(parents)
        parents.append(known[path[:-1]])
    return Topology(tuple(parents))


def to_paths(topology: Topology) -> list[list[int]]:
    """The inverse of `from_paths` (for level-ordered topologies): every node but the root as a path of ranks."""
    paths: list[list[int]] = [[]]
    born = [0] * topology.num_nodes
    for parent in topology.parents[1:]:
        paths.append([*paths[parent], born[parent]])
        born[parent] += 1
    return paths[1:]


@lru_cache(maxsize=256)
def level_order(topology: Topology) -> Topology:
    """The same tree with its nodes numbered level by level, siblings in their old order and side by side."""
    children: list[list[int]] = [[] for _ in topology.parents]
    for node, parent in enumerate(topology.parents[1:], 1):
        children[parent].append(node)
    parents, level = [-1], [(0, 0)]
    while level:
        following = []
        for old, new in level:
            for child in children[old]:
                following.append((child, len(parents)))
                parents.append(new)
        level = following
    return Topology(tuple(parents))


@lru_cache(maxsize=1024)
def leading_nodes(topology: Topology, max_depth: int, max_nodes: int) -> Topology:
    """What is left of a level-ordered tree under a budget: its leading levels, and of those its leading nodes.

    Raises:
        InvalidTreeError: the tree is not in level order.
    """
    if list(topology.depths) != sorted(topology.depths):
        raise InvalidTreeError(f"expected nodes in level order, got parents={topology.parents}")
    stop = sum(depth <= max(0, max_depth) for depth in topology.depths)
    return Topology(topology.parents[: min(stop, 1 + max(0, max_nodes))])
