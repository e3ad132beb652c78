"""Linear layers that other packages quantised: read as a `Packed` where that is what they compute, told apart where a
token's numbers depend on the tokens beside it. Known by names and attributes; no package is imported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.numbers_seen import Sampled
from specdec.verify.packed import Packed, PackedLinear
from specdec.verify.passes.linear import is_dense

_ROUNDING = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
"""How far a layer's output may be from the product with its `Packed`, of the norms of both: in 16 bits weights, scales
or outputs are rounded, which of them depends on the package."""
_HOMES = ("torch.nn.", "optimum.", "gptqmodel.", "auto_gptq.", "awq.")
"""Packages whose layers are read. Somebody else's may keep more than their tensors say."""
_PROBES = 3
"""Random tokens on which both are compared."""
_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ keeps each of eight neighbouring columns in a word."""


class _Affine(NamedTuple):
    """Weight i of a row is `(codes[i] - zeros[i // group]) * scales[i // group]`.

    Attributes:
        codes: integers `[out, in]`. scales, zeros: floats `[out, groups]`; zeros may be None, which means 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int


class _Read(NamedTuple):
    """What was read of a layer, from tensors of such numbers at such counts of writes."""

    tensors: list[Tensor]
    writes: list[tuple[int, int]]
    numbers: list[Sampled]
    packed: Packed | None


