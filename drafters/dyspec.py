"""DySpec: trees of sampled nodes that grow where the drafter is sure, of another shape at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafters.children import MIN_REST, best_draws, draw_children, refuse_nan
from specdec.drafters.growth import Frontier, Grower, Grown
from specdec.drafters.shapes import Start, TreeShape
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_NODES, MOST_SLOTS, checked_count, checked_number
from specdec.verify.tree import DraftTree


class DySpec(TreeShape):
    """Grows where the drafter is sure of itself (DySpec arXiv 2410.11744, its layer-wise form; algorithms B.2).

    The value of a node estimates the chance that the target gets there: the product of q**trust along its path. The
    value of a sibling that is not drawn yet is the parent's value times the mass of q that the siblings before it left.
    Level by level, siblings are drawn without replacement, the best value first, while the value exceeds `threshold`
    and nodes are left. Drawn nodes whose value exceeds it are run and get children of their own.

    Whether a sibling is drawn depends on the tokens drawn before it, never on its own, and what was drawn stays
    (B.5); the laws really sampled from come along. Rules: traversal, recursive_rejection or naive. In greedy decoding
    every draw is the likeliest token left.

    Args:
        depth: most levels, one drafter pass each; num_nodes: most drafted tokens; max_children: most children of one
            node; threshold: least value of a node to be drafted.
        trust: 1 takes q for the acceptance, as the paper does. But a token that was *sampled* is accepted with
            min(1, p/q), which hardly depends on how large q is: smaller values draft deeper and emit more.

    Raises:
        UnsupportedArgumentError: a number out of its range, or levels of more than `MOST_SLOTS` nodes in all.
    """

    modes = ("sampled", "top")

    def __init__(
        self, depth: int = 6, num_nodes: int = 16, max_children: int = 2, threshold: float = 0.3, trust: float = 0.1
    ):
        given = {"depth": depth, "num_nodes": num_nodes, "max_children": max_children}
        self.max_depth, self.max_nodes, self.max_children = (
            checked_count(f"{name} of DySpec", value, 1, MOST_NODES) for name, value in given.items()
        )
        self.threshold = checked_number("threshold of DySpec", threshold, 0.0, 1.0)
        self.trust = checked_number("trust of DySpec", trust, 0.0, 1.0)
        if self.threshold == 1:
            raise UnsupportedArgumentError("DySpec: threshold: expected < 1, got 1: no node would ever be drafted")
        if self.num_slots > MOST_SLOTS:
            raise UnsupportedArgumentError(
                f"DySpec: expected 1 + num_nodes * (depth - 1) <= {MOST_SLOTS} nodes to be run, got {self.num_slots}: "
                "choose a smaller num_nodes or depth"
            )

    @property
    def num_uniforms(self) -> int:
        return (self.max_nodes + 1) * self.max_children

    @property
    def num_slots(self) -> int:
        return 1 + self.max_nodes * (self.max_depth - 1)  # a level is run as wide as the widest row's

    def nodes_within(self, depth: int) -> int:
        widest, nodes = 1, 0
        for _ in range(depth):
            widest = min(self.max_nodes, widest * self.max_children)
            nodes += widest
        return min(self.max_nodes, nodes)

    def grower(self, start: Start) -> Grower:
        depths = torch.tensor(start.depths, device=start.roots.device)
        uniforms = start.uniforms if start.mode == "sampled" else None
        return DySpecGrower(self, start.roots, depths, start.max_nodes, uniforms)

    def __repr__(self) -> str:
        return (
            f"DySpec(depth={self.max_depth}, num_nodes={self.max_nodes}, max_children={self.max_children}, "
            f"threshold={self.threshold:g}, trust={self.trust:g})"
        )


class DySpecGrower(Grower):
    """One step of `DySpec`.

    Args:
        depths: int64 `[rows]`, levels each row may have; max_nodes: drafted tokens each row may have.
        uniforms: float64 `[rows, >= shape.num_uniforms]`, or None to take the likeliest tokens. The r-th draw below
            a node uses a column that depends on the node's place in its own row's tree only.
    """

    def __init__(self, shape: DySpec, roots: Tensor, depths: Tensor, max_nodes: int, uniforms: Tensor | None):
        self._shape, self._limits, self._uniforms = shape, depths, uniforms
        rows, device = roots.shape[0], roots.device
        self._capacity = min(shape.max_nodes, max_nodes)
        # One spare column takes what is written for children that are not drawn.
        self._tokens = torch.zeros(rows, self._capacity + 2, dtype=torch.int64, device=device)
        self._tokens[:, 0] = roots
        self._parents = torch.zeros_like(self._tokens)
        self._parents[:, 0] = -1
        self._slots = torch.full_like(self._tokens, -1)
        self._slots[:, 0] = 0
        self._count = torch.ones(rows, dtype=torch.int64, device=device)
        self._laws: list[Tensor] = []
        self._peaks: list[Tensor] = []
        self._depth = 0
        # The nodes run last: place in the tree, value (0 for padding); slot of the first of them.
        self._nodes = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._values = torch.ones(rows, 1, dtype=torch.float64, device=device)
        self._first = 0

    def extend(self, scores: Tensor) -> Frontier | None:
        rows, width, vocab = scores.shape
        count = min(self._shape.max_children, vocab)
        self._depth += 1
        if self._uniforms is None:
            draws = best_draws(scores, count)
            self._peaks.append(draws.mass[:, :, 0])
        else:
            column = self._nodes[:, :, None] * self._shape.max_children + torch.arange(count, device=scores.device)
            uniforms = self._uniforms.gather(1, column.flatten(1)).view(rows, width, count)
            draws = draw_children(scores, count, uniforms)
            self._laws.append(draws.law)
        worth = self._values[:, :, None] * draws.rest
        wanted = (worth > self._shape.threshold) & (draws.rest >= MIN_REST) & (self._values > 0)[:, :, None]
        wanted &= (self._limits >= self._depth)[:, None, None]
        drawn = self._within_budget(torch.where(wanted, worth, -1.0).flatten(1))
        number = (self._count[:, None] + drawn.long().cumsum(1) - 1).where(drawn, self._capacity + 1)
        tokens = draws.tokens.flatten(1)
        values = (self._values[:, :, None] * draws.mass**self._shape.trust).flatten(1)
        parents = self._nodes[:, :, None].expand(rows, width, count).flatten(1)
        self._tokens.scatter_(1, number, tokens)
        self._parents.scatter_(1, number, parents)
        self._count = self._count + drawn.sum(1)
        return self._next(tokens, values, drawn, number, count, width)

    def _within_budget(self, worth: Tensor) -> Tensor:
        """Bool `[rows, n]`: the most valuable draws, as many as nodes are left. A sibling is never worth more than one
        before it, and of equals the earlier one goes first. So these are the draws that a heap would have made one by
        one; what was drawn beyond them influences nothing."""
        order = worth.sort(dim=1, descending=True, stable=True).indices
        left = self._capacity + 1 - self._count
        first = torch.arange(worth.shape[1], device=worth.device) < left[:, None]
        return torch.zeros_like(first).scatter(1, order, first) & (worth >= 0)

    def _next(
        self, tokens: Tensor, values: Tensor, drawn: Tensor, number: Tensor, count: int, width: int
    ) -> Frontier | None:
        """The drawn nodes worth a pass of their own, gathered to the left."""
        going = drawn & (values > self._shape.threshold) & (self._limits > self._depth)[:, None]
        going &= (self._count <= self._capacity)[:, None]
        wide = int(going.sum(1).max())  # the one synchronisation of a level
        if wide == 0:
            return None
        chosen = (~going).to(torch.int8).sort(dim=1, stable=True).indices[:, :wide]
        real = going.gather(1, chosen)
        slots = self._first + torch.div(chosen, count, rounding_mode="floor")  # of their parents
        self._first += width
        own = torch.arange(self._first, self._first + wide, device=tokens.device).expand_as(chosen)
        self._nodes = number.gather(1, chosen)
        self._slots.scatter_(1, self._nodes.where(real, self._capacity + 1), own)
        self._nodes = self._nodes.where(real, 0)
        self._values = values.gather(1, chosen).where(real, 0.0)
        return Frontier(tokens.gather(1, chosen).where(real, 0), slots.where(real, 0), ~real)

    def finish(self) -> Grown:
        refuse_nan(self._peaks)
        counts = self._count.tolist()
        width = max(counts)
        tokens, parents, slots = (part[:, :width] for part in (self._tokens, self._parents, self._slots))
        real = torch.arange(width, device=tokens.device) < self._count[:, None]
        q = torch.cat(self._laws, 1) if self._laws else None
        sampled = real.clone() if q is not None else torch.zeros_like(real)
        sampled[:, 0] = False
        q_row = None if q is None else slots.where(real, -1)
        parents = parents.where(real | (parents < 0), 0)
        tree = DraftTree(tokens.where(real, 0), parents, self._count, sampled, q, q_row)
        placed = [row[:count] for row, count in zip(slots.tolist(), counts, strict=True)]
        return Grown(tree, placed)
