"""Where strict attention finds each node's keys: blocks of absolute positions, the last ones once per path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 64
"""Positions per block. A key's place in its block is its position modulo this, whatever the pass."""


@dataclass(frozen=True)
class Paths:
    """The root-to-leaf paths of one row's tree, on the host.

    leaves: per leaf, its nodes from the root down. depths: per node. path_of: per node, a path it lies on.

    Example: parents (-1, 0, 0, 1) give leaves ((0, 2), (0, 1, 3)), depths (0, 1, 1, 2), path_of (0, 1, 0, 1).
    """

    leaves: tuple[tuple[int, ...], ...]
    depths: tuple[int, ...]
    path_of: tuple[int, ...]


@lru_cache(maxsize=1024)
def paths_of(parents: tuple[int, ...]) -> Paths:
    """Decompose a tree (`parents[0] == -1`, parents first) into its root-to-leaf paths."""
    inner = set(parents)
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    leaves: list[tuple[int, ...]] = []
    path_of = [-1] * len(parents)
    for leaf in (node for node in range(len(parents)) if node not in inner):
        path, node = [], leaf
        while node >= 0:
            path.append(node)
            path_of[node] = len(leaves)
            node = parents[node]
        leaves.append(tuple(reversed(path)))
    return Paths(tuple(leaves), tuple(depths), tuple(path_of))


@dataclass(frozen=True)
class BlockPlan:
    """How the `width` query nodes of one row read a cache of which the first `length` slots are committed.

    The text is cut into blocks by absolute position. The `shared` leading blocks hold committed text only and are the
    same for every node. Behind them each path has blocks of its own: the rest of the committed text, then the path's
    nodes in order, then filling that nobody sees. So a node's keys stand at their positions whatever slots its
    ancestors took.

    slots: int64 `[paths, own * BLOCK]`, the cache slots of each path's own blocks.
    path_of: int64 `[width]`, the path whose result each node reads; None when there is only one path.
    positions: int64 `[width]`. visible: bool `[1, 1, width, (shared + own) * BLOCK]`, by absolute position.
    """

    shared: int
    own: int
    slots: Tensor
    path_of: Tensor | None
    positions: Tensor
    visible: Tensor

    @staticmethod
    def build(length: int, parents: Sequence[int], width: int, device: torch.device) -> BlockPlan:
        """The plan of a tree in slots `length ..`, padded to `width` nodes that stand on the root and see no draft."""
        paths = paths_of(tuple(parents))
        shared, rest = divmod(length, BLOCK)
        own = -(-(rest + max(paths.depths) + 1) // BLOCK)
        committed = list(range(shared * BLOCK, length))
        # Filling is masked, but its weight of zero is multiplied all the same: it must be a number, so it is the root.
        slots = [
            [*committed, *(length + node for node in leaf), *[length] * (own * BLOCK - rest - len(leaf))]
            for leaf in paths.leaves
        ]
        padding = [0] * (width - len(parents))
        positions = torch.tensor([length + depth for depth in (*paths.depths, *padding)], device=device)
        columns = torch.arange((shared + own) * BLOCK, device=device)
        path_of = None
        if len(paths.leaves) > 1:
            path_of = torch.tensor([*paths.path_of, *padding], device=device)
        return BlockPlan(
            shared=shared,
            own=own,
            slots=torch.tensor(slots, device=device),
            path_of=path_of,
            positions=positions,
            visible=(columns <= positions[:, None])[None, None],
        )

    def within(self, window: int | None) -> Tensor:
        """`visible`, cut to the last `window` positions of each node (None: all)."""
        if window is None:
            return self.visible
        columns = torch.arange(self.visible.shape[-1], device=self.positions.device)
        return self.visible & (self.positions[:, None] - columns < window)
