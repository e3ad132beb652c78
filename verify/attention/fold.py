"""Tree attention by `scaled_dot_product_attention` with a mask: serves everything, everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.attention.layout import TreePlan
from specdec.verify.attention.register import folded_attention

_MODULE = torch.nn.Module()  # the attention function's first argument, which it does not use


def fold_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: TreePlan, scale: float, window: int | None = None
) -> Tensor:
    """See `reference_attention` for shapes; the result has the query's dtype. Pages are gathered first."""
    plan.check(query, key, value)
    key, value = plan.contiguous(key)[: plan.rows], plan.contiguous(value)[: plan.rows]
    # A few slots more than are read, where there are any: GPUs want mask rows in multiples of 16.
    slots = min(key.shape[2], -(-plan.read // 16) * 16) if query.is_cuda else plan.read
    mask = plan.mask(slots, query.dtype, window)
    return folded_attention(_MODULE, query, key[:, :, :slots], value[:, :, :slots], mask, scaling=scale)[0]
