"""Weights that lie on a grid of few bits though nothing says so: a float checkpoint that was made from a GGUF, GPTQ or
int8 file. Found by trying, and taken only where the grid gives back every number, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.verify.packed import BLOCK, Packed

_PROBED = 4
"""Rows of a weight that are tried first: a weight on no grid costs a millisecond or two."""
_NUMBERS = 1 << 15
"""Numbers that are looked at together: they stay in cache from one operation to the next, and are too few for torch to
use several threads, which beside other work wait for each other at every operation."""
_USUAL, _ROUGH = 3, 0.75
"""After so many tries this share of the groups at most may be left: most groups of 8 bits have the usual steps."""
_WHOLE = 1 << 30
"""The group of whole rows, whatever their width."""
_GROUPS = (_WHOLE, 128, 64, BLOCK)


class _Kind(NamedTuple):
    """Codes of so many bits, with offsets or without, in groups of these sizes, and how many steps a group may have,
    the usual number first: from its smallest number to the largest, or (without offsets) from 0 to the furthest."""

    bits: int
    offsets: bool
    steps: Sequence[int]
    groups: Sequence[int] = _GROUPS


_FOUR = (_Kind(4, False, range(8, 0, -1)), _Kind(4, True, range(15, 0, -1)))
_EIGHT = (
    _Kind(8, False, (127, 128, *range(126, 63, -1))),
    _Kind(8, False, range(16, 7, -1), (BLOCK,)),
    _Kind(8, True, range(31, 7, -1), (BLOCK,)),
    _Kind(8, True, range(255, 127, -1)),
)


def exactly(weight: Tensor) -> Packed | None:
    """`weight` in few bits: what is returned, dequantised, is the same numbers bit for bit. None where there is no such
    form among those that files come in.

    GGUF's Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K and Q8_0 are found, and codes in groups of 32, 64, 128 or whole rows; not
    Q6_K and whatever else has groups of 16. With offsets, products of codes and scales are exact: then it does not
    matter whether they are rounded before the offset is added. It takes some 10 ns of one core a number; a weight on no
    grid 1 ms.

    Args:
        weight: float32 `[out, in]` on a CPU. Others are on no grid.
    """
    rows, width = weight.shape
    if weight.dtype != torch.float32 or rows == 0 or width < BLOCK:
        return None
    weight = weight.detach()
    probe = weight[torch.arange(_PROBED) * rows // _PROBED]
    blocks = probe[:, : width // BLOCK * BLOCK].unflatten(1, (-1, BLOCK)).sort(-1).values
    few = int((blocks.diff(dim=-1) != 0).sum(-1).amax()) < 16
    for kind in (*_FOUR, *_EIGHT) if few else _EIGHT:
        for group in sorted({min(size, width) for size in kind.groups}, reverse=True):
            if _packed(probe, kind, group) is not None:
                found = _packed(weight, kind, group)
                if found is not None:
                    return found
    return None


def _packed(weight: Tensor, kind: _Kind, group: int) -> Packed | None:
    rows, width = weight.shape
    groups = -(-width // group)
    codes = torch.empty(rows, width, dtype=torch.int8)
    scales = torch.empty(rows, groups)
    offsets = torch.empty(rows, groups) if kind.offsets else None
    step = max(1, _NUMBERS // width)
    for first in range(0, rows, step):
        part = weight[first : first + step]
        if width % group:
            part = torch.cat([part, part[:, -1:].expand(-1, -width % group)], 1)
        found = _fitted(part.reshape(-1, group), kind)
        if found is None:
            return None
        count = len(part)
        codes[first : first + count] = found[0].view(count, -1)[:, :width]
        scales[first : first + count] = found[1].view(count, -1)
        if offsets is not None:
            offsets[first : first + count] = found[2].view(count, -1)
    return Packed.of(codes, scales, offsets, bits=kind.bits, group=group)


def _fitted(numbers: Tensor, kind: _Kind) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scales and offsets of groups `[groups, group]`, None where one of them has none."""
    low, high = numbers.amin(-1), numbers.amax(-1)
    codes, scales, offsets = torch.empty(numbers.shape, dtype=torch.int8), torch.empty_like(low), torch.empty_like(low)
    left = None  # groups that are not on the grid yet, None for all
    for number, (scale, offset) in enumerate(_tries(low, high, kind), 1):
        some, scale, offset = (one if left is None else one[left] for one in (numbers, scale, offset))
        own = _codes(some, scale, offset, kind)
        back = own * scale[:, None]
        if kind.offsets:
            back += offset[:, None]
        exact = _multiplies_exactly(scale, kind) if kind.offsets else scale.isfinite()
        wrong = back.view(torch.int32) ^ some.view(torch.int32)
        same = (wrong.amax(-1) == 0) & (wrong.amin(-1) == 0) & exact  # ten times as fast as `all`
        if left is None:
            codes.copy_(own)
            scales.copy_(scale)
            offsets.copy_(offset)
            left = (~same).nonzero()[:, 0]
        else:
            done = left[same]
            codes[done], scales[done], offsets[done] = own[same].to(torch.int8), scale[same], offset[same]
            left = left[~same]
        if len(left) == 0:
            return codes, scales, offsets
        if kind.bits == 8 and number == _USUAL and len(left) > _ROUGH * len(numbers):
            return None
    return None


def _multiplies_exactly(scales: Tensor, kind: _Kind) -> Tensor:
    """Whether the last bits of scales are 0, as many as a code has besides its sign."""
    return scales.view(torch.int32) & ((1 << (kind.bits - 1)) - 1) == 0


def _codes(numbers: Tensor, scale: Tensor, offset: Tensor, kind: _Kind) -> Tensor:
    most = 1 << (kind.bits - 1)
    moved = numbers - offset[:, None] if kind.offsets else numbers
    codes = (moved / torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]).round_().clamp_(-most, most - 1)
    return codes.add_(0.0)  # a code has no -0


def _tries(low: Tensor, high: Tensor, kind: _Kind) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and offsets `[groups]` that groups with these smallest and largest numbers may have."""
    most = 1 << (kind.bits - 1)
    if kind.offsets:
        for steps in kind.steps:
            scale = ((high.double() - low) / steps).float()
            yield scale, (low + scale.double() * most).float()
        return
    furthest, none = torch.where(high >= -low, high, low), torch.zeros_like(low)
    for steps in kind.steps:
        for sign in (1, -1) if steps < most else (-1,):
            yield furthest / (sign * steps), none
