"""A Llama-shaped model's forward pass straight over its own parameters, without a module call per layer.

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
from specdec.verify.passes.parameters import Layer, Parameters


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
        self._looked, self.parameters = True, None if self._inputs.windows else Parameters.of(self.model)
        try:
            yield
        finally:
            self._looked, self.parameters = False, None

    def refusal(self, part: Part) -> str | None:
        if self.parameters is not None and self.parameters.hooked:
            self.parameters = None
        if self.parameters is None:
            return "not a stock model on a CPU, or changed in the middle of a call (a hook?)"
        return None

    def __call__(self, parts: Sequence[Part]) -> list[Output]:
        own = self.parameters
        assert own is not None
        given = [self._inputs.of(part) for part in parts]
        hidden = F.embedding(joined([part.tokens.reshape(-1) for part in parts]), own.embed)
        positions = joined(
            [place.expand(part.tokens.shape).reshape(-1) for part, (place, _) in zip(parts, given, strict=True)]
        )
        angles, places = own.angles(hidden, positions, max(part.write.read for part in parts))
        cos, sin = F.embedding(places, angles)[:, None].chunk(2, dim=-1)
        groups, half = own.heads // own.kv_heads, own.head_dim // 2
        counts = [part.tokens.numel() for part in parts]
        masks = [tiled(mask, groups) for _, mask in given]
        split = (len(hidden), -1, own.head_dim)
        features, asked = dict[int, Tensor](), parts[0].wanted(len(own.layers))
        for number, layer in enumerate(own.layers):
            if number in asked:
                features[number] = hidden
            x = layer.before(hidden)
            q, k = layer.q(x), layer.k(x)
            if layer.normed:
                q, k = (norm(y.view(split)).view(y.shape) for norm, y in ((layer.q_norm, q), (layer.k_norm, k)))
            both = torch.cat((q, k), 1).view(split)
            # x * cos + rotate_half(x) * sin, the sign of rotate_half moved into sin: the same products, bit for bit
            both = (both * cos).add_(both.roll(half, -1).mul_(sin))
            v = layer.v(x).view(split)
            if len(parts) == 1:
                out = _attend(own, layer, parts[0], masks[0], both, v)
            else:
                pieces = zip(parts, masks, both.split(counts), v.split(counts), strict=True)
                out = torch.cat([_attend(own, layer, *piece) for piece in pieces])
            hidden = hidden + layer.o(out)
            x = layer.after(hidden)
            gate = F.silu(layer.gate(x), inplace=True)
            hidden = hidden + layer.down(gate.mul_(layer.up(x)))
        return _outputs(own, features, hidden, parts)


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
    logits = own.head(own.norm(joined(wanted)))
    if len(own.layers) in asked:
        features[len(own.layers)] = own.norm(hidden)
    return outputs(logits, [features[layer] for layer in asked], parts)
