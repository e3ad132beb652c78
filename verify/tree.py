"""Draft trees: what a drafter proposes, and the verdict a rule returns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kv.errors import InvalidTreeError

Q_SUM_TOLERANCE = 1e-3
"""How far a q row's float32 sum may be from 1 before the tree is refused (float32 softmax over 256k: ~1e-4)."""


class Verdict(NamedTuple):
    """What a rule keeps of a tree, per row.

    path: int64 `[rows, depth + 1]`, accepted node indices, root (0) first, padded with -1.
    num_accepted: int64 `[rows]`, accepted draft tokens = valid entries of `path` minus the root.
    next_token: int64 `[rows]`, the recovered or bonus token that follows the path.
    """

    path: Tensor
    num_accepted: Tensor
    next_token: Tensor


@lru_cache(maxsize=1024)
def _constant(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # an inference tensor could not be used outside inference mode later
        return torch.tensor(values, device=device)


@dataclass(frozen=True)
class Topology:
    """The shape of one tree, shared by all rows and steps that use it: node 0 is the root, parents come first.

    Example: `parents=(-1, 0, 0, 1)` is a root with two children, the first of which has one child.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        bad = [i for i, p in enumerate(self.parents) if not (p == -1 if i == 0 else 0 <= p < i)]
        if not self.parents or bad:
            raise InvalidTreeError(
                f"expected parents[0] == -1 and 0 <= parents[i] < i, got parents={self.parents} (wrong at {bad})"
            )

    @staticmethod
    @lru_cache(maxsize=1024)
    def chain(length: int) -> Topology:
        """Root followed by `length` tokens, each the child of the one before."""
        return Topology(tuple(range(-1, length)))

    @staticmethod
    @lru_cache(maxsize=1024)
    def widths(widths: tuple[int, ...]) -> Topology:
        """A static tree in level order: every node of level d has `widths[d]` children."""
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
        return _constant(self.parents, device)

    def depths_on(self, device: torch.device) -> Tensor:
        """`depths` as int64 `[nodes]`. Shared by every tree of this shape: never written to."""
        return _constant(self.depths, device)

    @cached_property
    def ancestor_mask(self) -> Tensor:
        """Bool `[nodes, nodes]`: `[i, j]` is True when j is i itself or one of its ancestors."""
        mask = torch.zeros(self.num_nodes, self.num_nodes, dtype=torch.bool)
        for i, parent in enumerate(self.parents):
            if parent >= 0:
                mask[i] = mask[parent]
            mask[i, i] = True
        return mask


@dataclass(frozen=True)
class DraftTree:
    """A proposed tree per row. All tensors are batch-first and live on one device.

    tokens: int64 `[rows, nodes]`; node 0 is the root, the last emitted token, whose K/V is not cached yet.
    parents: int64 `[rows, nodes]`; `parents[:, 0] == -1`, else `0 <= parents[:, i] < i`.
    num_nodes: int64 `[rows]`; nodes from there on are width padding and are never accepted.
    sampled: bool `[rows, nodes]`; True when the node's token was drawn from its parent's row of `q`,
        False when it was chosen deterministically (no q).
    q: float `[rows, q_rows, vocab]` or None; the laws really sampled from, after the drafter's own
        temperature and filters. Children of one parent share the parent's row.
    q_row: int64 `[rows, nodes]` or None; for each *parent* node the row of `q` its sampled children came from,
        -1 where it has none.
    topology: the common shape when all rows share one (lets masks be built once, on the host).
    replacement: how the sampled children of one parent were drawn from its row, in node order: without replacement
        (each from the row without the ones before it, renormalised) or, when True, independently.
    """

    tokens: Tensor
    parents: Tensor
    num_nodes: Tensor
    sampled: Tensor
    q: Tensor | None = None
    q_row: Tensor | None = None
    topology: Topology | None = None
    replacement: bool = False

    @staticmethod
    def build(topology: Topology, tokens: Tensor, q: Tensor | None = None, sampled: Tensor | None = None) -> DraftTree:
        """A tree of one shape for all rows. With `q`, row `i` of q is the law at node `i`'s children.

        Args:
            tokens: int64 `[rows, topology.num_nodes]`.
            q: float `[rows, q_rows, vocab]`; nodes `0 .. q_rows-1` own a row.
            sampled: bool `[rows, nodes]`; defaults to "all but the root" when q is given, else to none.
        """
        rows, nodes = tokens.shape
        device = tokens.device
        parents = topology.parents_on(device).expand(rows, nodes)
        if sampled is None:
            sampled = torch.zeros(rows, nodes, dtype=torch.bool, device=device)
            if q is not None:
                sampled[:, 1:] = True
        q_row = None
        if q is not None:
            index = torch.arange(nodes, device=device)
            q_row = torch.where(index < q.shape[1], index, -1).expand(rows, nodes)
        num_nodes = torch.full((rows,), nodes, device=device)
        return DraftTree(tokens, parents, num_nodes, sampled, q, q_row, topology)

    @staticmethod
    def root_only(tokens: Tensor) -> DraftTree:
        """No proposal: decode plainly this step. `tokens` int64 `[rows]` are the roots."""
        return DraftTree.build(Topology.chain(0), tokens[:, None])

    @cached_property
    def valid(self) -> Tensor:
        """Bool `[rows, nodes]`: real nodes, not width padding."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.num_nodes[:, None]

    @cached_property
    def ancestor_mask(self) -> Tensor:
        """Bool `[rows, nodes, nodes]`: `[b, i, j]` is True when j is i or an ancestor of i."""
        rows, nodes = self.tokens.shape
        if self.topology is not None:
            return self.topology.ancestor_mask.to(self.tokens.device).expand(rows, nodes, nodes)
        mask = torch.eye(nodes, dtype=torch.bool, device=self.tokens.device).expand(rows, nodes, nodes).clone()
        mask |= torch.arange(nodes, device=self.tokens.device) == self.parents[:, :, None]
        span = 1
        while span < nodes:  # doubling: after each round, ancestors up to distance 2 * span are in
            mask = torch.bmm(mask.float(), mask.float()) > 0
            span *= 2
        return mask

    @cached_property
    def depths(self) -> Tensor:
        """Int64 `[rows, nodes]`: distance from the root; a node's position is `lengths[row] + depth`."""
        if self.topology is not None:
            return self.topology.depths_on(self.tokens.device).expand(self.tokens.shape)
        return self.ancestor_mask.sum(-1) - 1

    @cached_property
    def max_depth(self) -> int:
        """Deepest node of any row (a host integer)."""
        return max(self.topology.depths) if self.topology is not None else int(self.depths.max())

    @cached_property
    def is_chain(self) -> bool:
        """True when every row is a chain (chains of different lengths included)."""
        if self.topology is not None:
            return self.topology.is_chain
        expected = torch.arange(-1, self.tokens.shape[1] - 1, device=self.tokens.device)
        return bool(((self.parents == expected) | ~self.valid).all())

    @cached_property
    def any_sampled(self) -> bool:
        return self.q is not None and bool((self.sampled & self.valid).any())

    @cached_property
    def all_sampled(self) -> bool:
        return bool((self.sampled | ~self.valid)[:, 1:].all())

    def validate(self, vocab: int, roots: Tensor) -> None:
        """Check everything a rule relies on.

        Args:
            vocab: the target's vocabulary size.
            roots: int64 `[rows]`, the last emitted token of each row.

        Raises:
            InvalidTreeError: naming the first broken property.
        """
        rows, nodes = self.tokens.shape

        def require(good: bool | Tensor, problem: str) -> None:
            if not bool(good):
                raise InvalidTreeError(f"draft tree: {problem}")

        require(rows == roots.shape[0], f"expected {roots.shape[0]} rows, got {rows}")
        for name, wanted in (("parents", (rows, nodes)), ("sampled", (rows, nodes)), ("num_nodes", (rows,))):
            shape = tuple(getattr(self, name).shape)
            require(shape == wanted, f"expected {name} of shape {wanted}, got {shape}")
        require(self.tokens.dtype == torch.int64, f"expected int64 tokens, got {self.tokens.dtype}")
        # Small integers are checked on the host: a handful of copies instead of dozens of tensor operations.
        tokens, counts = self.tokens.tolist(), self.num_nodes.tolist()
        require([row[0] for row in tokens] == roots.tolist(), "node 0 is not the last emitted token")
        require(all(1 <= count <= nodes for count in counts), f"num_nodes outside 1..{nodes}")
        good = all(0 <= token < vocab for row in tokens for token in row)
        require(good, f"token ids outside 0..{vocab - 1}")
        if self.topology is None:
            index = torch.arange(nodes, device=self.tokens.device)
            ordered = (self.parents >= 0) & (self.parents < index)
            require((self.parents[:, 0] == -1).all() and ordered[:, 1:].all(), "a parent does not precede its child")
        else:
            count = self.topology.num_nodes
            require(count == nodes, f"topology has {count} nodes, tokens have {nodes}")
            wanted_parents = list(self.topology.parents)
            require(all(row == wanted_parents for row in self.parents.tolist()), "parents contradict topology")
        if self.q is None or self.q_row is None:
            require(not self.sampled.any(), "nodes are marked as sampled but no q was given")
            return
        q_shape = tuple(self.q.shape)
        require(len(q_shape) == 3 and q_shape[0] == rows and q_shape[2] == vocab, f"q has shape {q_shape}")
        require(self.q_row.shape == (rows, nodes), f"q_row has shape {tuple(self.q_row.shape)}")
        require((self.q_row < q_shape[1]).all(), "q_row points beyond q")
        require((self.q >= 0).all() and ((self.q.sum(-1) - 1).abs() <= Q_SUM_TOLERANCE).all(), "a q row is not a law")
        drawn = self.sampled & self.valid
        row = self.q_row.gather(1, self.parents.clamp(min=0))
        require((row >= 0)[drawn].all(), "a sampled node's parent has no q row")
        mass = self.q[torch.arange(rows, device=row.device)[:, None], row.clamp(min=0), self.tokens]
        require((mass > 0)[drawn].all(), "a sampled token has q = 0: q is not the law it was drawn from")
