"""Rounding a weight so that what it does to typical inputs changes least: GPTQ (Frantar et al. 2022, arXiv
2210.17323, algorithm 1), with groups whose scales are fixed beforehand and columns in the order of their weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.drafters.self_draft.calibration import Inputs
from specdec.verify.packed import Packed

_BLOCK = 64
"""Columns whose errors are passed on together."""
_SHARES = tuple(1 - 0.05 * i for i in range(9))
"""Parts of a group's range that its codes may be spread over: leaving out the ends makes steps finer."""


def gptq(weight: Tensor, inputs: Inputs, bits: int, group: int) -> Packed:
    """`weight` `[out, in]` in `bits` bits with offsets, for such inputs.

    Minimises `|inputs (weight - packed)^T|^2` column by column: a column's rounding error is passed on to the columns
    that are yet to be rounded.
    """
    weight = weight.detach().float()
    scales, offsets = _spread(weight, inputs.squares, bits, group)
    order, upper = inputs.order, inputs.upper
    left = weight.t()[order].contiguous()  # a column of the weight is a row here
    places = (order // group).tolist()
    steps, starts, diagonal = scales.t().contiguous(), offsets.t().contiguous(), upper.diagonal().tolist()
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    codes = torch.empty_like(left)
    for first in range(0, len(left), _BLOCK):
        last = min(first + _BLOCK, len(left))
        errors = torch.empty_like(left[first:last])
        for i in range(first, last):
            step, start, column = steps[places[i]], starts[places[i]], left[i]
            code = torch.sub(column, start, out=codes[i]).div_(step).round_().clamp_(low, high)
            error = torch.addcmul(start, code, step, out=errors[i - first]).sub_(column).div_(-diagonal[i])
            left[i:last].addr_(upper[i, i:last], error, alpha=-1)
        left[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return Packed.of(codes[back].t().to(torch.int8).contiguous(), scales, offsets, bits=bits, group=group)


def _spread(weight: Tensor, importance: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Scales and offsets `[out, groups]`: of several ranges the one whose plain rounding errs least, a weight's error
    counted by the size of its input."""
    full = Packed.rounded(weight.contiguous(), bits, group, symmetric=False)
    assert full.offsets is not None
    group = full.group
    middle = full.offsets - full.scales / 2
    widest = torch.where(full.scales == 0, torch.ones_like(full.scales), full.scales)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    padding = (0, -weight.shape[1] % group)
    groups = F.pad(weight, padding).unflatten(1, (-1, group))
    counted = F.pad(importance, padding).unflatten(0, (-1, group))
    least = torch.full_like(widest, torch.inf)
    scales, offsets = widest, full.offsets
    for share in _SHARES:
        scale = share * widest
        offset = middle + scale / 2
        codes = ((groups - offset[..., None]) / scale[..., None]).round_().clamp_(low, high)
        error = (codes.mul_(scale[..., None]).add_(offset[..., None]).sub_(groups).square_() * counted).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        scales, offsets = torch.where(better, scale, scales), torch.where(better, offset, offsets)
    return scales, offsets
