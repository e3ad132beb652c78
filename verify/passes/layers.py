"""One layer's parameters: its products and its norms, as its modules compute them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.verify.packed import Packed, PackedLinear
from specdec.verify.passes.linear import Form, few_row_form
from specdec.verify.quantised import packed_of
from specdec.verify.stock import GELU, Family


class Linear:
    """`x @ weight.T + bias` of `[count, in]` by the form that is fastest for that many rows."""

    __slots__ = ("bias", "forms", "shape", "transposed", "weight", "weights")

    def __init__(self, weight: Tensor, bias: Tensor | None, weights: list[Tensor]):
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.shape = tuple(self.weight.shape)
        self.transposed = self.weight.t()
        self.weights = weights
        self.forms: dict[int, Form] = {}

    def rows(self, start: int, stop: int) -> Linear:
        """Of a part of the weight."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Linear(self.weight[start:stop], bias, self.weights)

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return torch.addmm(self.bias, x, self.transposed)
        count = x.shape[0]
        form = self.forms.get(count)
        if form is None:
            form = self.forms[count] = few_row_form(self.weight, self.weights, count)
        return torch.mm(x, self.transposed) if form is F.linear else form(x, self.weight)


class PackedProduct:
    """The same of a weight in few bits, as its layer computes it.

    layer: a `PackedLinear` (integer: see there), or one of another package that computes such a product.
    """

    __slots__ = ("_layer", "bias", "integer", "packed", "shape")

    def __init__(self, layer: Any, packed: Packed):
        self._layer, self.packed, self.integer = layer, packed, getattr(layer, "integer", False) is True
        self.shape, self.bias = self.packed.shape, None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)

    def rows(self, start: int, stop: int) -> PackedProduct:
        """Of a part of the weight."""
        bias, packed = None if self.bias is None else self.bias[start:stop], self.packed.rows(start, stop)
        quick = getattr(self._layer, "torch_products", False) is True
        return PackedProduct(PackedLinear(packed, bias, integer=self.integer, torch_products=quick), packed)


Product = Linear | PackedProduct


def product_of(layer: Any, weights: list[Tensor]) -> Product:
    packed = layer.packed if isinstance(layer, PackedLinear) else packed_of(layer)
    return Linear(layer.weight, layer.bias, weights) if packed is None else PackedProduct(layer, packed)


class Layer:
    """One decoder layer.

    Args:
        kind: its `layer_types` in the configuration. window: positions it sees; None: all. angles: where its angles
            begin (`Angles.start_of`).

    Attributes:
        qkv, gate_up: whole weights of which `q`, `k`, `v`, and `gate`, `up` are parts; None where they are not.
        angles: -1 where it does not rotate.
    """

    def __init__(self, layer: Any, weights: list[Tensor], family: Family, kind: str, window: int | None, angles: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.kind, self.window = kind, window
        self.qkv, self.gate_up = (
            product_of(module, weights) if module is not None else None
            for module in (getattr(attention, "qkv_proj", None), getattr(mlp, "gate_up_proj", None))
        )
        if self.qkv is not None and self.gate_up is not None:
            kv = attention.num_key_value_heads * attention.head_dim
            q, inner = self.qkv.shape[0] - 2 * kv, self.gate_up.shape[0] // 2
            self.q, self.k, self.v = _parts(self.qkv, q, q + kv)
            self.gate, self.up = _parts(self.gate_up, inner)
        else:
            self.q, self.k, self.v = (product_of(getattr(attention, f"{name}_proj"), weights) for name in "qkv")
            self.gate, self.up = (product_of(getattr(mlp, f"{name}_proj"), weights) for name in ("gate", "up"))
        self.o, self.down = product_of(attention.o_proj, weights), product_of(mlp.down_proj, weights)
        norm = partial(Norm, centred=family.centred)
        self.before, self.after = norm(layer.input_layernorm), norm(layer.post_attention_layernorm)
        self.attended = self.fed = self.q_norm = self.k_norm = None
        if family.sandwich:
            self.attended, self.fed = self.after, norm(layer.post_feedforward_layernorm)
            self.after = norm(layer.pre_feedforward_layernorm)
        if family.head_norms:
            self.q_norm, self.k_norm = norm(attention.q_norm), norm(attention.k_norm)
        self.gelu = type(getattr(mlp, "activation_fn" if family.fused else "act_fn")) is GELU
        self.added_scale = layer.residual_multiplier if family.multipliers else 1.0
        self.angles = -1 if family.unrotated and not attention.use_rope else angles
        self.scaling, self.index = attention.scaling, attention.layer_idx
        self.heads = attention.head_dim, attention.num_key_value_groups

    @property
    def products(self) -> tuple[Product, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    @property
    def alike(self) -> tuple[Any, ...]:
        """What a kernel for all layers takes for granted."""
        epsilons = {norm.epsilon for norm in self.norms}
        return self.scaling, epsilons, [product.shape for product in self.products], self.gelu, self.added_scale

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = (self.before, self.after, self.q_norm, self.k_norm, self.attended, self.fed)
        return tuple(norm for norm in own if norm is not None)

    def projected(self, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, `[tokens, *]` each."""
        if self.qkv is None:
            return self.q(x), self.k(x), self.v(x)
        return self.qkv(x).split([product.shape[0] for product in (self.q, self.k, self.v)], -1)

    def inner(self, x: Tensor) -> Tensor:
        """What the inner layer adds to normalised tokens."""
        gate, up = (self.gate(x), self.up(x)) if self.gate_up is None else self.gate_up(x).chunk(2, -1)
        gate = F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate, inplace=True)
        return self.down(gate.mul_(up))

    def added(self, hidden: Tensor, out: Tensor, norm: Norm | None) -> Tensor:
        """Hidden states and what is added to them, normalised before where there is a norm for it."""
        out = out if norm is None else norm(out)
        return hidden + (out if self.added_scale == 1 else out * self.added_scale)


def _parts(whole: Product, *cuts: int) -> list[Any]:
    return [whole.rows(start, stop) for start, stop in zip((0, *cuts), (*cuts, whole.shape[0]), strict=True)]


class Norm:
    """What `LlamaRMSNorm.forward` computes: in float32, rounded to the model's dtype before the weight.

    Args:
        centred: as `GemmaRMSNorm`: 1 + weight, in float32, and rounded afterwards.
    """

    __slots__ = ("centred", "epsilon", "factor", "shape", "weight")

    def __init__(self, norm: Any, centred: bool):
        self.weight, self.centred = norm.weight.detach(), centred
        self.epsilon = norm.eps if centred else norm.variance_epsilon
        self.factor = 1.0 + self.weight.float() if centred else self.weight
        self.shape = list(self.weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.rms_norm(x, self.shape, self.factor, self.epsilon)
        normed = torch.rms_norm(x.float(), self.shape, None, self.epsilon)
        return (normed * self.factor).to(x.dtype) if self.centred else self.factor * normed.to(x.dtype)
