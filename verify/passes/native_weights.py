"""What the C code is told of a model: where its weights lie, and in which format."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from specdec.verify.native import structures
from specdec.verify.native.library import DTYPES, library, why_not
from specdec.verify.packed import Packed
from specdec.verify.passes.layers import Layer, PackedProduct, Product
from specdec.verify.passes.parameters import Parameters

_FORMATS: tuple[torch.dtype | int, ...] = (torch.float32, torch.bfloat16, torch.float16, 8, 4)
"""Dtypes, and bits of packed weights, in the order of weights.h; then the same bits of integer products."""
_NAMES = ("float32", "bfloat16", "float16", "8 bits", "4 bits", "8 bits", "4 bits")
"""The same for reports (`WeightForm`)."""
_PREPARED = (1, 5, 6)
"""Those of them for which tokens are prepared (tokens.h): bfloat16 and integer products."""


def is_native(own: Parameters) -> bool:
    """Whether there is a native pass over these parameters: not for other dtypes than `DTYPES`, for models whose layers
    differ, and where nothing can be compiled (or for one thread only, and there are more)."""
    if own.shape is None or own.embed.dtype not in DTYPES or why_not() is not None:
        return False
    if not library().threaded and torch.get_num_threads() > 1:
        return False
    products = [own.head, *(product for layer in own.layers for product in layer.products)]
    return own.embed.is_contiguous() and all(map(_readable, products))


class NativeWeights:
    """Those of a model that `is_native`.

    Args:
        copies: packed weights of the same numbers as float ones, by the addresses of these (see `packed_copies`).

    Attributes:
        model: the structure. prepares: whether some format wants its tokens prepared (tokens.h). forms: bytes of its
            matrices by form (`WeightForm`).
    """

    def __init__(self, own: Parameters, copies: Mapping[int, Packed] = MappingProxyType({})):
        assert own.shape is not None
        self._copies = copies  # of which C knows the addresses alone
        products = [product for layer in own.layers for product in layer.products]
        *weights, head = [_weight(product, copies) for product in (*products, own.head)]
        self.forms = _bytes_by_form([own.embed, *(_stored(product, copies) for product in (*products, own.head))])
        vectors = [vector for layer in own.layers for vector in _vectors(layer)]
        # Norms and biases are few: in float32, which holds every number of the model's dtype.
        self._floats = [
            None if one is None else one.float().contiguous() for one in (*vectors, own.norm.factor, own.head.bias)
        ]
        *pointers, norm, bias = map(_address, self._floats)
        self.prepares = any(weight.format in _PREPARED for weight in (*weights, head))
        self._weights = (structures.Weight * len(weights))(*weights)
        self._pointers = (structures.Pointer * len(pointers))(*pointers)
        kinds = [structures.Layer(layer.window or 0, layer.angles) for layer in own.layers]
        self._layers = (structures.Layer * len(kinds))(*kinds)
        first, angles = own.layers[0], own.angles
        self.model = structures.Model(
            *(*own.shape, len(own.embed), angles.width, angles.rotary, own.norm.centred, first.gelu),
            *(ctypes.addressof(table) for table in (self._layers, self._weights, self._pointers)),
            *(own.embed.data_ptr(), norm, bias, head, own.norm.epsilon, first.scaling),
            *(own.embed_scale, first.added_scale, own.divisor, own.score_cap, own.logit_cap),
        )


def _readable(product: Product) -> bool:
    """Row by row from its address on (its shape is `Parameters.fits`'s business)."""
    return isinstance(product, PackedProduct) or product.weight.is_contiguous()


def _stored(product: Product, copies: Mapping[int, Packed]) -> Tensor | Packed:
    """What is read for it."""
    if isinstance(product, PackedProduct):
        return product.packed
    return copies.get(product.weight.data_ptr(), product.weight)


def _weight(product: Product, copies: Mapping[int, Packed]) -> structures.Weight:
    """See weights.h."""
    stored = _stored(product, copies)
    if isinstance(stored, Tensor):
        return structures.Weight(stored.data_ptr(), None, None, _FORMATS.index(stored.dtype), 0)
    integer = isinstance(product, PackedProduct) and product.integer
    parts = map(_address, (stored.codes, stored.scales, stored.offsets))
    return structures.Weight(*parts, _FORMATS.index(stored.bits) + 2 * integer, stored.group)


def _bytes_by_form(stored: Iterable[Tensor | Packed]) -> dict[str, int]:
    forms, found = dict[str, int](), {_place(one): one for one in stored}
    for one in found.values():
        kind, size = (one.dtype, one.nbytes) if isinstance(one, Tensor) else (one.bits, one.num_bytes)
        name = _NAMES[_FORMATS.index(kind)]
        forms[name] = forms.get(name, 0) + size
    return forms


def _place(stored: Tensor | Packed) -> int:
    return (stored if isinstance(stored, Tensor) else stored.codes).data_ptr()


def _vectors(layer: Layer) -> list[Tensor | None]:
    """In the order of model.h."""
    norms = (layer.before, layer.after, layer.q_norm, layer.k_norm, layer.attended, layer.fed)
    return [*(product.bias for product in layer.products), *(None if norm is None else norm.factor for norm in norms)]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
