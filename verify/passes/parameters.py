"""The parameters of a model of Llama's kind that nobody has changed, for passes that go past its modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from specdec.verify.packed import Packed
from specdec.verify.passes.angles import Angles
from specdec.verify.passes.layers import Layer, Norm, PackedProduct, Product, product_of
from specdec.verify.passes.linear import is_dense
from specdec.verify.positions import length_dependent_positions, windows_of
from specdec.verify.stock import Family, caps_scores, family_of, is_stock


class Shape(NamedTuple):
    """Sizes of a model."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int


class Parameters:
    """Those of one model, by their places in the pass; its angles; and in what it differs from Llama.

    Attributes:
        embed_scale, divisor, score_cap, logit_cap: as the C code has them (model.h).
    """

    def __init__(self, model: Any, family: Family):
        inner, config = model.model, model.config
        linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
        weights = [linear.weight.detach() for linear in linears if is_dense(linear.weight)]
        kinds, windows = getattr(config, "layer_types", None), windows_of(config)
        self.angles = Angles(inner.rotary_emb, length_dependent_positions(config))
        self.layers = []
        for i, layer in enumerate(inner.layers[: config.num_hidden_layers]):
            kind = next(iter(windows), "") if kinds is None else kinds[i]
            self.layers.append(Layer(layer, weights, family, kind, windows.get(kind), self.angles.start_of(kind)))
        self.embed, self._partial = inner.embed_tokens.weight.detach(), family.partial
        self.norm = Norm(inner.norm, family.centred)
        self.head = product_of(model.lm_head, weights)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = inner.layers[0].self_attn.head_dim
        self.embed_scale = self.divisor = 1.0
        if family.multipliers:
            self.embed_scale, self.divisor = inner.embedding_multiplier, config.logits_scaling
        elif family.centred:
            self.embed_scale = float(inner.embed_tokens.embed_scale.to(self.embed.dtype))
        self.score_cap = config.attn_logit_softcapping if family.score_caps and caps_scores(model) else 0.0
        self.logit_cap = (config.final_logit_softcapping if family.logit_caps else None) or 0.0
        self.hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]
        self.num_hooks = sum(map(len, self.hooks))  # harmless ones (see `is_stock`)

    @staticmethod
    def of(model: PreTrainedModel) -> Parameters | None:
        """None where the modules of `model` must be called (see `is_stock`), or would not fit together: whoever takes
        heads out of a model without saying so in its configuration relies on its modules."""
        family = family_of(model)
        own = Parameters(model, family) if family is not None and is_stock(model) else None
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
        if self.embed.dim() != 2 or groups * self.kv_heads != self.heads or not self.angles.fits(size, self._partial):
            return False
        numbers = [norm.epsilon for layer in self.layers for norm in layer.norms] + [self.norm.epsilon]
        numbers += [number for layer in self.layers for number in (layer.scaling, layer.added_scale)]
        numbers += [self.embed_scale, self.divisor, self.score_cap, self.logit_cap]
        if not all(isinstance(number, (int, float)) for number in numbers) or not self.divisor:
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
            for norm in layer.norms:
                yield norm.weight, (self.head_dim if norm in (layer.q_norm, layer.k_norm) else hidden,)
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

    def finished(self, logits: Tensor) -> Tensor:
        """Logits as the model gives them, from those of its head."""
        if self.divisor != 1:
            logits = logits / self.divisor
        return torch.tanh(logits / self.logit_cap) * self.logit_cap if self.logit_cap else logits


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
