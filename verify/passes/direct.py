"""The forward pass of a model of Llama's kind straight over its own parameters, without a module call per layer.

An eager `transformers` layer dispatches a dozen modules and some forty small operations; for a few tokens of a small
model on a CPU that costs more than the arithmetic. Here the same operations run on the same parameters, in the same
order and rounding, in about half as many calls: results are bitwise those of the modules with the folded attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from specdec.verify.attention.fold import attend, tiled
from specdec.verify.passes.base import Output, Part, Runner, joined, outputs
from specdec.verify.passes.inputs import Inputs
from specdec.verify.passes.layers import Layer
from specdec.verify.passes.parameters import Parameters


class Direct(Runner):
    """Runs a model that nobody has changed, in any dtype, on a CPU.

    Attributes:
        parameters: what it reads, inside `prepared`; None where the modules must be called.
    """

    name = "direct"
    joint = True

    def __init__(self, model: PreTrainedModel, inputs: Inputs):
        self.model, self._inputs = model, inputs
        self.parameters: Parameters | None = None
        self._looked = False

    @contextmanager
    def prepared(self) -> Iterator[None]:
        if self._looked:  # by the native runner, which reads the same parameters
            yield
            return
        self._looked, self.parameters = True, Parameters.of(self.model)
        try:
            yield
        finally:
            self._looked, self.parameters = False, None

    def refusal(self, part: Part) -> str | None:
        if self.parameters is not None and self.parameters.hooked:
            self.parameters = None
        if self.parameters is None:
            return "not a stock model on a CPU, or changed in the middle of a call (a hook?)"
        return "soft-capped attention" if self.parameters.score_cap else None

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        own = self.parameters
        assert own is not None
        given = [self._inputs.of(part) for part in parts]
        hidden = F.embedding(joined([part.tokens.reshape(-1) for part in parts]), own.embed)
        positions = joined(
            [place.expand(part.tokens.shape).reshape(-1) for part, (place, _) in zip(parts, given, strict=True)]
        )
        hidden = hidden if own.embed_scale == 1 else hidden * own.embed_scale
        table = own.angles.table(hidden, max(part.write.read for part in parts))
        angles = F.embedding(positions, table)[:, None]
        counts = [part.tokens.numel() for part in parts]
        masks = [_masks(mask, own) for _, mask in given]
        split = (len(hidden), -1, own.head_dim)
        features, asked = dict[int, Tensor](), parts[0].wanted(len(own.layers))
        for number, layer in enumerate(own.layers):
            if number in asked:
                features[number] = hidden
            q, k, v = layer.projected(layer.before(hidden))
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = (norm(y.view(split)).view(y.shape) for norm, y in ((layer.q_norm, q), (layer.k_norm, k)))
            both, v = torch.cat((q, k), 1).view(split), v.view(split)
            if layer.angles >= 0:
                both = _rotated(both, angles[..., layer.angles :], own.angles.rotary)
            own_masks = [mask[layer.kind] for mask in masks]
            if len(parts) == 1:
                out = _attend(own, layer, parts[0], own_masks[0], both, v)
            else:
                pieces = zip(parts, own_masks, both.split(counts), v.split(counts), strict=True)
                out = torch.cat([_attend(own, layer, *piece) for piece in pieces])
            hidden = layer.added(hidden, layer.o(out), layer.attended)
            hidden = layer.added(hidden, layer.inner(layer.after(hidden)), layer.fed)
        return _outputs(own, features, hidden, parts)


def _masks(mask: Any, own: Parameters) -> dict[str, Tensor | None]:
    """Masks of folded query rows, by layer type."""
    groups = own.heads // own.kv_heads
    if isinstance(mask, dict):
        return {kind: tiled(one, groups) for kind, one in mask.items()}
    return dict.fromkeys([layer.kind for layer in own.layers], tiled(mask, groups))


def _rotated(both: Tensor, angles: Tensor, size: int) -> Tensor:
    """Queries and keys `[tokens, heads, head_dim]`, of which the first `size` numbers are rotated."""
    cos, sin, turned = angles[..., :size], angles[..., size : 2 * size], both[..., :size]
    # x * cos + rotate_half(x) * sin, the sign of rotate_half moved into sin: the same products, bit for bit
    turned = (turned * cos).add_(turned.roll(size // 2, -1).mul_(sin))
    return turned if size == both.shape[-1] else torch.cat((turned, both[..., size:]), -1)


def _attend(own: Parameters, layer: Layer, part: Part, mask: Any, both: Tensor, value: Tensor) -> Tensor:
    """One part's attention, `[rows * T, heads * head_dim]`, from its rotated queries and keys and its values."""
    rows, width = part.tokens.shape
    split = (rows, width, -1, own.head_dim)
    both = both.view(split).transpose(1, 2)
    keys, values = part.write.update(layer.index, both[:, own.heads :], value.view(split).transpose(1, 2))
    out = attend(both[:, : own.heads], keys, values, mask, own.heads // own.kv_heads, layer.scaling)
    return out.view(rows * width, -1)


def _outputs(own: Parameters, features: dict[int, Tensor], hidden: Tensor, parts: Sequence[Part]) -> list[Output]:
    asked = parts[0].wanted(len(own.layers))
    wanted, pieces = [], hidden.split([part.tokens.numel() for part in parts])
    for piece, part in zip(pieces, parts, strict=True):
        (rows, width), kept = part.tokens.shape, part.kept[1]
        if kept < width:
            piece = piece.view(rows, width, -1)[:, width - kept :].flatten(0, 1)
        wanted.append(piece)
    logits = own.finished(own.head(own.norm(joined(wanted))))
    if len(own.layers) in asked:
        features[len(own.layers)] = own.norm(hidden)
    return outputs(logits, [features[layer] for layer in asked], parts)
