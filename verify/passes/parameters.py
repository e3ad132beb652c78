"""The parameters of a Llama-shaped model that nobody has changed, for passes that go past its modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from specdec.verify.packed import Packed, PackedLinear
from specdec.verify.passes.linear import Form, few_row_form
from specdec.verify.stock import is_stock

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary kinds whose angles depend on the position alone; the others look at the whole pass."""
_FIRST_POSITIONS = 512
"""Length of the first table of angles; it doubles when a text outgrows it."""


class Shape(NamedTuple):
    """Sizes of a Llama-shaped model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int


class Linear:
    """`x @ weight.T + bias` of `[count, in]` by the form that is fastest for that many rows."""

    __slots__ = ("bias", "forms", "shape", "transposed", "weight", "weights")

    def __init__(self, layer: nn.Linear, weights: list[Tensor]):
        bias: Tensor | None = layer.bias  # declared a Tensor, but None where a layer has none
        self.weight, self.bias = layer.weight.detach(), None if bias is None else bias.detach()
        self.shape = tuple(self.weight.shape)
        self.transposed = self.weight.t()
        self.weights = weights
        self.forms: dict[int, Form] = {}

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

    integer: see `PackedLinear`.
    """

    __slots__ = ("_layer", "bias", "integer", "packed", "shape")

    def __init__(self, layer: PackedLinear):
        self._layer, self.packed, self.integer = layer, layer.packed, layer.integer
        self.shape, self.bias = self.packed.shape, None if layer.bias is None else layer.bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x)


Product = Linear | PackedProduct


def _product(layer: Any, weights: list[Tensor]) -> Product:
    return PackedProduct(layer) if isinstance(layer, PackedLinear) else Linear(layer, weights)


