"""Growing a draft tree level by level: what all shapes share, and the growth of static ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.drafters.children import Children, mixed_children, refuse_nan, sampled_children, top_children
from specdec.verify.topology import Topology, constant
from specdec.verify.tree import DraftTree


class Frontier(NamedTuple):
    """Nodes the drafter must run next, all `[rows, width]`. Their slots follow those of the nodes run before.

    tokens: int64. parents: int64, *slots* of the parents. impossible: bool, nodes no law can reach (and padding).
    """

    tokens: Tensor
    parents: Tensor
    impossible: Tensor


class Run:
    """The nodes the drafter has run so far, in the order of their slots in the cache's tail (slot 0 is the root).

    tokens, parents, depths: int64 `[rows, slots]`; ancestors: bool `[rows, slots, slots]`, self included;
    impossible: bool `[rows, slots]`. Leaves are never run, and what is run need not be proposed.
    """

    def __init__(self, roots: Tensor):
        """Args: roots: int64 `[rows]`."""
        rows, device = roots.shape[0], roots.device
        self.tokens = roots[:, None]
        self.parents = torch.full((rows, 1), -1, dtype=torch.int64, device=device)
        self.depths = torch.zeros_like(self.parents)
        self.impossible = torch.zeros(rows, 1, dtype=torch.bool, device=device)
        self.ancestors = torch.ones(rows, 1, 1, dtype=torch.bool, device=device)

    def add(self, level: Frontier) -> range:
        """Append a level; returns its slots."""
        first, count = self.tokens.shape[1], level.tokens.shape[1]
        rows, device = self.tokens.shape[0], self.tokens.device
        of_parent = self.ancestors.gather(1, level.parents[:, :, None].expand(-1, -1, first))
        own = torch.eye(count, dtype=torch.bool, device=device).expand(rows, -1, -1)
        hidden = torch.zeros(rows, first, count, dtype=torch.bool, device=device)
        self.ancestors = torch.cat([torch.cat([self.ancestors, hidden], 2), torch.cat([of_parent, own], 2)], 1)
        self.depths = torch.cat([self.depths, self.depths.gather(1, level.parents) + 1], 1)
        self.tokens = torch.cat([self.tokens, level.tokens], 1)
        self.parents = torch.cat([self.parents, level.parents], 1)
        self.impossible = torch.cat([self.impossible, level.impossible], 1)
        return range(first, first + count)


class Grown(NamedTuple):
    """A finished draft. slots: per row, the tail slot each node was run in (-1: not run); None when node i lies in
    slot i, as far as nodes were run."""

    tree: DraftTree
    slots: list[list[int]] | None


class Grower(ABC):
    """Grows one step's trees. What a row gets depends on that row alone, and no token is withdrawn for what it is."""

    @abstractmethod
    def extend(self, scores: Tensor) -> Frontier | None:
        """Give children to the nodes run last.

        Args:
            scores: float `[rows, width, vocab]` after those nodes, processed, after the drafter's own temperature.

        Returns:
            which of the nodes so far to run next; None when the trees are whole.
        """

    @abstractmethod
    def finish(self) -> Grown:
        """The trees."""


def grow(grower: Grower, roots: Tensor, score: Callable[[Run, range], Tensor]) -> Grown:
    """One step's trees: a level is scored, given children, and those that go on are scored in turn.

    Args:
        roots: int64 `[rows]`.
        score: runs the given slots of a `Run` (all slots before them are run) and returns their scores, float
            `[rows, len(slots), vocab]`, processed, after the drafter's own temperature.
    """
    run = Run(roots)
    slots = range(1)
    while (frontier := grower.extend(score(run, slots))) is not None:
        slots = run.add(frontier)
    return grower.finish()


class _Level(NamedTuple):
    """One level of inner nodes of a static tree.

    counts: their children; most: the largest count; children: int64 `[width, most]`, node of each child, 0 for none;
    take: where in that table, flattened, each node of the next level stands; inner: which of those nodes are inner;
    parents: slots of the parents of the inner ones.
    """

    counts: Tensor
    most: int
    children: Tensor
    take: Tensor
    inner: Tensor
    parents: Tensor


class _Plan(NamedTuple):
    levels: list[_Level]
    slots: list[int]
    in_place: bool


