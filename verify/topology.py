"""Shapes of draft trees, and the small index tensors made from them, built once and shared."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kv.errors import InvalidTreeError
from specdec.kv.limits import MOST_NODES, checked_count, nodes_of_widths, shown


@lru_cache(maxsize=1024)
def all_but_root(value: bool, nodes: int, device: torch.device) -> Tensor:
    """Bool `[nodes]`: False at the root, `value` elsewhere. Shared: never written to."""
    with torch.inference_mode(False):
        flags = torch.full((nodes,), value, device=device)
        flags[0] = False
        return flags


@lru_cache(maxsize=1024)
def constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    """`values` as int64 `[len(values)]`. Shared: never written to."""
    with torch.inference_mode(False):  # an inference tensor could not be used outside inference mode later
        return torch.tensor(values, device=device)


@lru_cache(maxsize=1024)
def indices(count: int, device: torch.device) -> Tensor:
    """`0 .. count - 1` as int64 `[count]`. Shared: never written to."""
    with torch.inference_mode(False):
        return torch.arange(count, device=device)


@dataclass(frozen=True)
class Topology:
    """The shape of one tree, shared by all rows and steps that use it: node 0 is the root, parents come first.

    Example: `parents=(-1, 0, 0, 1)` is a root with two children, the first of which has one child.

    Raises:
        InvalidTreeError: no tree in that order. UnsupportedArgumentError: more than `MOST_NODES` nodes below the root
            (from `chain` and `widths`, too, before anything of that size is made).
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        checked_count("nodes of the tree below its root", max(0, len(self.parents) - 1), 0, MOST_NODES)
        bad = [i for i, p in enumerate(self.parents) if not (p == -1 if i == 0 else 0 <= p < i)]
        if not self.parents or bad:
            raise InvalidTreeError(
                f"expected parents[0] == -1 and 0 <= parents[i] < i, got parents={shown(self.parents)} (wrong at "
                f"{bad[:8]})"
            )

    @staticmethod
    @lru_cache(maxsize=1024)
    def chain(length: int) -> Topology:
        """Root followed by `length` tokens, each the child of the one before."""
        return Topology(tuple(range(-1, checked_count("tokens of the chain", length, 0, MOST_NODES))))

    @staticmethod
    @lru_cache(maxsize=1024)
    def widths(widths: tuple[int, ...]) -> Topology:
        """A static tree in level order: every node of level d has `widths[d]` children."""
        checked_count("nodes of the tree below its root", nodes_of_widths(widths), 0, MOST_NODES)
        parents, level = [-1], [0]
        for width in widths:
            first = len(parents)
            parents += [node for node in level for _ in range(width)]
            level = list(range(first, len(parents)))
        return Topology(tuple(parents))

    @cached_property
    def num_nodes(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """Node indices by depth."""
        return tuple(
            tuple(i for i, depth in enumerate(self.depths) if depth == level) for level in range(max(self.depths) + 1)
        )

    @cached_property
    def is_chain(self) -> bool:
        return self.parents == tuple(range(-1, self.num_nodes - 1))

    def parents_on(self, device: torch.device) -> Tensor:
        """`parents` as int64 `[nodes]`. Shared by every tree of this shape: never written to."""
        return constant(self.parents, device)

    def depths_on(self, device: torch.device) -> Tensor:
        """`depths` as int64 `[nodes]`. Shared by every tree of this shape: never written to."""
        return constant(self.depths, device)

    @cached_property
    def ancestor_mask(self) -> Tensor:
        """Bool `[nodes, nodes]`: `[i, j]` is True when j is i itself or one of its ancestors."""
        mask = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask[i] = mask[parent]
            mask[i, i] = True
        return mask


class Frame(NamedTuple):
    """What all `DraftTree`s of one shape have in common; the names are theirs.

    shared: all of these tensors; versions: of each of them, as long as nobody has written to it (see `VERSION`).
    """

    parents: Tensor
    num_nodes: Tensor
    sampled: Tensor
    q_row: Tensor | None
    valid: Tensor
    shared: tuple[Tensor, ...]
    versions: tuple[int, ...]


VERSION = attrgetter("_version")
"""A tensor's number that grows whenever it is written to."""


@lru_cache(maxsize=1024)
def frame_of(topology: Topology, rows: int, q_rows: int | None, device: torch.device) -> Frame:
    """Trees of `rows` full rows in which nodes `0 .. q_rows - 1` own a row of q. Shared: never written to."""
    nodes = topology.num_nodes
    with torch.inference_mode(False):  # views of inference mode could not be used outside of it later
        q_row = None
        if q_rows is not None:
            q_row = constant(tuple(i if i < q_rows else -1 for i in range(nodes)), device).expand(rows, nodes)
        parts = (
            topology.parents_on(device).expand(rows, nodes),
            constant((nodes,), device).expand(rows),
            all_but_root(q_rows is not None, nodes, device).expand(rows, nodes),
            q_row,
            torch.ones(rows, nodes, dtype=torch.bool, device=device),
        )
        shared = tuple(part for part in parts if part is not None)
        return Frame(*parts, shared, tuple(map(VERSION, shared)))
