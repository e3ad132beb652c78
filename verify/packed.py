"""Weights in few bits: 8 or 4 a number, and a float32 scale for every group of neighbours in a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.kv.errors import UnsupportedArgumentError

BLOCK = 32
"""Neighbours in a row whose 4-bit codes lie together: byte `i` of 16 holds code `i` and, in its upper half, code
`i + 16`, as in GGUF's Q4_0. So a vector of bytes unpacks into two runs of neighbours."""
_MOST = {8: 127, 4: 7}
"""The largest symmetric code."""
_TORCH_GROUPS = (32, 64, 128, 256)
"""Group sizes of torch's own 4-bit product."""


@dataclass(frozen=True)
class Packed:
    """A weight `[out, in]` in few bits.

    Weight `i` of a row is `code[i] * scale[i // group] + offset[i // group]`; codes are -128 .. 127 with 8 bits and
    -8 .. 7 with 4. For example, with 4 bits, scale 0.5 and no offset, a code of -3 (stored as 5) is the weight -1.5.

    Attributes:
        bits: 8 or 4.
        shape: `(out, in)`.
        group: neighbours of a row that share a scale: a multiple of 32, or the whole row. The last group of a row may
            be shorter.
        codes: int8 `[out, in]`; with 4 bits uint8 `[out, 16 * ceil(in / 32)]`, each code plus 8, in the order of
            `BLOCK`; what fills up the last block is 8.
        scales: float32 `[out, groups]`, with `groups = ceil(in / group)`.
        offsets: float32 `[out, groups]`, what a code of 0 stands for; None (symmetric): 0.

    Raises:
        UnsupportedArgumentError: parts that do not fit together.
    """

    bits: int
    shape: tuple[int, int]
    group: int
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        _check_format(self.bits, self.group, self.shape[1])
        (out, width), groups = self.shape, -(-self.shape[1] // self.group)
        stored = (torch.int8, (out, width)) if self.bits == 8 else (torch.uint8, (out, -(-width // BLOCK) * BLOCK // 2))
        _check("codes", self.codes, *stored)
        _check("scales", self.scales, torch.float32, (out, groups))
        if self.offsets is not None:
            _check("offsets", self.offsets, torch.float32, (out, groups))

    @staticmethod
    def of(
        codes: Tensor, scales: Tensor, offsets: Tensor | None = None, *, bits: int = 8, group: int | None = None
    ) -> Packed:
        """Pack codes that were chosen elsewhere.

        Args:
            codes: integers `[out, in]`, from -128 to 127 or from -8 to 7. scales, offsets: `[out, groups]`. group: None
                for whole rows.
        """
        out, width = codes.shape
        group = width if group is None else min(group, width)
        low = -(1 << (bits - 1)) if bits in _MOST else 0
        if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) < -low:
            raise UnsupportedArgumentError(
                f"codes: expected {low} to {-low - 1} with {bits} bits, got {int(codes.min())} to {int(codes.max())}"
            )
        scales = scales.detach().float().contiguous()
        offsets = None if offsets is None else offsets.detach().float().contiguous()
        codes = codes.to(torch.int8)
        stored = codes.contiguous() if bits == 8 else _nibbles(codes)
        return Packed(bits, (out, width), group, stored, scales, offsets)

    @staticmethod
    def rounded(weight: Tensor, bits: int = 8, group: int | None = 64, symmetric: bool = True) -> Packed:
        """Plain rounding to the nearest code: the largest number of a group decides its scale.

        Symmetric: scale = max |w| / 127, or / 7. Else the codes are spread from the smallest number to the largest.

        Args:
            weight: float `[out, in]`, finite. group: None for whole rows; larger than a row means the same.
        """
        if weight.dim() != 2 or not weight.is_floating_point() or not bool(weight.isfinite().all()):
            what = f"{tuple(weight.shape)} in {weight.dtype}" + (", not all finite" * weight.is_floating_point())
            raise UnsupportedArgumentError(f"weight: expected finite floats [out, in], got {what}")
        width = weight.shape[1]
        group = width if group is None else min(group, width)
        _check_format(bits, group, width)
        groups = _grouped(weight.detach().float(), group)
        most = _MOST[bits]
        if symmetric:
            scales, offsets = groups.abs().amax(-1) / most, None
            codes = groups / _never_zero(scales)[..., None]
        else:  # what fills up the last group must not count
            low, high = (of(_grouped(weight.detach().float(), group, fill), -1) for of, fill in _ENDS)
            scales = (high - low) / (2 * most + 1)
            offsets = low + scales * (most + 1)
            codes = (groups - offsets[..., None]) / _never_zero(scales)[..., None]
        codes = codes.round_().clamp_(-most if symmetric else -most - 1, most).to(torch.int8).flatten(1)[:, :width]
        return Packed.of(codes, scales, offsets, bits=bits, group=group)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def rows(self, start: int, stop: int) -> Packed:
        """Rows [start, stop) of the weight: a view."""
        offsets = None if self.offsets is None else self.offsets[start:stop]
        shape = (stop - start, self.shape[1])
        return Packed(self.bits, shape, self.group, self.codes[start:stop], self.scales[start:stop], offsets)

    def integers(self) -> Tensor:
        """The codes, one a number: int8 `[out, in]`."""
        if self.bits == 8:
            return self.codes
        blocks = self.codes.unflatten(1, (-1, BLOCK // 2))
        both = torch.cat([blocks & 15, blocks >> 4], -1).flatten(1)[:, : self.shape[1]]
        return both.to(torch.int8) - 8

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as `[out, in]` numbers: computed in float32, then rounded to `dtype`."""
        groups = _grouped(self.integers().float(), self.group) * self.scales[..., None]
        if self.offsets is not None:
            groups += self.offsets[..., None]
        return groups.flatten(1)[:, : self.shape[1]].to(dtype).contiguous()


class PackedLinear(nn.Module):
    """A linear layer whose weight is a `Packed`; it takes the place of an `nn.Linear`.

    The dequantised weight, rounded to the dtype of the input, is multiplied. That is the definition; a native pass and
    torch's own products compute the same up to the order of their sums.

    Args:
        packed: the weight. bias: `[out]`, or None. A change of the model's dtype leaves the scales in float32.
        integer: activations are rounded, too (`rounded_activations`), so that products are of integers. It changes what
            the layer computes: for drafters, never for a target.
        torch_products: multiply by torch's own packed products where they take this format (8 bits with whole rows, 4
            bits with groups of 32 to 256, no `integer`). They round scales to the dtype of the input.
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None

    def __init__(
        self, packed: Packed, bias: Tensor | None = None, *, integer: bool = False, torch_products: bool = False
    ):
        super().__init__()
        if bias is not None and bias.shape != packed.shape[:1]:
            raise UnsupportedArgumentError(f"bias: expected shape {packed.shape[:1]}, got {tuple(bias.shape)}")
        self.bits, self.group, self.integer, self.torch_products = packed.bits, packed.group, integer, torch_products
        self.out_features, self.in_features = packed.shape
        for name in ("codes", "scales", "offsets"):
            self.register_buffer(name, getattr(packed, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._tiled: tuple[Tensor, Tensor] | None = None

    @property
    def packed(self) -> Packed:
        shape = self.out_features, self.in_features
        return Packed(self.bits, shape, self.group, self.codes, self.scales, self.offsets)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if self.integer:
            x = rounded_activations(x)
        elif self.torch_products and self._torch_takes(x):
            out = self._by_torch(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        return F.linear(x, self.packed.dequantized(x.dtype), self.bias)

    def _torch_takes(self, x: Tensor) -> bool:
        if x.is_cuda and x.dtype != torch.bfloat16:
            return False
        if self.bits == 8:
            return self.scales.shape[1] == 1 and self.offsets is None
        return self.group in _TORCH_GROUPS and self.in_features % self.group == 0 and self.out_features % 32 == 0

    def _by_torch(self, x: Tensor) -> Tensor:
        if self.bits == 8:
            return torch._weight_int8pack_mm(x.contiguous(), self.codes, self.scales[:, 0].to(x.dtype))
        if self._tiled is None or self._tiled[1].dtype != x.dtype or self._tiled[1].device != x.device:
            self._tiled = self._tiles(x)
        tiles, scales = self._tiled
        if x.is_cuda:
            return torch._weight_int4pack_mm(x.contiguous(), tiles, self.group, scales)
        return torch._weight_int4pack_mm_for_cpu(x.contiguous(), tiles, self.group, scales)

    def _tiles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales in the order of torch's 4-bit product."""
        codes = self.packed.integers().to(torch.int32) + 8
        offsets = torch.zeros_like(self.scales) if self.offsets is None else self.offsets
        scales = torch.stack([self.scales, offsets], -1).transpose(0, 1).contiguous().to(x.dtype)
        if x.is_cuda:  # neighbours in a byte, the first above
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            return torch._convert_weight_to_int4pack(pairs, 2), scales
        return torch._convert_weight_to_int4pack_for_cpu(codes, 1), scales

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scales, offsets = self.scales, self.offsets
        super()._apply(fn, recurse)
        self._tiled = None
        self.scales = scales.to(self.codes.device)  # without a change of dtype
        self.offsets = None if offsets is None else offsets.to(self.codes.device)
        return self

    def extra_repr(self) -> str:
        kind = f"{self.bits} bits, group {self.group}" + (", integer" if self.integer else "")
        return f"in_features={self.in_features}, out_features={self.out_features}, {kind}, bias={self.bias is not None}"


def rounded_activations(x: Tensor) -> Tensor:
    """What is left of activations `[..., in]` that are rounded to int8, every 32 numbers of a token by a scale of their
    own, max |x| / 127. A token's depend on itself alone."""
    groups = _grouped(x.float(), BLOCK)
    scales = groups.abs().amax(-1, keepdim=True) / _MOST[8]
    return ((groups / _never_zero(scales)).round_() * scales).flatten(-2)[..., : x.shape[-1]].to(x.dtype)


_ENDS: tuple[tuple[Callable[[Tensor, int], Tensor], float], ...] = (
    (torch.amin, float("inf")),
    (torch.amax, float("-inf")),
)


def _grouped(x: Tensor, group: int, fill: float = 0.0) -> Tensor:
    """`[..., in]` as `[..., groups, group]`, the last group filled up."""
    return F.pad(x, (0, -x.shape[-1] % group), value=fill).unflatten(-1, (-1, group))


def _never_zero(scales: Tensor) -> Tensor:
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def _nibbles(codes: Tensor) -> Tensor:
    """int8 -8 .. 7 `[out, in]` as two in a byte (see `BLOCK`)."""
    blocks = (_grouped(codes, BLOCK) + 8).to(torch.uint8)
    return (blocks[..., : BLOCK // 2] | blocks[..., BLOCK // 2 :] << 4).flatten(1)


def _check_format(bits: int, group: int, width: int) -> None:
    if bits not in _MOST:
        raise UnsupportedArgumentError(f"bits: expected 8 or 4, got {bits}")
    if not 0 < group <= width or (group != width and group % BLOCK):
        raise UnsupportedArgumentError(
            f"group: expected a multiple of {BLOCK} below {width}, or the whole row (None), got {group}"
        )


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != shape or not tensor.is_contiguous():
        raise UnsupportedArgumentError(
            f"{name}: expected contiguous {dtype} of shape {shape}, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
