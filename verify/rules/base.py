"""The contract of acceptance rules and the three tensor operations they share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kv.errors import SpecdecError
from specdec.verify.draft_kind import DraftKind
from specdec.verify.noise import Noise
from specdec.verify.topology import indices
from specdec.verify.tree import DraftTree, Verdict

RESIDUAL_EPS = 1e-12
"""Residual mass below this is rounding (p <= q everywhere): the rejection was a numerical accident, sample p."""


class UnsupportedTreeError(SpecdecError, ValueError):
    """The rule does not take this kind of tree; the message says which rule does."""


class Expected(NamedTuple):
    """A quantity per row: its mean and variance, float64 `[rows]`."""

    mean: Tensor
    variance: Tensor


class AcceptanceRule(ABC):
    """A pure function of `(tree, p, noise)`: no model, no cache, no global random state.

    Attributes:
        name: how users ask for it (`rule="block"`).
        lossless: True when the emitted tokens follow the target's law exactly, whatever the drafter.
        changes: of lossy rules, what they do to the text.
        uses_race: True when the rule decides by `noise.race`.
        top_down: True when what is kept down to a node depends on the laws of its ancestors alone: such a rule can walk
            with laws that become known one by one (`specdec.plain_order`).
    """

    name: str
    lossless: bool = True
    changes: str = ""
    uses_race: bool = False
    top_down: bool = False

    def refusal(self, kind: DraftKind) -> str | None:
        """Why this rule cannot judge drafts of that kind and which rule can; None when it can."""
        return None

    def check(self, tree: DraftTree) -> None:
        """Raise UnsupportedTreeError, with the reason, for trees of a kind this rule does not take."""
        why = self.refusal(DraftKind.of(tree))
        if why is not None:
            raise UnsupportedTreeError(why)

    @abstractmethod
    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        """Decide which path to keep.

        Args:
            p: float `[rows, nodes, vocab]`, the target's law after every node (rule `greedy` reads only its
                argmax, so scores do as well).
            noise: fresh uniforms; each is used at most once.

        Raises:
            UnsupportedTreeError: see `check`.
        """

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor | None:
        """Probability, over the rule's own coins, that the accepted path ends at each node of this very tree.

        Returns:
            float64 `[rows, nodes]`, each row sums to 1; None where coins and draft share their noise, and where
            there are no coins.
        """
        return None

    def expected_accepted(self, tree: DraftTree, p: Tensor) -> Expected | None:
        """Accepted draft tokens of this very tree: mean and variance over the rule's own coins (see `end_law`)."""
        law = self.end_law(tree, p)
        if law is None:
            return None
        depths = tree.depths.double()
        mean = (law * depths).sum(1)
        return Expected(mean, ((law * depths * depths).sum(1) - mean * mean).clamp(min=0))

    def excess(self, tree: DraftTree, p: Tensor, verdict: Verdict) -> Expected | None:
        """Accepted tokens of this verdict minus what theory expects, and the variance of that difference.

        Its mean is zero when the rule, its coins and `tree.q` are what they are said to be. Rules that can do so
        cheaply average over the draft as well, which makes a false q show.
        """
        expected = self.expected_accepted(tree, p)
        if expected is None:
            return None
        return Expected(verdict.num_accepted.double() - expected.mean, expected.variance)


def sample_from(weights: Tensor, u: Tensor) -> Tensor:
    """Draw an index from unnormalised weights by inversion, in float64.

    Args:
        weights: `[..., vocab]`, non-negative, at least one positive entry per row.
        u: `[...]`, uniforms in [0, 1 - 2^-52] (see `noise.uniform`): below the total even after rounding.

    Returns:
        int64 `[...]`; an index of zero weight is never returned.
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # The first entry larger than the point is one that its own weight has raised.
    index = torch.searchsorted(cumulative, u.unsqueeze(-1) * cumulative.narrow(-1, -1, 1), right=True).squeeze(-1)
    return index.clamp_(max=weights.shape[-1] - 1)  # NaN weights give some index: whoever checks for NaN must not crash


def residual_or(weights: Tensor, p: Tensor) -> Tensor:
    """`weights` where they carry mass, else `p` (see RESIDUAL_EPS). Both `[rows, vocab]`."""
    return torch.where(weights.sum(-1, keepdim=True) > RESIDUAL_EPS, weights, p.to(weights.dtype))


def verdict_at(tree: DraftTree, node: Tensor, next_token: Tensor) -> Verdict:
    """The verdict that keeps the path from the root to `node` (int64 `[rows]`)."""
    rows, nodes = tree.tokens.shape
    if tree.is_shared_chain:  # node == depth, and ancestors are what comes before
        return Verdict(chain_paths(nodes, node.device).index_select(0, node), node, next_token)
    depths = tree.depths
    on_path = tree.ancestor_mask.gather(1, node[:, None, None].expand(rows, 1, nodes))[:, 0]
    path = torch.full((rows, tree.max_depth + 2), -1, dtype=torch.int64, device=node.device)
    # Nodes off the path are written to a spare last column, which is cut off.
    column = torch.where(on_path, depths, tree.max_depth + 1)
    path.scatter_(1, column, torch.arange(nodes, device=node.device).expand(rows, nodes))
    return Verdict(path[:, :-1], depths.gather(1, node[:, None])[:, 0], next_token)


@lru_cache(maxsize=1024)
def chain_paths(nodes: int, device: torch.device) -> Tensor:
    """Int64 `[nodes, nodes]`: row `i` is the path to node `i` of a chain, padded with -1. Shared: never written to."""
    with torch.inference_mode(False):
        index = torch.arange(nodes, device=device)
        return torch.where(index <= index[:, None], index, -1)


def row_at(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor[b, index[b]]` for `[rows, n, vocab]` and int64 `[rows]` in `[0, n)`."""
    rows, count, vocab = tensor.shape
    if rows > 1:
        index = index + indices(rows, index.device) * count
    return tensor.reshape(rows * count, vocab).index_select(0, index)
