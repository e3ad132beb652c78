"""Rounding a weight so that what it does to typical inputs changes least: GPTQ (Frantar et al. 2022, arXiv
2210.17323, algorithm 1), with groups whose scales are fixed beforehand and columns in the order of their weight."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.packed import Packed

_DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
_BLOCK = 64
"""Columns whose errors are passed on together."""
_SHRINK = tuple(1 - 0.05 * i for i in range(9))
"""Parts of a group's range that its codes may be spread over: leaving out the ends makes steps finer."""


def gptq(weight: Tensor, inputs: Tensor, bits: int, group: int) -> Packed:
    """`weight` `[out, in]` in `bits` bits with offsets, for inputs like these `[tokens, in]`.

    Minimises `|inputs (weight - packed)^T|^2` column by column: a column's rounding error is passed on to the columns
    that are yet to be rounded.
    """
    weight, x = weight.detach().float(), inputs.float()
    hessian = x.t() @ x
    scales, offsets = _spread(weight, hessian.diagonal(), bits, group)
    hessian.diagonal().add_(_DAMPING * hessian.diagonal().mean() + 1e-12)
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left = weight.t()[order].contiguous()  # a column of the weight is a row here
    of_group = (order // group).tolist()
    scales_t, offsets_t = scales.t().contiguous(), offsets.t().contiguous()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.empty_like(left)
    for first in range(0, len(left), _BLOCK):
        last = min(first + _BLOCK, len(left))
        errors = torch.empty_like(left[first:last])
        for i in range(first, last):
            scale, offset = scales_t[of_group[i]], offsets_t[of_group[i]]
            codes[i] = ((left[i] - offset) / scale).round_().clamp_(low, high)
            errors[i - first] = (left[i] - codes[i] * scale - offset) / upper[i, i]
            left[i:last].addr_(upper[i, i:last], errors[i - first], alpha=-1)
        left[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Packed.of(codes[back].t().to(torch.int8), scales, offsets, bits=bits, group=group)


def _spread(weight: Tensor, importance: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets `[out, groups]`: of several ranges the one whose plain rounding errs least, each weight's error
    by the mean square of its input."""
    best = Packed.rounded(weight.contiguous(), bits, group, symmetric=False)
    scales, offsets = best.scales.clone(), best.offsets.clone()
    middle = offsets - scales / 2
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    pad = -weight.shape[1] % group
    groups = torch.nn.functional.pad(weight, (0, pad)).unflatten(1, (-1, group))
    weights = torch.nn.functional.pad(importance, (0, pad)).unflatten(0, (-1, group))
    full = torch.where(scales == 0, torch.ones_like(scales), scales)
    least = torch.full_like(scales, torch.inf)
    for share in _SHRINK:
        scale = share * full
        offset = middle + scale / 2
        codes = ((groups - offset[..., None]) / scale[..., None]).round_().clamp_(low, high)
        error = ((codes * scale[..., None] + offset[..., None] - groups).square_() * weights).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scales, offsets = torch.where(better, scale, scales), torch.where(better, offset, offsets)
    return scales, offsets
