"""Passes of an unmodified model whose attention is tree attention by a plan instead of a mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from specdec.kv.errors import UnsupportedModelError
from specdec.verify.attention.choose import attend
from specdec.verify.attention.layout import TreePlan

NAME = "specdec_tree"

MAX_NODES = 256
"""Wider passes (prefills) are better served by masked or causal SDPA."""

_UNKNOWN_TERMS = ("s_aux", "sinks", "position_bias", "alibi", "relative_position_bias", "softcap")


@dataclass(frozen=True)
class _Pass:
    plan: TreePlan
    windows: tuple[int | None, ...]


_running: ContextVar[_Pass | None] = ContextVar("specdec_tree_pass", default=None)


@contextmanager
def planned_pass(model: PreTrainedModel, plan: TreePlan, windows: Mapping[str, int | None]) -> Iterator[Any]:
    """Inside the block `model` attends as `plan` says; yields what to pass as its `attention_mask`.

    Args:
        windows: attention window per layer type; empty when every layer sees everything (see `TreeForward`).
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    sizes = tuple(windows.values()) or (None,)
    # Every layer gets the mask of its type: a placeholder, whose width says which window is meant (identity would
    # not survive a copy to another device).
    places = [torch.empty(1, 1, 1, i + 1, device=plan.lengths.device) for i in range(len(sizes))]
    token = _running.set(_Pass(plan, sizes))
    config._attn_implementation = NAME
    try:
        yield places[0] if len(places) == 1 else dict(zip(windows, places, strict=True))
    finally:
        config._attn_implementation = own
        _running.reset(token)


def planned_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Tree attention of the pass that runs; the function registered with `transformers`.

    Raises:
        UnsupportedModelError: the model's softmax has terms that are not computed here.
    """
    unknown = [name for name in _UNKNOWN_TERMS if kwargs.get(name) is not None]
    if unknown or dropout:
        what = ", ".join(unknown) or f"dropout={dropout}"
        raise UnsupportedModelError(
            f"{type(module).__name__} has {what} in its attention, which tree attention does not compute; load the "
            "model with attn_implementation='eager' (and call model.eval())"
        )
    running = _running.get()
    assert running is not None, "tree attention runs inside planned_pass only"
    assert attention_mask is not None, "a planned pass brings its placeholder"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = running.windows[attention_mask.shape[-1] - 1]
    return attend(query, key, value, running.plan.on(query.device), scale, window), None


AttentionInterface.register(NAME, planned_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
