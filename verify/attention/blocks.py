"""Attention whose bits do not depend on where in a draft tree, or in how long a pass, a node stands.

Keys are read in blocks of absolute positions, the last ones once per root-to-leaf path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

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
    """The `Plan` (see `register.py`) of `width` query nodes of one row over a cache with `length` committed slots.

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

    computes: ClassVar[tuple[str, ...]] = ("softcap",)
    refuses: ClassVar[str] = "exactness='strict' does not compute; use exactness='distribution'"

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

    def mask_for(self, window: int | None) -> Tensor:
        """`visible`, cut to the last `window` positions of each node (None: all)."""
        if window is None:
            return self.visible
        columns = torch.arange(self.visible.shape[-1], device=self.positions.device)
        return self.visible & (self.positions[:, None] - columns < window)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """Attention of one row's nodes, block by block.

        Every block is one product of the same size; the largest score does not depend on an order; sums are formed
        within blocks and then over blocks from the first to the last, and blocks out of sight add exact zeros. So a
        node's result is a function of its query and of the K/V at the positions it sees: neither its slot, nor the
        other nodes, nor the number of blocks of the pass enters.

        Args:
            query: `[1, heads, width, head_dim]`; key: `[1, kv_heads, >= slots of the plan, head_dim]`; value: same, its
                own head_dim. Below float32 everything is computed in float32 and rounded once.
            mask: of `mask_for`.

        Returns:
            `[1, width, heads, value's head_dim]` in the query's dtype.
        """
        _, heads, width, size = query.shape
        kv_heads = key.shape[1]
        groups = heads // kv_heads
        dtype = torch.promote_types(query.dtype, torch.float32)
        keys, values = self._blocks(key[0], dtype), self._blocks(value[0], dtype)
        paths, own, shared = self.slots.shape[0], self.own, self.shared
        count = keys.shape[1]
        queries = query[0].reshape(kv_heads, 1, groups * width, size).to(dtype).expand(-1, count, -1, -1)
        scores = torch.bmm(queries.reshape(-1, groups * width, size), keys.flatten(0, 1).transpose(1, 2))
        scores = self._by_node(scores.view(kv_heads, count, groups, width, BLOCK)) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        seen = mask[0, 0].view(width, shared + own, BLOCK).transpose(0, 1)[None, :, None]
        scores = scores.masked_fill(~seen, float("-inf"))
        weights = torch.exp(scores - scores.amax((1, 4), keepdim=True))
        totals = weights.sum(-1, keepdim=True)
        weights = weights.view(kv_heads, shared + own, groups * width, BLOCK)
        if paths > 1:
            tail = weights[:, None, shared:].expand(-1, paths, -1, -1, -1).flatten(1, 2)
            weights = torch.cat([weights[:, :shared], tail], 1)
        parts = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1))
        parts = self._by_node(parts.view(kv_heads, count, groups, width, -1))
        out, total = parts[:, 0], totals[:, 0]
        for block in range(1, shared + own):  # one after the other: a library's sum may pair them by their number
            out, total = out + parts[:, block], total + totals[:, block]
        out = (out / total).to(query.dtype)
        return out.view(1, heads, width, -1).transpose(1, 2).contiguous()

    def _blocks(self, states: Tensor, dtype: torch.dtype) -> Tensor:
        """`[kv_heads, slots, size]` → `[kv_heads, shared + paths * own, BLOCK, size]`, contiguous."""
        common = states[:, : self.shared * BLOCK]
        tails = states[:, self.slots.flatten().to(states.device)]
        return torch.cat([common, tails], 1).to(dtype).unflatten(1, (-1, BLOCK))

    def _by_node(self, blocks: Tensor) -> Tensor:
        """Of the blocks that exist once per path, each node takes those of its own path.

        `[kv_heads, shared + paths * own, groups, width, n]` → `[kv_heads, shared + own, groups, width, n]`
        """
        if self.path_of is None:
            return blocks
        tails = blocks[:, self.shared :].unflatten(1, (-1, self.own))
        nodes = torch.arange(blocks.shape[3], device=blocks.device)
        chosen = tails[:, self.path_of.to(blocks.device), :, :, nodes]  # [width, kv_heads, own, groups, n]
        return torch.cat([blocks[:, : self.shared], chosen.permute(1, 2, 3, 0, 4)], 1)
