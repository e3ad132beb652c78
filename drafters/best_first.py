"""Best-first growth: a tree of the likeliest nodes, of another shape at every step (EAGLE-2)."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.drafters.children import NEVER, refuse_nan
from specdec.drafters.growth import Frontier, Grower, Grown
from specdec.drafters.shapes import Start, TreeShape
from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.limits import MOST_NODES, MOST_SLOTS, checked_count
from specdec.verify.tree import DraftTree


class BestFirst(TreeShape):
    """Keeps the nodes whose whole path is likeliest under the drafter (EAGLE-2 arXiv 2406.16858; algorithms B.2).

    Every level takes the `top_k` best children of each node run last and runs the `top_k` of them with the largest
    cumulative log q; at the end the `num_nodes` best of everything seen are kept, parents always among them. All nodes
    are deterministic, for to rank sampled ones by what they turned out to be would bias the output (B.5).

    Args:
        depth: levels, one drafter pass each; top_k: nodes run per level, and children looked at per node;
        num_nodes: drafted tokens kept.

    Raises:
        UnsupportedArgumentError: counts below 1, above `MOST_NODES`, or levels of more than `MOST_SLOTS` nodes in all.
    """

    modes = ("top",)
    looks_ahead = True

    def __init__(self, depth: int = 7, top_k: int = 10, num_nodes: int = 60):
        given = {"depth": depth, "top_k": top_k, "num_nodes": num_nodes}
        self.max_depth, self.top_k, self.max_nodes = (
            checked_count(f"{name} of BestFirst", value, 1, MOST_NODES) for name, value in given.items()
        )
        if self.num_slots > MOST_SLOTS:
            raise UnsupportedArgumentError(
                f"BestFirst: expected 1 + top_k * (depth - 1) <= {MOST_SLOTS} nodes to be run, got {self.num_slots}: "
                "choose a smaller top_k or depth"
            )

    @property
    def num_slots(self) -> int:
        return 1 + self.top_k * (self.max_depth - 1)

    def nodes_within(self, depth: int) -> int:
        # The first level has top_k candidates, each later one top_k for each of top_k nodes.
        return min(self.max_nodes, self.top_k + max(0, depth - 1) * self.top_k**2) if depth > 0 else 0

    def grower(self, start: Start) -> Grower:
        depths = torch.tensor(start.depths, device=start.roots.device)
        return BestFirstGrower(start.roots, depths, self.top_k, min(self.max_nodes, start.max_nodes))

    def __repr__(self) -> str:
        return f"BestFirst(depth={self.max_depth}, top_k={self.top_k}, num_nodes={self.max_nodes})"


class BestFirstGrower(Grower):
    """One step of `BestFirst`.

    Args:
        depths: int64 `[rows]`, levels each row may have; max_nodes: drafted tokens each row may have.
    """

    def __init__(self, roots: Tensor, depths: Tensor, top_k: int, max_nodes: int):
        self._roots, self._limits, self._top_k, self._max_nodes = roots, depths, top_k, max_nodes
        self._deepest = int(depths.max())
        rows, device = roots.shape[0], roots.device
        self._depth = 0
        self._values = torch.zeros(rows, 1, dtype=torch.float64, device=device)  # of the nodes run last
        self._first = 0  # slot of the first of them
        self._peaks: list[Tensor] = []
        # Candidates in order of creation, hence after their parents: token, cumulative log q, slot of the parent, and
        # their own slot if they were run.
        self._tokens = self._parents = self._slots = roots[:, None][:, :0]
        self._worth = self._values[:, :0]
        self._born = torch.zeros(rows, 1, dtype=torch.int64, device=device)  # slot -> candidate + 1 (0: the root)

    def extend(self, scores: Tensor) -> Frontier | None:
        rows, width = scores.shape[:2]
        peaks, tokens = scores.topk(min(self._top_k, scores.shape[-1]), dim=-1)
        self._peaks.append(peaks[:, :, 0])
        gain = (peaks - scores.logsumexp(-1, keepdim=True)).double().clamp(max=0.0)
        self._depth += 1
        beyond = (self._limits < self._depth)[:, None]
        values = (self._values[:, :, None] + gain).flatten(1).masked_fill(beyond, NEVER)
        slots = torch.arange(self._first, self._first + width, device=scores.device)
        parents = slots[:, None].expand(rows, width, gain.shape[2]).flatten(1)
        seen = self._tokens.shape[1]
        self._tokens = torch.cat([self._tokens, tokens.flatten(1)], 1)
        self._worth = torch.cat([self._worth, values], 1)
        self._parents = torch.cat([self._parents, parents], 1)
        self._slots = torch.cat([self._slots, torch.full_like(parents, -1)], 1)
        if self._depth == self._deepest:
            return None
        # A stable order, so that ties do not depend on what else is in the batch.
        order = values.sort(dim=1, descending=True, stable=True).indices[:, : self._top_k]
        best = values.gather(1, order)
        if not self._useful(best):
            return None
        self._first += width
        self._values = best
        count = order.shape[1]
        own = torch.arange(self._first, self._first + count, device=scores.device).expand(rows, -1)
        self._slots = self._slots.scatter(1, seen + order, own)
        self._born = torch.cat([self._born, seen + order + 1], 1)
        return Frontier(tokens.flatten(1).gather(1, order), parents.gather(1, order), best == NEVER)

    def _useful(self, best: Tensor) -> bool:
        """Whether children of the next nodes could still be among the nodes kept, for any row."""
        if self._worth.shape[1] < self._max_nodes:
            return bool((best[:, 0] != NEVER).any())
        bar = self._worth.topk(self._max_nodes, dim=1).values[:, -1]
        return bool((best[:, 0] > bar).any())

    def finish(self) -> Grown:
        refuse_nan(self._peaks)
        rows, seen = self._worth.shape
        # Stable: of equals the earlier born goes first, so a parent is kept whenever its child is.
        order = self._worth.sort(dim=1, descending=True, stable=True).indices[:, : self._max_nodes]
        kept = self._worth.gather(1, order) != NEVER
        order = torch.where(kept, order, seen).sort(dim=1).values
        at = order.clamp(max=seen - 1)
        # From slots to nodes: candidate + 1 -> place in the tree, for the root and everything kept.
        place = torch.zeros(rows, seen + 2, dtype=torch.int64, device=order.device)
        place.scatter_(1, order + 1, torch.arange(1, order.shape[1] + 1, device=order.device).expand_as(order))
        node_of_slot = place.gather(1, self._born)
        real = order < seen
        parents = torch.where(real, node_of_slot.gather(1, self._parents.gather(1, at)), 0)
        tokens = torch.where(real, self._tokens.gather(1, at), 0)
        slots = torch.where(real, self._slots.gather(1, at), -1)
        packed = torch.cat([real.sum(1, keepdim=True), slots], 1).tolist()
        width = max(row[0] for row in packed)
        root = torch.full_like(self._roots[:, None], -1)
        tree = DraftTree(
            tokens=torch.cat([self._roots[:, None], tokens[:, :width]], 1),
            parents=torch.cat([root, parents[:, :width]], 1),
            num_nodes=real.sum(1) + 1,
            sampled=torch.zeros(rows, width + 1, dtype=torch.bool, device=order.device),
        )
        return Grown(tree, [[0, *row[1 : row[0] + 1]] for row in packed])