@lru_cache(maxsize=256)
def _plan(topology: Topology, device: torch.device) -> _Plan:
    """Index tables of a level-ordered topology. Only inner nodes are run: their slots number them level by level."""
    children: list[list[int]] = [[] for _ in topology.parents]
    for node, parent in enumerate(topology.parents[1:], 1):
        children[parent].append(node)
    slots, run = [-1] * topology.num_nodes, 0
    for node, own in enumerate(children):
        if own:
            slots[node], run = run, run + 1
    levels = []
    with torch.inference_mode(False):  # kept beyond this call
        for nodes in topology.levels[:-1]:
            inner = [node for node in nodes if children[node]]
            most = max(len(children[node]) for node in inner)
            table = [children[node] + [0] * (most - len(children[node])) for node in inner]
            flat = [node for row in table for node in row]
            born = [node for node in flat if node]
            grown = [i for i, node in enumerate(born) if children[node]]
            columns = (
                [len(children[node]) for node in inner],
                [i for i, node in enumerate(flat) if node],
                grown,
                [slots[topology.parents[born[i]]] for i in grown],
            )
            counts, take, place, parents = (
                torch.tensor(column, dtype=torch.int64, device=device) for column in columns
            )
            levels.append(_Level(counts, most, torch.tensor(table, device=device), take, place, parents))
    return _Plan(levels, slots, in_place=all(slot in (node, -1) for node, slot in enumerate(slots)))


class StaticGrower(Grower):
    """A tree of one topology for every row.

    Args:
        topology: in level order, at least one node below the root.
        depths: per row, levels it may have: deeper nodes are padding.
        mode: see `children.MODES`; uniforms: float64 `[rows, >= nodes]`, the child at node i uses column i.
    """

    def __init__(self, topology: Topology, roots: Tensor, depths: tuple[int, ...], mode: str, uniforms: Tensor):
        self._topology, self._depths = topology, depths
        self._plan = _plan(topology, roots.device)
        self._mode, self._uniforms = mode, uniforms
        self._columns = [roots[:, None]]
        self._sampled = [torch.zeros_like(roots, dtype=torch.bool)[:, None]]
        self._laws: list[Tensor] = []
        self._peaks: list[Tensor] = []
        self._impossible = torch.zeros_like(roots, dtype=torch.bool)[:, None]
        self._depth = 0

    def extend(self, scores: Tensor) -> Frontier | None:
        level = self._plan.levels[self._depth]
        self._depth += 1
        made = self._children(level, scores)
        tokens = made.tokens.flatten(1)[:, level.take]
        self._columns.append(tokens)
        if made.sampled is not None and made.law is not None:
            self._sampled.append(made.sampled.flatten(1)[:, level.take])
            self._laws.append(made.law)
        elif made.peaks is not None:
            self._peaks.append(made.peaks)
        if self._depth == len(self._plan.levels):
            return None
        impossible = (~made.possible | self._impossible[:, :, None]).flatten(1)[:, level.take][:, level.inner]
        self._impossible = impossible
        return Frontier(tokens[:, level.inner], level.parents.expand(len(tokens), -1), impossible)

    def _children(self, level: _Level, scores: Tensor) -> Children:
        if self._mode == "top":
            return top_children(scores, level.most)
        if self._mode == "mixed":
            last = level.children.gather(1, level.counts[:, None] - 1)[:, 0]
            return mixed_children(scores, level.counts, level.most, self._uniforms[:, last])
        return sampled_children(scores, level.most, self._uniforms[:, level.children])

    def finish(self) -> Grown:
        refuse_nan(self._peaks)
        topology, slots = self._topology, self._plan.slots
        tree = DraftTree.build(topology, torch.cat(self._columns, 1))
        if self._laws:
            q_row = constant(tuple(slots), tree.tokens.device).expand(tree.tokens.shape)
            tree = replace(tree, sampled=torch.cat(self._sampled, 1), q=torch.cat(self._laws, 1), q_row=q_row)
        if any(depth < tree.max_depth for depth in self._depths):  # in level order these are the last nodes
            counts = [sum(depth <= limit for depth in topology.depths) for limit in self._depths]
            tree = replace(tree, num_nodes=torch.tensor(counts, device=tree.tokens.device))
        return Grown(tree, None if self._plan.in_place else [slots] * len(self._depths))