class Layer:
    """One decoder layer's parameters."""

    def __init__(self, layer: Any, weights: list[Tensor]):
        attention, mlp = layer.self_attn, layer.mlp
        self.q, self.k, self.v, self.o = (
            _product(getattr(attention, name), weights) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.gate, self.up, self.down = (
            _product(getattr(mlp, name), weights) for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.before, self.after = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
        self.normed = hasattr(attention, "q_norm")
        if self.normed:
            self.q_norm, self.k_norm = Norm(attention.q_norm), Norm(attention.k_norm)
        self.scaling, self.index = attention.scaling, attention.layer_idx
        self.heads = attention.head_dim, attention.num_key_value_groups

    @property
    def products(self) -> tuple[Product, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    @property
    def alike(self) -> tuple[Any, ...]:
        """What a kernel for all layers takes for granted."""
        epsilons = {norm.epsilon for norm in self.norms}
        return self.scaling, epsilons, [product.shape for product in self.products], self.normed

    @property
    def norms(self) -> tuple[Norm, ...]:
        own = (self.q_norm, self.k_norm) if self.normed else ()
        return self.before, self.after, *own


class Norm:
    """What `LlamaRMSNorm.forward` computes: in float32, rounded to the model's dtype before the weight."""

    __slots__ = ("epsilon", "shape", "weight")

    def __init__(self, norm: Any):
        self.weight, self.epsilon = norm.weight.detach(), norm.variance_epsilon
        self.shape = list(self.weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.rms_norm(x, self.shape, self.weight, self.epsilon)
        return self.weight * torch.rms_norm(x.float(), self.shape, None, self.epsilon).to(x.dtype)


class Parameters:
    """Those of one model, by their places in the pass; and its angles."""

    def __init__(self, model: Any):
        inner, config = model.model, model.config
        weights = [part.weight.detach() for part in model.modules() if isinstance(part, nn.Linear)]
        self.layers = [Layer(layer, weights) for layer in inner.layers[: config.num_hidden_layers]]
        self.embed = inner.embed_tokens.weight.detach()
        self.norm, self._rotary = Norm(inner.norm), inner.rotary_emb
        self.head = _product(model.lm_head, weights)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = inner.layers[0].self_attn.head_dim
        self._frequencies = inner.rotary_emb.inv_freq
        self.static_rope = getattr(inner.rotary_emb, "rope_type", None) in _STATIC_ROPE
        self._table: Tensor | None = None
        self.hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self.num_hooks = sum(map(len, self.hooks))  # harmless ones (see `is_stock`)

    @staticmethod
    def of(model: PreTrainedModel) -> Parameters | None:
        """None where the modules of `model` must be called (see `is_stock`), or would not fit together: whoever takes
        heads out of a model without saying so in its configuration relies on its modules."""
        own = Parameters(model) if is_stock(model) else None
        return own if own is not None and own.fits else None

    @property
    def hooked(self) -> bool:
        """Has anybody put a hook on a module since? (10 microseconds for 420 modules.)"""
        return sum(map(len, self.hooks)) != self.num_hooks

    @property
    def fits(self) -> bool:
        """Is everything that is read of the size that the configuration says, and stored plainly, biases included?

        Modules broadcast what is smaller; a kernel would read beyond it.
        """
        size, groups = self.head_dim, self.heads // self.kv_heads
        if self.embed.dim() != 2 or groups * self.kv_heads != self.heads or self._frequencies.shape != (size // 2,):
            return False
        numbers = [norm.epsilon for layer in self.layers for norm in layer.norms] + [self.norm.epsilon]
        numbers += [layer.scaling for layer in self.layers]
        if not all(isinstance(number, float) for number in numbers):
            return False
        return all(layer.heads == (size, groups) for layer in self.layers) and all(
            _plain(tensor, shape, self.embed.dtype) for tensor, shape in self._read()
        )

    def _read(self) -> Iterator[tuple[Tensor | Packed | None, tuple[int, ...]]]:
        """Every parameter, and the shape it should have."""
        (known, hidden), vocab = self.embed.shape, self.head.shape[0]
        own, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for layer in self.layers:
            inner = layer.gate.shape[0]
            sizes = [(own, hidden), (kv, hidden), (kv, hidden), (hidden, own), *[(inner, hidden)] * 2, (hidden, inner)]
            for product, (outputs, inputs) in zip(layer.products, sizes, strict=True):
                yield from _of(product, outputs, inputs)
            for norm, width in zip(layer.norms, (hidden, hidden, self.head_dim, self.head_dim), strict=False):
                yield norm.weight, (width,)
        yield self.embed, (known, hidden)
        yield self.norm.weight, (hidden,)
        yield from _of(self.head, vocab, hidden)

    @property
    def shape(self) -> Shape | None:
        """None where layers differ."""
        first = self.layers[0]
        if any(other.alike != first.alike for other in self.layers) or first.alike[1] != {self.norm.epsilon}:
            return None
        inner, hidden = first.gate.shape
        sizes = (self.heads, self.kv_heads, self.head_dim, inner, self.head.shape[0])
        return Shape(len(self.layers), hidden, *sizes)

    def angles(self, like: Tensor, positions: Tensor, read: int) -> tuple[Tensor, Tensor]:
        """Angles `[*, 2 * head_dim]`, cosines and signed sines, and the row of them for each token, int64 `[tokens]`.

        Args:
            like: of the dtype and device of the hidden states. positions: int64 `[tokens]`, below `read`.
        """
        if not self.static_rope:
            return self._both(like, positions), torch.arange(len(positions))
        return self.angle_table(like, read), positions

    def angle_table(self, like: Tensor, count: int) -> Tensor:
        """Angles of all positions up to `count` at least, where they depend on the position alone."""
        if self._table is None or len(self._table) < count:
            self._table = self._both(like, torch.arange(max(2 * count, _FIRST_POSITIONS)))
        return self._table

    def _both(self, like: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._rotary(like, positions[None])
        return torch.cat([cos[0], _signed(sin[0])], dim=-1)


def _of(product: Product, outputs: int, inputs: int) -> Iterator[tuple[Tensor | Packed | None, tuple[int, ...]]]:
    yield product.packed if isinstance(product, PackedProduct) else product.weight, (outputs, inputs)
    yield product.bias, (outputs,)


def _plain(tensor: Tensor | Packed | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a parameter, if there is one, is numbers in memory, of this shape and dtype (or in few bits)."""
    if tensor is None:
        return True
    if isinstance(tensor, Packed):  # which looks at its own parts
        return tensor.shape == shape and tensor.device.type == "cpu"
    stored = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return stored and tensor.dtype == dtype and tuple(tensor.shape) == shape and not tensor.is_neg()


def _signed(sin: Tensor) -> Tensor:
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
