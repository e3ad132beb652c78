"""The lean copy of a target: made once, and again when the target's weights have changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.drafters.self_draft.forms import Form
from specdec.drafters.self_draft.mirror import decoder_layers, mirrored, weighted
from specdec.kv.errors import UnsupportedModelError
from specdec.kv.support import check_model, text_config
from specdec.verify.packed import Packed, PackedLinear
from specdec.verify.weights import Weights

GROUP = 64
"""Neighbours in a row that share a scale."""


class LeanCopy:
    """A cheaper model over the target's parameters.

    Attributes:
        model: the copy; the same object for good, its modules are exchanged where the target's weights change.
        num_bytes: of the weights that are the copy's own.
        num_made: how often it was made.
    """

    def __init__(self, target: PreTrainedModel, form: Form, calibration: Sequence[Tensor] | None = None):
        self.target = check_model(target, "target")
        self.form, self._calibration = form, calibration
        self.model = self._made(first=True)
        self.num_made = 1
        self._weights = Weights([self.target])

    @property
    def num_bytes(self) -> int:
        shared = {tensor.data_ptr() for tensor in _tensors(self.target)}
        return sum(tensor.nbytes for tensor in _tensors(self.model) if tensor.data_ptr() not in shared)

    def refresh(self) -> None:
        """Make it again if the target's weights have changed since."""
        if self._weights.changed():
            vars(self.model).update(vars(self._made(first=False)))
            self.num_made += 1

    @torch.no_grad()
    def _made(self, first: bool) -> PreTrainedModel:
        model = mirrored(self.target)
        kind = self.form.kind
        if kind in ("exit", "skip"):
            keep_layers(model, self.form.kept_layers(int(text_config(model).num_hidden_layers)))
        else:
            pack(model, 8 if kind == "int8" else 4)
        return model


def _tensors(model: nn.Module) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values())


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave out all layers but these, which go on reading the K/V of their own number."""
    parent, name = decoder_layers(model)
    layers: Any = parent._modules[name]
    parent._modules[name] = nn.ModuleList([layers[i] for i in kept]).train(layers.training)
    config = text_config(model)
    config.num_hidden_layers = len(kept)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in kept]


def pack(model: PreTrainedModel, bits: int) -> None:
    """Round all linear layers to the nearest code."""
    found = list(weighted(model))
    if not found:
        raise UnsupportedModelError(
            f"draft 'self:int{bits}': {type(model).__name__} has no linear layers with plain weights"
        )
    for parent, name, layer in found:
        weight: Any = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t().contiguous()
        packed = Packed.rounded(weight, bits, GROUP, symmetric=bits == 8)
        parent._modules[name] = PackedLinear(packed, layer.bias)
