"""Attention of all tree nodes over the committed slots, which every node of a row sees: no mask, so any kernel will do.

Each function returns `(out, lse)`: float `[rows, kv_heads, groups * nodes, head_dim]` and float32 `[rows, kv_heads,
groups * nodes]`, natural logarithm, scale included; whatever a kernel reports for a row without slots is made -inf.
Query heads are folded onto their K/V head, so that K/V is read once.
"""

from __future__ import annotations

import importlib.metadata
from functools import lru_cache

import torch
from torch import Tensor

from specdec.verify.attention.layout import TreeLayout


def fold_heads(query: Tensor, kv_heads: int) -> Tensor:
    """`[rows, heads, nodes, head_dim]` → `[rows, kv_heads, groups * nodes, head_dim]`."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def torch_prefix(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> tuple[Tensor, Tensor]:
    """By plain matrix products, in float32 or wider: any device, dtype and layout."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key, value = layout.contiguous(key)[: layout.rows], layout.contiguous(value)[: layout.rows]
    key, value = key[:, :, : layout.longest].to(dtype), value[:, :, : layout.longest].to(dtype)
    scores = fold_heads(query, key.shape[1]).to(dtype) @ key.transpose(2, 3) * scale
    hidden = torch.arange(layout.longest, device=query.device) >= layout.lengths[:, None]
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]) @ value, lse


def aten_prefix(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> tuple[Tensor, Tensor]:
    """By the FlashAttention built into torch, which splits K/V over the device for few queries."""
    folded = fold_heads(query, key.shape[1])
    key, value = key[: layout.rows, :, : layout.longest], value[: layout.rows, :, : layout.longest]
    found = torch.ops.aten._scaled_dot_product_flash_attention(folded, key, value, 0.0, False, False, scale=scale)
    return found[0], found[1]


def aten_serves(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout) -> str | None:
    """Why torch's own FlashAttention cannot serve; None if it can."""
    if layout.table is not None:
        return "torch's own FlashAttention reads no block tables"
    if not layout.equal:
        return "torch's own FlashAttention takes no lengths per row, and the rows are not equally long"
    if layout.longest == 0:
        return "there is no committed slot to attend to"
    return _flash_limits(query, key, value)


def package_prefix(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """By `flash_attn_with_kvcache` of the package flash-attn: lengths per row, contiguous or paged."""
    from flash_attn import flash_attn_with_kvcache

    folded = fold_heads(query, key.shape[1]).transpose(1, 2)
    if layout.table is None:
        key, value = key[: layout.rows], value[: layout.rows]
    out, lse = flash_attn_with_kvcache(
        folded,
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=layout.lengths,
        block_table=layout.table,
        softmax_scale=scale,
        causal=False,
        return_softmax_lse=True,
    )[:2]
    return out.transpose(1, 2), lse


def package_serves(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout) -> str | None:
    """Why the package flash-attn cannot serve; None if it can."""
    if not _flash_attn_installed():
        return "the package flash-attn is not installed"
    if layout.table is not None and key.shape[2] % 256:
        return f"flash-attn reads pages of a multiple of 256 slots, not {key.shape[2]}"
    return _flash_limits(query, key, value)


def _flash_limits(query: Tensor, key: Tensor, value: Tensor) -> str | None:
    if not query.is_cuda:
        return f"FlashAttention runs on CUDA devices (tensors are on {query.device})"
    if query.dtype not in (torch.float16, torch.bfloat16) or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"FlashAttention computes float16 or bfloat16, not {query.dtype}"
    if key.shape[3] != value.shape[3] or key.shape[3] > 256 or key.shape[3] % 8:
        return f"FlashAttention wants equal head dimensions, multiples of 8 up to 256, not {key.shape[3]}"
    return None


@lru_cache
def _flash_attn_installed() -> bool:
    # By distribution: flash-attn-4 shares the import name and has another interface.
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return False
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) >= (2, 5)
