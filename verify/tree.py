"""Draft trees: what a drafter proposes, and the verdict a rule returns."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kv.errors import InvalidTreeError
from specdec.verify.host_integers import entries
from specdec.verify.topology import VERSION, Frame, Topology, frame_of, indices

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

        All but `tokens` and `q` is shared by the trees of a shape: to change it use `dataclasses.replace`.

        Args:
            tokens: int64 `[rows, topology.num_nodes]`.
            q: float `[rows, q_rows, vocab]`; nodes `0 .. q_rows-1` own a row.
            sampled: bool `[rows, nodes]`; defaults to "all but the root" when q is given, else to none.
        """
        frame = frame_of(topology, tokens.shape[0], None if q is None else q.shape[1], tokens.device)
        return DraftTree(
            tokens,
            frame.parents,
            frame.num_nodes,
            frame.sampled if sampled is None else sampled,
            q,
            frame.q_row,
            topology,
        )

    @staticmethod
    def root_only(tokens: Tensor) -> DraftTree:
        """No proposal: decode plainly this step. `tokens` int64 `[rows]` are the roots."""
        return DraftTree.build(Topology.chain(0), tokens[:, None])

    def up_to(self, depth: int) -> DraftTree | None:
        """The levels down to `depth`; None when the nodes are not in level order (or have no common shape)."""
        if self.topology is None or list(self.topology.depths) != sorted(self.topology.depths):
            return None
        count = sum(own <= depth for own in self.topology.depths)
        return DraftTree(
            self.tokens[:, :count],
            self.parents[:, :count],
            self.num_nodes.clamp(max=count),
            self.sampled[:, :count],
            self.q,
            None if self.q_row is None else self.q_row[:, :count],
            Topology(self.topology.parents[:count]),
            self.replacement,
        )

    @cached_property
    def valid(self) -> Tensor:
        """Bool `[rows, nodes]`: real nodes, not width padding."""
        if self._frame is not None:
            return self._frame.valid
        return indices(self.tokens.shape[1], self.tokens.device) < self.num_nodes[:, None]

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

    @property
    def is_shared_chain(self) -> bool:
        """True when all rows have one chain's shape, padding included: known without looking at any tensor."""
        return self.topology is not None and self.topology.is_chain

    @property
    def is_drawn_chain(self) -> bool:
        """True when all rows are whole chains and row `i` of q is the law that node `i + 1` was drawn from."""
        if not self.is_shared_chain or self._frame is None or self.q is None:
            return False
        return 0 < self.q.shape[1] == self.tokens.shape[1] - 1

    @cached_property
    def _frame(self) -> Frame | None:
        """What `build` gave this tree, None when anything but tokens and q is not of its making: known without looking
        at any tensor."""
        if self.topology is None or self.topology.num_nodes != self.tokens.shape[1]:
            return None
        q_rows = None if self.q is None or self.q.dim() != 3 else self.q.shape[1]
        frame = frame_of(self.topology, self.tokens.shape[0], q_rows, self.tokens.device)
        ours = (self.parents, self.num_nodes, self.sampled, self.q_row)
        written_to = tuple(map(VERSION, frame.shared)) != frame.versions
        return frame if all(map(operator.is_, ours, frame)) and not written_to else None

    @cached_property
    def any_sampled(self) -> bool:
        return self.q is not None and bool((self.sampled & self.valid).any())

    @cached_property
    def q_sums(self) -> Tensor:
        """Float `[rows, parents]`: the sum of every q row, 1 up to rounding."""
        assert self.q is not None, "only trees with sampled nodes have q rows"
        return self.q.sum(-1)

    def validate(self, vocab: int, roots: Tensor) -> None:
        """Check everything a rule relies on.

        Args:
            vocab: the target's vocabulary size.
            roots: int64 `[rows]`, the last emitted token of each row.

        Raises:
            InvalidTreeError: naming the first broken property.
        """
        if self.tokens.shape[0] != roots.shape[0]:
            raise _broken(f"expected {roots.shape[0]} rows, got {self.tokens.shape[0]}")
        if self.tokens.dtype != torch.int64:
            raise _broken(f"expected int64 tokens, got {self.tokens.dtype}")
        # Small integers are checked on the host: a handful of copies instead of dozens of tensor operations.
        tokens = self.tokens.tolist()
        if self._frame is None:  # else all but tokens and q is sound
            self._validate_shape()
        for row, root in zip(tokens, roots.tolist(), strict=True):
            if row[0] != root:
                raise _broken("node 0 is not the last emitted token")
            if min(row) < 0 or max(row) >= vocab:
                raise _broken(f"token ids outside 0..{vocab - 1}")
        if self.q is not None and self.q_row is not None:
            self._validate_laws(vocab, tokens, self.q, self.q_row)
        elif self._frame is None and self.sampled.any():
            raise _broken("nodes are marked as sampled but no q was given")

    def _validate_shape(self) -> None:
        rows, nodes = self.tokens.shape
        for name, wanted in (("parents", (rows, nodes)), ("sampled", (rows, nodes)), ("num_nodes", (rows,))):
            shape = tuple(getattr(self, name).shape)
            if shape != wanted:
                raise _broken(f"expected {name} of shape {wanted}, got {shape}")
        if not all(1 <= count <= nodes for count in self.num_nodes.tolist()):
            raise _broken(f"num_nodes outside 1..{nodes}")
        if self.topology is None:
            index = torch.arange(nodes, device=self.tokens.device)
            ordered = (self.parents >= 0) & (self.parents < index)
            if not ((self.parents[:, 0] == -1).all() and ordered[:, 1:].all()):
                raise _broken("a parent does not precede its child")
            return
        if self.topology.num_nodes != nodes:
            raise _broken(f"topology has {self.topology.num_nodes} nodes, tokens have {nodes}")
        wanted_parents = list(self.topology.parents)
        if not all(row == wanted_parents for row in self.parents.tolist()):
            raise _broken("parents contradict topology")

    def _validate_laws(self, vocab: int, tokens: list[list[int]], q: Tensor, q_row: Tensor) -> None:
        rows, nodes = self.tokens.shape
        q_shape = tuple(q.shape)
        if len(q_shape) != 3 or q_shape[0] != rows or q_shape[2] != vocab:
            raise _broken(f"q has shape {q_shape}")
        if q_row.shape != (rows, nodes):
            raise _broken(f"q_row has shape {tuple(q_row.shape)}")
        sums = [total for row in self.q_sums.tolist() for total in row]
        # A negative entry, or NaN, is looked for even where the sum is 1.
        lawful = q.numel() == 0 or float(q.amin()) >= 0
        if not (lawful and all(abs(total - 1) <= Q_SUM_TOLERANCE for total in sums)):
            raise _broken("a q row is not a law")
        if self.is_drawn_chain:  # no siblings, and `build` says who owns which row
            places = [(b, i, token) for b, row in enumerate(tokens) for i, token in enumerate(row[1:])]
            if not all(value > 0 for value in entries(q, places)):
                raise _broken(_IMPOSSIBLE)
            return
        q_rows, parents, sampled = q_row.tolist(), self.parents.tolist(), self.sampled.tolist()
        if any(max(line) >= q_shape[1] for line in q_rows):
            raise _broken("q_row points beyond q")
        counts = self.num_nodes.tolist()
        drawn = [(b, i) for b in range(rows) for i in range(1, counts[b]) if sampled[b][i]]
        places = [(b, q_rows[b][parents[b][i]], tokens[b][i]) for b, i in drawn]
        if any(row < 0 for _, row, _ in places):
            raise _broken("a sampled node's parent has no q row")
        if not places:
            return
        if not all(value > 0 for value in entries(q, places)):
            raise _broken(_IMPOSSIBLE)
        siblings = [(b, parents[b][i], tokens[b][i]) for b, i in drawn]
        if not self.replacement and len(set(siblings)) < len(siblings):
            raise _broken("sampled siblings repeat a token although they were drawn without replacement")


_IMPOSSIBLE = "a sampled token has q = 0: q is not the law it was drawn from"


def _broken(problem: str) -> InvalidTreeError:
    return InvalidTreeError(f"draft tree: {problem}")
