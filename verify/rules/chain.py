"""What the chain rules share: per-position ratios and the law of the drafter at one node."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from specdec.verify.draft_kind import DraftKind
from specdec.verify.rules.base import row_at
from specdec.verify.tree import DraftTree


class ChainView(NamedTuple):
    """A chain of `k` drafted tokens per row (shorter rows are masked).

    p_x, q_x: float64 `[rows, k]`, target and draft probability of each drafted token (q = 1 if deterministic).
    real: bool `[rows, k]`; length: int64 `[rows]`, drafted tokens per row.
    """

    p_x: Tensor
    q_x: Tensor
    real: Tensor
    length: Tensor


def chains_only(rule: str, kind: DraftKind) -> str | None:
    """The refusal (see `AcceptanceRule.refusal`) of rules that know no siblings."""
    if kind.shape == "chain":
        return None
    return (
        f"rule {rule!r} takes chains only, got {kind}, which have siblings: use rule='naive' for deterministic trees, "
        "or let rule='auto' choose"
    )


def view_chain(tree: DraftTree, p: Tensor) -> ChainView:
    rows, nodes = tree.tokens.shape
    k = nodes - 1
    drafted = tree.tokens[:, 1:]
    p_x = p[:, :k].gather(2, drafted[:, :, None]).squeeze(2).to(torch.float64)
    if tree.is_drawn_chain:
        assert tree.q is not None
        q_x = tree.q.gather(2, drafted[:, :, None]).squeeze(2).to(torch.float64)
    else:
        q_x = torch.ones_like(p_x)
        if tree.q is not None and tree.q_row is not None and k:
            row = tree.q_row[:, :k].clamp(min=0)
            drawn = tree.q[torch.arange(rows, device=p.device)[:, None], row, drafted].to(torch.float64)
            q_x = torch.where(tree.sampled[:, 1:], drawn, q_x)
    return ChainView(p_x, q_x, tree.valid[:, 1:], tree.num_nodes - 1)


def draft_law(tree: DraftTree, node: Tensor, like: Tensor) -> Tensor:
    """The law the child of `node` was drafted from, `[rows, vocab]`: its q row, one-hot if deterministic, and zero
    where the row's chain ends at `node`.

    Args:
        node: int64 `[rows]`; like: a `[rows, vocab]` tensor giving dtype and device.
    """
    if tree.is_drawn_chain:
        assert tree.q is not None
        k = tree.q.shape[1]
        if node.device.type == "cpu" and max(node.tolist()) < k:  # no chain has ended; off the CPU a look would wait
            return row_at(tree.q, node).to(like.dtype)
        law = row_at(tree.q, node.clamp(max=k - 1)).to(like.dtype)
    else:
        rows = torch.arange(node.shape[0], device=node.device)
        child = (node + 1).clamp(max=tree.tokens.shape[1] - 1)
        law = torch.zeros_like(like).scatter_(1, tree.tokens[rows, child][:, None], 1.0)
        if tree.q is not None and tree.q_row is not None:
            drawn = tree.q[rows, tree.q_row[rows, node].clamp(min=0)].to(like.dtype)
            law = torch.where(tree.sampled[rows, child][:, None], drawn, law)
    return torch.where((node + 1 < tree.num_nodes)[:, None], law, 0.0)
