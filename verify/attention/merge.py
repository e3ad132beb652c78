"""Tree attention in two parts, merged by their log-sum-exps: the committed slots by any kernel, the tail with the mask.

The split is that of cascade attention (FlashInfer) and of vLLM's `merge_attn_states`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from specdec.verify.attention.layout import TreeLayout
from specdec.verify.attention.prefix import fold_heads

Prefix = Callable[[Tensor, Tensor, Tensor, TreeLayout, float], tuple[Tensor, Tensor]]


def merged_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float, prefix: Prefix
) -> Tensor:  # fmt: skip
    """Committed slots by `prefix`, the tail by `tail_part`, merged in float32 and rounded once.

    Shapes as in `reference_attention`; no sliding windows, which start at another slot for every node.
    """
    layout.check(query, key, value)
    rows, heads, nodes, _ = query.shape
    tail_out, tail_lse = tail_part(query, key, value, layout, scale)
    if layout.longest == 0:
        out = tail_out
    else:
        out = merge(*prefix(query, key, value, layout, scale), tail_out, tail_lse)[0]
    return out.to(query.dtype).reshape(rows, heads, nodes, -1).transpose(1, 2).contiguous()


def tail_part(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float) -> tuple[Tensor, Tensor]:
    """The nodes over their ancestors: `(out, lse)` as in `prefix.py`, by small dense products in float32 or wider."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = layout.tail_states(key).to(dtype), layout.tail_states(value).to(dtype)
    scores = fold_heads(query, keys.shape[1]).to(dtype) @ keys.transpose(2, 3) * scale
    groups = scores.shape[2] // layout.nodes
    hidden = ~layout.ancestors.repeat(1, groups, 1)[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]) @ values, lse


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of slots.

    `o = (o1 exp(l1) + o2 exp(l2)) / (exp(l1) + exp(l2))`, computed from the larger of the two; a part that saw no slot
    weighs nothing (FlashAttention 2 reports +inf for it, others -inf).

    Args:
        out1, out2: `[..., head_dim]`; lse1, lse2: `[...]`, natural logarithm.

    Returns:
        `(out, lse)` in the wider of the log-sum-exps' dtypes.
    """
    nothing = float("-inf")
    lse1, lse2 = lse1.masked_fill(lse1 == -nothing, nothing), lse2.masked_fill(lse2 == -nothing, nothing)
    best = torch.maximum(lse1, lse2)
    anchor = best.masked_fill(best == nothing, 0.0)
    weight1, weight2 = torch.exp(lse1 - anchor), torch.exp(lse2 - anchor)
    total = weight1 + weight2
    share1, share2 = (weight / total.masked_fill(total == 0, 1.0) for weight in (weight1, weight2))
    # What a kernel wrote for a part without slots may be anything; 0 * NaN would be NaN.
    out1, out2 = (
        out.to(share.dtype).masked_fill((share == 0)[..., None], 0.0) for out, share in ((out1, share1), (out2, share2))
    )
    return out1 * share1[..., None] + out2 * share2[..., None], anchor + torch.log(total)
