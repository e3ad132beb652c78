"""Tiny models whose weights are in few bits, and the same models with the numbers those bits stand for."""

from __future__ import annotations

import copy
from typing import Any

import models
import torch
from torch import nn

from specdec.verify.packed import Packed, PackedLinear


def packed(model: Any, bits: int = 8, group: int | None = 32, symmetric: bool = True, **options: Any) -> Any:
    """A copy of `model` with every linear layer packed by plain rounding."""
    return _changed(
        model, lambda layer: PackedLinear(Packed.rounded(layer.weight, bits, group, symmetric), layer.bias, **options)
    )


def dequantized(model: Any) -> Any:
    """A copy of a packed model with the numbers its codes stand for."""

    def plain(layer: PackedLinear) -> nn.Linear:
        weight = layer.packed.dequantized(model.dtype)
        out = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, dtype=model.dtype)
        out.weight = nn.Parameter(weight)
        if layer.bias is not None:
            out.bias = layer.bias
        return out.eval()

    return _changed(model, plain)


def converted(model: Any, dtype: torch.dtype) -> Any:
    """A copy in another dtype."""
    return copy.deepcopy(model).to(dtype).eval()


def _changed(model: Any, change: Any) -> Any:
    with torch.no_grad():
        out = copy.deepcopy(model)
        for part in list(out.modules()):
            for name, layer in list(part.named_children()):
                if isinstance(layer, (nn.Linear, PackedLinear)):
                    setattr(part, name, change(layer).eval())
    return out


def target(family: str, dtype: str = "fp32", **options: Any) -> Any:
    return packed(models.target(family, dtype), **options)