_read: WeakKeyDictionary[nn.Module, _Read] = WeakKeyDictionary()
"""Unpacking and comparing cost more than a pass: done once, and again when a layer's tensors have changed."""


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is a linear one whose weight is not a dense tensor of numbers."""
    if isinstance(layer, PackedLinear) or layer._modules or not isinstance(getattr(layer, "in_features", None), int):
        return False
    weight = getattr(layer, "weight", None)
    return hasattr(layer, "qweight") if weight is None else not is_dense(weight) or not weight.is_floating_point()


def packed_of(layer: nn.Module) -> Packed | None:
    """What a quantised linear layer on a CPU multiplies with, as a `Packed`; None for any other layer, and for one that
    computes something else (its activations are rounded, its codes are no multiples of a scale).

    int8 codes are shared with the layer, others are packed anew. A layer's output for random tokens must be that
    product's up to the rounding of its dtype, else None.
    """
    if not is_quantised(layer) or not type(layer).__module__.startswith(_HOMES):
        return None
    tensors = list(_tensors(layer))
    writes = [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]
    known = _read.get(layer)
    if known is not None and known.writes == writes and all(map(is_, known.tensors, tensors)):
        if all(map(Sampled.same, known.numbers)):
            return known.packed
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    packed = next((one for one in _candidates(layer) if _agrees(layer, one)), None) if on_cpu else None
    _read[layer] = _Read(tensors, writes, [Sampled(tensor) for tensor in tensors] if packed else [], packed)
    return packed


def forget(model: nn.Module) -> None:
    """Read its layers again: they were changed in a way that no look sees."""
    for part in model.modules():
        _read.pop(part, None)


def weight_of_quantised(layer: Any) -> Tensor:
    """The numbers `[out, in]` that a quantised layer multiplies with, in its dtype: its outputs for unit vectors."""
    packed, (dtype, device) = packed_of(layer), _place(layer)
    if packed is not None:
        return packed.dequantized(dtype)
    with torch.no_grad():
        columns = layer(torch.eye(layer.in_features, dtype=dtype, device=device))
        return (columns if layer.bias is None else columns - layer.bias).to(dtype).t().contiguous()


def mixes_tokens(model: nn.Module) -> str | None:
    """Why a token's logits depend on the tokens beside it in a pass, None where they do not.

    LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) multiplies columns in which any token of a pass has an outlier in
    16 bits, for all tokens; one scale for all activations of a pass is another case.
    """
    for part in model.modules():
        weight, scheme = getattr(part, "weight", None), getattr(part, "quantization_scheme", None)
        if type(part).__name__ == "Linear8bitLt" and getattr(getattr(part, "state", None), "threshold", 0.0) > 0:
            return "LLM.int8 multiplies a column in 16 bits for all tokens of a pass where any of them has an outlier"
        kinds = getattr(weight, "act_quant_kwargs", None)
        dynamic = kinds is not None and getattr(weight, "act_quant_scale", None) is None
        if dynamic and type(getattr(kinds, "granularity", None)).__name__ == "PerTensor":
            return "its activations are rounded by one scale for all tokens of a pass"
        rounded = getattr(scheme, "input_activations", None)
        if getattr(rounded, "dynamic", False) and getattr(rounded, "strategy", None) == "tensor":
            return "its activations are rounded by one scale for all tokens of a pass"
    return None


def _candidates(layer: Any) -> Iterator[Packed]:
    weight = getattr(layer, "weight", None)
    reader = _READERS.get(type(weight).__name__)
    if reader is None and weight is None:
        reader, weight = _of_words, layer
    if reader is None:
        return
    try:
        for codes, scales, zeros, bits, group in reader(weight):
            scales = scales.float()
            offsets = None if zeros is None or not bool(zeros.any()) else -zeros.float() * scales
            yield Packed.of(codes.contiguous(), scales, offsets, bits=bits, group=group)
    except (AttributeError, RuntimeError, TypeError, ValueError, UnsupportedArgumentError):  # another version's layout
        return


def _torchao(weight: Any) -> Iterator[_Affine]:
    """`Int8Tensor`, `IntxUnpackedToInt8Tensor`: weights alone, in whole rows or in groups."""
    rounded = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")
    if any(getattr(weight, name, None) is not None for name in rounded) or weight.qdata.dim() != 2:
        return
    (out, width), (rows, group) = weight.qdata.shape, weight.block_size
    if rows not in (1, out):
        return
    scale, zeros = weight.scale, weight.zero_point
    if group == width:  # the product's own factor, in the dtype of the product
        scale = scale.to(weight.dtype)
    groups = width // group
    zeros = None if zeros is None else zeros.reshape(-1, groups).expand(out, groups)
    bits = 4 if str(getattr(weight, "target_dtype", "")) == "torch.int4" else 8
    yield _Affine(weight.qdata, scale.reshape(-1, groups).expand(out, groups), zeros, bits, group)


def _quanto_bytes(weight: Any) -> Iterator[_Affine]:
    """`WeightQBytesTensor` of int8: a scale for every row."""
    if weight._data.dtype == torch.int8 and weight.axis == 0 and weight.activation_qtype is None:
        out, width = weight._data.shape
        yield _Affine(weight._data, weight._scale.reshape(-1, 1).expand(out, 1), None, 8, width)


def _quanto_bits(weight: Any) -> Iterator[_Affine]:
    """`WeightQBitsTensor` of 4 bits: `[out * groups, group]`, each times its scale, less its shift."""
    (out, width), group = weight.shape, weight._group_size or weight.shape[1]
    if weight.axis != 0 or weight._qtype.bits != 4:
        return
    scales = weight._scale.reshape(out, -1).float()
    zeros = weight._shift.reshape(out, -1).float()
    if weight._shift.is_floating_point():
        zeros = zeros / torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = weight._data.unpack().to(torch.int16).reshape(out, width)
    yield _Affine(codes - 8, scales, zeros - 8, 4, group)


def _of_words(layer: Any) -> Iterator[_Affine]:
    """4-bit codes, eight in an int32: of GPTQ (`qweight` `[in / 8, out]`; its first format keeps zeros less 1) or AWQ
    (`[in, out / 8]`)."""
    width, out = layer.in_features, layer.out_features
    words, scales, order = layer.qweight, layer.scales.t(), getattr(layer, "g_idx", None)
    if words.dtype != torch.int32 or layer.qzeros.dtype != torch.int32 or getattr(layer, "bits", 4) != 4:
        return
    group = width // scales.shape[1]
    plain = torch.arange(width, dtype=torch.int32) // group
    if tuple(words.shape) == (width // 8, out):
        if order is not None and not torch.equal(order.to(torch.int32), plain):  # columns in another order
            return
        codes = (words[:, None, :] >> _NIBBLES[None, :, None] & 15).reshape(width, out).t()
        zeros = (layer.qzeros[:, :, None] >> _NIBBLES & 15).reshape(-1, out).t()
        for one in (zeros, (zeros + 1) & 15, zeros + 1):
            yield _Affine(codes - 8, scales, one - 8, 4, group)
    elif tuple(words.shape) == (width, out // 8):
        shifts = _NIBBLES[list(_AWQ_ORDER)]
        codes, zeros = ((each[:, :, None] >> shifts & 15).reshape(-1, out).t() for each in (words, layer.qzeros))
        yield _Affine(codes - 8, scales, zeros - 8, 4, group)


_READERS: dict[str, Callable[[Any], Iterator[_Affine]]] = {
    "Int8Tensor": _torchao,
    "IntxUnpackedToInt8Tensor": _torchao,
    "WeightQBytesTensor": _quanto_bytes,
    "WeightQBitsTensor": _quanto_bits,
}


@torch.no_grad()
def _agrees(layer: Any, packed: Packed) -> bool:
    dtype, _ = _place(layer)
    if dtype not in _ROUNDING or packed.shape != (layer.out_features, layer.in_features):
        return False
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, packed.shape[1], generator=noise).to(dtype)
    weight, bias = packed.dequantized(), layer.bias
    wanted = F.linear(x.float(), weight, None if bias is None else bias.float())
    try:
        found = layer(x).float()
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    most = x.float().norm(dim=1)[:, None] * weight.norm(dim=1) + (0 if bias is None else bias.float().abs())
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= _ROUNDING[dtype] * most + 1e-30).all())


def _place(layer: Any) -> tuple[torch.dtype, torch.device]:
    """Dtype and device of what it is given."""
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.is_floating_point():
        return weight.dtype, weight.device
    for name in ("compute_dtype", "scales"):
        known = getattr(layer, name, None)
        dtype = known.dtype if isinstance(known, Tensor) else known
        if dtype is not None:
            return dtype, next(_tensors(layer)).device
    return torch.float16, next(_tensors(layer)).device


def _tensors(layer: nn.Module) -> Iterator[Tensor]:
    """Those a layer is made of; of those that are made of others, the others."""
    for table in (layer._parameters, layer._buffers):
        for tensor in table.values():
            if tensor is not None:
                yield from inner_tensors(tensor)


def inner_tensors(tensor: Any) -> Iterator[Tensor]:
    """The tensor itself, or those within it: of a quantised one its numbers and scales, of a sharded one what this
    process has."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        part = getattr(tensor, name)
        if isinstance(part, Tensor):
            yield from inner_tensors(part)
