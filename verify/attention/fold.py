"""Masked scaled dot-product attention with query heads folded onto their K/V head: serves everything, everywhere.

The `g` query heads that share a K/V head become `g * T` query rows of that head (the mask is tiled `g` times), so K and
V are read once. On a CPU bitwise equal to repeating them for T > 1; for T = 1 equal up to rounding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from specdec.verify.attention.layout import TreeLayout


def folded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Attention of `T` tree nodes over `S` cache slots without `repeat_kv`.

    Args:
        query: `[rows, heads, T, head_dim]`; key, value: `[rows, kv_heads, S, *]`.
        mask: additive float `[rows or 1, 1, T, S]`, or None for "everything" (T = 1) and for plain causal attention
            over an empty prefix (T = S).

    Returns:
        `[rows, T, heads, head_dim]`.
    """
    groups = query.shape[1] // key.shape[1]
    out = attend(query, key, value, tiled(mask, groups), groups, scaling, dropout)
    return out.view(*out.shape[:2], query.shape[1], -1)


def fold_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, window: int | None = None
) -> Tensor:
    """The same as a backend (see `reference_attention` for shapes), by the layout's mask. Pages are gathered first."""
    layout.check(query, key, value)
    key, value = layout.contiguous(key)[: layout.rows], layout.contiguous(value)[: layout.rows]
    # A few slots more than are read, where there are any: GPUs want mask rows in multiples of 16.
    slots = min(key.shape[2], -(-layout.read // 16) * 16) if query.is_cuda else layout.read
    mask = layout.mask(slots, query.dtype, window)
    return folded_attention(query, key[:, :, :slots], value[:, :, :slots], mask, scale)


def tiled(mask: Tensor | None, groups: int) -> Tensor | None:
    """The mask of the folded query rows: `[rows or 1, 1, groups * T, S]` from `[rows or 1, 1, T, S]`."""
    if mask is None or groups == 1 or mask.shape[2] == 1:  # one row broadcasts
        return mask
    return mask.repeat(1, 1, groups, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    groups: int,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The computation of `folded_attention`, under a mask that is `tiled` already.

    Returns:
        `[rows, T, heads * head_dim]`.
    """
    rows, heads, nodes, _ = query.shape
    if mask is None and nodes > 1:
        if key.shape[2] != nodes:
            raise ValueError(
                f"folded attention: {nodes} queries over {key.shape[2]} slots need a mask, because SDPA's causal flag "
                "is aligned to the first slot; pass attention_mask, or call the model outside of a running generate"
            )
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=groups > 1
        )
        return out.transpose(1, 2).reshape(rows, nodes, -1)
    if groups > 1:
        query = query.reshape(rows, key.shape[1], groups * nodes, query.shape[-1])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.reshape(rows, heads, nodes, -1).transpose(1, 2).reshape(rows, nodes, -1)
