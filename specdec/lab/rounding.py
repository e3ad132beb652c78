"""What rounding explains: how far a model's own scores move when its numbers are rounded otherwise.

Two right ways to compute a pass (other kernels, another batch, sums in another order) differ by roundings. How far that
carries through all layers is the model's business, so it is tried on the model: in a pass of its modules, what every
one of them returns is off by up to half a unit in the last place of the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NUDGES = 8
"""Such passes to learn one figure from."""
_EXACT = (nn.Embedding, nn.Dropout, nn.Identity)
"""Modules that round nothing."""


@contextmanager
def nudged(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside the block what the innermost modules of `model` return is off by at most half a unit in the last place."""
    generators: dict[torch.device, torch.Generator] = {}

    def nudge(module: nn.Module, given: Any, out: Any) -> Tensor | None:
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return None
        if out.device not in generators:
            generators[out.device] = torch.Generator(out.device).manual_seed(seed)
        wide = out.double() if out.dtype in (torch.float32, torch.float64) else out.float()
        unit = torch.rand(out.shape, generator=generators[out.device], device=out.device, dtype=wide.dtype) - 0.5
        return (wide + wide * unit * torch.finfo(out.dtype).eps).to(out.dtype)

    inner = [part for part in model.modules() if not isinstance(part, _EXACT) and not any(part.children())]
    handles = [part.register_forward_hook(nudge) for part in inner]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def nudged_logits(target: Any, ids: Tensor, keep: int, times: int = NUDGES) -> Tensor:
    """Logits of the last `keep` tokens of `ids` `[rows, tokens]` in so many plain passes, each rounded otherwise:
    `[times, rows, keep, vocab]`."""
    found = []
    for seed in range(times):
        with nudged(target, seed):
            found.append(target(input_ids=ids).logits[:, -keep:])
    return torch.stack(found)
