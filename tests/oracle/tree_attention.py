"""Tree attention in float64 and in the fewest operations: what every backend is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.attention.layout import TreeLayout


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None = None
) -> Tensor:
    """`softmax(scale * q kᵀ + mask) v`, all in float64.

    Args:
        query: `[rows, heads, nodes, head_dim]`; key, value: as `TreeLayout` says.

    Returns:
        float64 `[rows, nodes, heads, value's head_dim]`. A node that sees nothing gets zeros.
    """
    layout.check(query, key, value)
    key, value = layout.contiguous(key).double(), layout.contiguous(value).double()
    groups = query.shape[1] // key.shape[1]
    seen = layout.visible(layout.read, window)[:, None]
    keys = key[: layout.rows, :, : layout.read].repeat_interleave(groups, 1)
    values = value[: layout.rows, :, : layout.read].repeat_interleave(groups, 1)
    scores = (query.double() @ keys.transpose(2, 3) * scale).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    # Slots out of sight may hold anything, NaN included; a reference must not pass it on.
    anywhere = seen.any(2, keepdim=True).transpose(2, 3)
    return (weights @ values.masked_fill(~anywhere, 0.0)).transpose(1, 2)
