"""A Llama-shaped model's forward pass straight over its own parameters, without a module call per layer.

An eager `transformers` layer dispatches a dozen modules and some forty small operations; for a few tokens of a small
model on a CPU that costs more than the arithmetic. Here the same operations run on the same parameters, in the same
order and rounding, in about half as many calls: results are bitwise those of the modules with the folded attention.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from specdec.verify.attention import NAME as FOLDED
from specdec.verify.attention import attend, fitting_attention, tiled
from specdec.verify.linear import Form, few_row_form
from specdec.verify.parts import Part

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Model classes whose layers have this shape; one with a sliding window is left to its modules (see `TreeForward`)."""
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half")
_LEAVES = (nn.Linear, nn.Embedding, type(ACT2FN["silu"]), nn.ModuleList)
_HOMES = tuple(str(Path(str(package.__file__)).parent) for package in (torch, transformers))
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary kinds whose angles depend on the position alone; the others look at the whole pass."""
_FIRST_POSITIONS = 512
"""Length of the first table of angles; it doubles when a text outgrows it."""


def direct_pass(model: PreTrainedModel) -> DirectPass | None:
    """The direct pass of `model`, or None where its modules must be called.

    None for other families, for models in training mode, off the CPU or in several places, for eager attention, and
    for any model somebody has changed: hooks, adapters, quantised or wrapped layers, patched forwards.
    """
    kind = type(model)
    family = next((name for name in _FAMILIES if kind.__name__ == f"{name}ForCausalLM"), None)
    if family is None or model.training or not kind.__module__.startswith("transformers.models."):
        return None
    if fitting_attention(model) != FOLDED or model.config.hidden_act not in ("silu", "swish"):
        return None
    if (
        torch.is_autocast_enabled("cpu")
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
    ):
        return None
    home = sys.modules[kind.__module__]
    stock = {getattr(home, family + part) for part in _PARTS}
    used = (*(part.forward for part in (*stock, *_LEAVES[:-1])), *(getattr(home, name) for name in _FUNCTIONS))
    if not all(_original(function) for function in used):  # patched for all models of the family
        return None
    if any(type(part) not in (*_LEAVES, *stock) or _changed(part) for part in model.modules()):
        return None
    places = {(type(weight), weight.device.type, weight.dtype) for weight in model.parameters()}
    plain = len(places) == 1 and places.pop()[:2] == (nn.Parameter, "cpu")  # a quantised weight is a subclass
    return DirectPass(model) if plain else None


def _original(function: Any) -> bool:
    """Whether a function and whatever it wraps was written in transformers or torch."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_HOMES):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _changed(part: nn.Module) -> bool:
    own = part.__dict__
    if isinstance(part, nn.Embedding) and part.max_norm is not None:
        return True
    return "forward" in own or "_hf_hook" in own or bool(own["_forward_hooks"] or own["_forward_pre_hooks"])


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
        self._layers = [_Layer(layer, weights) for layer in inner.layers[: config.num_hidden_layers]]
        self._embed = inner.embed_tokens.weight.detach()
        self._norm, self._rotary = _Norm(inner.norm), inner.rotary_emb
        self._head = _Linear(model.lm_head, weights)
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = inner.layers[0].self_attn.head_dim
        self._static_rope = getattr(inner.rotary_emb, "rope_type", None) in _STATIC_ROPE
        self._table: Tensor | None = None
        self._hooks = [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self._hooks += [torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks]

    @property
    def hooked(self) -> bool:
        """Has anybody put a hook on a module since? (10 microseconds for 420 modules.)"""
        return any(self._hooks)

    def __call__(self, parts: Sequence[Part]) -> list[Tensor]:
        """Logits `[rows, *, vocab]` of every part that asks for some."""
        tokens = _joined([part.tokens.reshape(-1) for part in parts])
        hidden = F.embedding(tokens, self._embed)
        cos, sin = self._angles(hidden, parts)
        groups, half = self._heads // self._kv_heads, self._head_dim // 2
        counts = [part.tokens.numel() for part in parts]
        masks = [tiled(part.mask, groups) for part in parts]
        split = (len(tokens), -1, self._head_dim)
        for layer in self._layers:
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
        wanted, shapes = [], []
        for part, own in zip(parts, hidden.split([part.tokens.numel() for part in parts]), strict=True):
            if part.keep is None:
                continue
            rows, width = part.tokens.shape
            if part.keep:
                width = min(part.keep, width)
                own = own.view(rows, -1, own.shape[-1])[:, -width:].reshape(rows * width, -1)
            wanted.append(own)
            shapes.append((rows, width))
        logits = self._head(self._norm(_joined(wanted)))
        pieces = logits.split([rows * width for rows, width in shapes])
        return [piece.view(*shape, -1) for piece, shape in zip(pieces, shapes, strict=True)]

    def _angles(self, hidden: Tensor, parts: Sequence[Part]) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[tokens, 1, head_dim]`, as the model's own rotary module computes them."""
        positions = _joined([part.positions.expand(part.tokens.shape).reshape(-1) for part in parts])
        if not self._static_rope:
            cos, sin = self._rotary(hidden, positions[None])
            return cos[0, :, None], _signed(sin)[0, :, None]
        read = max(part.read for part in parts)
        if self._table is None or len(self._table) < read:
            cos, sin = self._rotary(hidden, torch.arange(max(2 * read, _FIRST_POSITIONS))[None])
            self._table = torch.cat([cos[0], _signed(sin[0])], dim=-1)
        both = F.embedding(positions, self._table)[:, None]
        cos, sin = both.chunk(2, dim=-1)
        return cos, sin


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _signed(sin: Tensor) -> Tensor:
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
