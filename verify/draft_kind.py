"""What kind of drafts a drafter proposes, known before it proposes one: what rules are chosen and refused by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from specdec.verify.tree import DraftTree


@dataclass(frozen=True)
class DraftKind:
    """Every draft of a drafter in calls that sample (in greedy decoding all drafts are deterministic).

    shape: "chain", or "tree" when a node may have several children.
    nodes: "deterministic" (no q); "mixed": deterministic ones and at most one sampled child per node; "sampled": nodes
        are drawn from q, in a tree several siblings of one node.
    """

    shape: Literal["chain", "tree"]
    nodes: Literal["deterministic", "mixed", "sampled"]

    def __str__(self) -> str:
        return f"{self.nodes} {self.shape}s"

    @staticmethod
    def of(tree: DraftTree) -> DraftKind:
        """The narrowest kind this one tree (all its rows) belongs to."""
        shape: Literal["chain", "tree"] = "chain" if tree.is_chain else "tree"
        if tree.q is None:
            return NO_DRAFTS if shape == "chain" else DraftKind(shape, "deterministic")
        if shape == "chain":
            return _SAMPLED_CHAINS
        drawn = torch.zeros_like(tree.parents)
        drawn.scatter_add_(1, tree.parents.clamp(min=0), (tree.sampled & tree.valid).long())
        return DraftKind(shape, "sampled" if bool((drawn > 1).any()) else "mixed")


_SAMPLED_CHAINS = DraftKind("chain", "sampled")

NO_DRAFTS = DraftKind("chain", "deterministic")
"""Plain decoding: a chain of nothing."""
