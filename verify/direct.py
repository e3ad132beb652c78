"""A Llama-shaped model's forward pass straight over its own parameters, without a module call per layer.

An eager `transformers` layer dispatches a dozen modules and some forty small operations; for a few tokens of a small
model on a CPU that costs more than the arithmetic. Here the same operations run on the same parameters, in the same
order and rounding, in about half as many calls: results are bitwise those of the modules with the folded attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel

from specdec.verify.attention.fold import attend, tiled
from specdec.verify.linear import Form, few_row_form
from specdec.verify.parts import Part, flat_positions, joined, kept_shapes, per_part
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


def direct_pass(model: PreTrainedModel) -> DirectPass | None:
    """The direct pass of `model`, or None where its modules must be called (see `is_stock`), or would not fit together:
    whoever takes heads out of a model without saying so in its configuration relies on its modules."""
    direct = DirectPass(model) if is_stock(model) else None
    return direct if direct is not None and direct.fits else None


class _Linear:
    """`x @ weight.T + bias` of `[count, in]` by the form that is fastest for that many rows."""

    __slots__ = ("bias", "forms", "transposed", "weight", "weights")

    def __init__(self, layer: nn.Linear, weights: list[Tensor]):
        bias: Tensor | None = layer.bias  # declared a Tensor, but None where a layer has none
        self.weight, self.bias = layer.weight.detach(), None if bias is None else bias.detach()
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


class _Layer:
    """One decoder layer's parameters."""

    def __init__(self, layer: Any, weights: list[Tensor]):
        attention, mlp = layer.self_attn, layer.mlp
        self.q, self.k, self.v, self.o = (
            _Linear(getattr(attention, name), weights) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self.gate, self.up, self.down = (
            _Linear(getattr(mlp, name), weights) for name in ("gate_proj", "up_proj", "down_proj")
        )
        self.before, self.after = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.normed = hasattr(attention, "q_norm")
        if self.normed:
            self.q_norm, self.k_norm = _Norm(attention.q_norm), _Norm(attention.k_norm)
        self.scaling, self.index = attention.scaling, attention.layer_idx
        self.heads = attention.head_dim, attention.num_key_value_groups

    @property
    def products(self) -> tuple[_Linear, ...]:
        return self.q, self.k, self.v, self.o, self.gate, self.up, self.down

    @property
    def alike(self) -> tuple[Any, ...]:
        """What a kernel for all layers takes for granted."""
        epsilons = {norm.epsilon for norm in self.norms}
        return self.scaling, epsilons, [product.weight.shape for product in self.products], self.normed

    @property
    def norms(self) -> tuple[_Norm, ...]:
        own = (self.q_norm, self.k_norm) if self.normed else ()
        return self.before, self.after, *own


class _Norm:
    """What `LlamaRMSNorm.forward` computes: in float32, rounded to the model's dtype before the weight."""

    __slots__ = ("epsilon", "shape", "weight")

    def __init__(self, norm: Any):
        self.weight, self.epsilon = norm.weight.detach(), norm.variance_epsilon
        self.shape = list(self.weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return torch.rms_norm(x, self.shape, self.weight, self.epsilon)
        return self.weight * torch.rms_norm(x.float(), self.shape, None, self.epsilon).to(x.dtype)


class DirectPass:
    """A whole pass: rows in parts of one width each, with the same weights read once for all of them."""

    def __init__(self, model: Any):
        inner, config = model.model, model.config
        weights = [part.weight.detach() for part in model.modules() if isinstance(part, nn.Linear)]
        self.layers = [_Layer(layer, weights) for layer in inner.layers[: config.num_hidden_layers]]
        self.embed = inner.embed_tokens.weight.detach()
        self.norm, self._rotary = _Norm(inner.norm), inner.rotary_emb
        self.head = _Linear(model.lm_head, weights)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = inner.layers[0].self_attn.head_dim
        self._frequencies = inner.rotary_emb.inv_freq
        self.static_rope = getattr(inner.rotary_emb, "rope_type", None) in _STATIC_ROPE
        self._table: Tensor | None = None
        self._hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]

    @property
    def hooked(self) -> bool:
        """Has anybody put a hook on a module since? (10 microseconds for 420 modules.)"""
        return any(self._hooks)

    def __call__(self, parts: Sequence[Part]) -> list[Tensor]:
        """Logits `[rows, *, vocab]` of every part that asks for some."""
        tokens = joined([part.tokens.reshape(-1) for part in parts])
        hidden = F.embedding(tokens, self.embed)
        cos, sin = self._angles(hidden, parts)
        groups, half = self._heads // self._kv_heads, self._head_dim // 2
        counts = [part.tokens.numel() for part in parts]
        masks = [tiled(part.mask, groups) for part in parts]
        split = (len(tokens), -1, self._head_dim)
        for layer in self.layers:
            x = layer.before(hidden)
            q, k = layer.q(x), layer.k(x)
            if layer.normed:
                q, k = (norm(y.view(split)).view(y.shape) for norm, y in ((layer.q_norm, q), (layer.k_norm, k)))
            both = torch.cat((q, k), 1).view(split)
            # x * cos + rotate_half(x) * sin, the sign of rotate_half moved into sin: the same products, bit for bit
            both = (both * cos).add_(both.roll(half, -1).mul_(sin))
            v = layer.v(x).view(split)
            if len(parts) == 1:
                out = self._attend(layer, parts[0], masks[0], both, v)
            else:
                pieces = zip(parts, masks, both.split(counts), v.split(counts), strict=True)
                out = torch.cat([self._attend(layer, *piece) for piece in pieces])
            hidden = hidden + layer.o(out)
            x = layer.after(hidden)
            gate = F.silu(layer.gate(x), inplace=True)
            hidden = hidden + layer.down(gate.mul_(layer.up(x)))
        return self._logits(hidden, parts)

    def _attend(self, layer: _Layer, part: Part, mask: Tensor | None, both: Tensor, value: Tensor) -> Tensor:
        """One part's attention, `[rows * T, heads * head_dim]`, from its rotated queries and keys and its values."""
        rows, width = part.tokens.shape
        heads = self._heads
        split = (rows, width, -1, self._head_dim)
        both = both.view(split).transpose(1, 2)
        keys, values = part.view.update(both[:, heads:], value.view(split).transpose(1, 2), layer.index)
        out = attend(both[:, :heads], keys, values, mask, heads // self._kv_heads, layer.scaling)
        return out.view(rows * width, -1)

    def _logits(self, hidden: Tensor, parts: Sequence[Part]) -> list[Tensor]:
        wanted = []
        pieces = hidden.split([part.tokens.numel() for part in parts])
        for piece, (rows, width), part in zip(pieces, kept_shapes(parts), parts, strict=True):
            if width < part.tokens.shape[1]:
                piece = piece.view(rows, -1, piece.shape[-1])[:, part.tokens.shape[1] - width :].flatten(0, 1)
            wanted.append(piece)
        return per_part(self.head(self.norm(joined(wanted))), parts)

    @property
    def fits(self) -> bool:
        """Is everything that is read of the size that the configuration says, and stored plainly, biases included?

        Modules broadcast what is smaller; a kernel would read beyond it.
        """
        size, groups = self._head_dim, self._heads // self._kv_heads
        if self.embed.dim() != 2 or groups * self._kv_heads != self._heads or self._frequencies.shape != (size // 2,):
            return False
        numbers = [norm.epsilon for layer in self.layers for norm in layer.norms] + [self.norm.epsilon]
        numbers += [layer.scaling for layer in self.layers]
        if not all(isinstance(number, float) for number in numbers):
            return False
        return all(layer.heads == (size, groups) for layer in self.layers) and all(
            _plain(tensor, shape, self.embed.dtype) for tensor, shape in self._read()
        )

    def _read(self) -> Iterator[tuple[Tensor | None, tuple[int, ...]]]:
        """Every parameter, and the shape it should have."""
        (known, hidden), vocab = self.embed.shape, len(self.head.weight)
        own, kv = self._heads * self._head_dim, self._kv_heads * self._head_dim
        for layer in self.layers:
            inner = len(layer.gate.weight)
            sizes = [(own, hidden), (kv, hidden), (kv, hidden), (hidden, own), *[(inner, hidden)] * 2, (hidden, inner)]
            for product, (outputs, inputs) in zip(layer.products, sizes, strict=True):
                yield product.weight, (outputs, inputs)
                yield product.bias, (outputs,)
            for norm, width in zip(layer.norms, (hidden, hidden, self._head_dim, self._head_dim), strict=False):
                yield norm.weight, (width,)
        yield self.embed, (known, hidden)
        yield self.norm.weight, (hidden,)
        yield self.head.weight, (vocab, hidden)
        yield self.head.bias, (vocab,)

    @property
    def shape(self) -> Shape | None:
        """None where layers differ."""
        first = self.layers[0]
        if any(other.alike != first.alike for other in self.layers) or first.alike[1] != {self.norm.epsilon}:
            return None
        inner, hidden = first.gate.weight.shape
        sizes = (self._heads, self._kv_heads, self._head_dim, inner, len(self.head.weight))
        return Shape(len(self.layers), hidden, *sizes)

    def _angles(self, hidden: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[tokens, 1, head_dim]`, as the model's own rotary module computes them."""
        angles, places = self.angle_rows(hidden, parts)
        both = F.embedding(places, angles)[:, None]
        cos, sin = both.chunk(2, dim=-1)
        return cos, sin

    def angle_rows(self, like: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Angles `[*, 2 * head_dim]`, cosines and signed sines, and the row of them for each token, int64 `[tokens]`.

        Args:
            like: of the dtype and device of the hidden states.
        """
        positions = flat_positions(parts)
        if not self.static_rope:
            return self._both(like, positions), torch.arange(len(positions))
        return self.angle_table(like, max(part.read for part in parts)), positions

    def angle_table(self, like: Tensor, count: int) -> Tensor:
        """Angles of all positions up to `count` at least, where they depend on the position alone."""
        if self._table is None or len(self._table) < count:
            self._table = self._both(like, torch.arange(max(2 * count, _FIRST_POSITIONS)))
        return self._table

    def _both(self, like: Tensor, positions: Tensor) -> Tensor:
        cos, sin = self._rotary(like, positions[None])
        return torch.cat([cos[0], _signed(sin[0])], dim=-1)


def _plain(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a parameter, if there is one, is numbers in memory, of this shape and dtype."""
    if tensor is None:
        return True
    stored = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return stored and tensor.dtype == dtype and tuple(tensor.shape) == shape and not tensor.is_neg()


def _signed(sin: Tensor) -> Tensor:
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
