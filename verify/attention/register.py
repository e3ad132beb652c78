"""The attention function registered with `transformers`: query heads folded onto their K/V head, any mask."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "specdec_fold"


def folded_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of `T` tree nodes over `S` cache slots without `repeat_kv`.

    The `g` query heads that share a K/V head become `g * T` query rows of that head (the mask is tiled `g` times),
    so K and V are read once. On a CPU bitwise equal to repeating them for T > 1; for T = 1 equal up to rounding.

    Args:
        query: `[rows, heads, T, head_dim]`; key, value: `[rows, kv_heads, S, *]`.
        attention_mask: additive float `[rows or 1, 1, T, S]`, or None for "everything" (T = 1) and for plain
            causal attention over an empty prefix (T = S).

    Returns:
        `[rows, T, heads, head_dim]` and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    out = attend(query, key, value, tiled(attention_mask, groups), groups, scaling, dropout)
    return out.view(*out.shape[:2], query.shape[1], -1), None


def tiled(mask: Tensor | None, groups: int) -> Tensor | None:
    """The mask of the folded query rows: `[rows or 1, 1, groups * T, S]` from `[rows or 1, 1, T, S]`."""
    if mask is None or groups == 1 or mask.shape[2] == 1:  # one row broadcasts
        return mask
    return mask.repeat(1, 1, groups, 1)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    groups: int,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The computation of `folded_attention`, under a mask that is `tiled` already.

    Returns:
        `[rows, T, heads * head_dim]`.
    """
    rows, heads, nodes, _ = query.shape
    if mask is None and nodes > 1:
        if key.shape[2] != nodes:
            raise ValueError(
                f"{NAME}: {nodes} queries over {key.shape[2]} slots need a mask, because SDPA's causal flag is aligned "
                "to the first slot; pass attention_mask, or call the model outside of a running generate"
            )
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=groups > 1
        )
        return out.transpose(1, 2).reshape(rows, nodes, -1)
    if groups > 1:
        query = query.reshape(rows, key.shape[1], groups * nodes, query.shape[-1])
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.reshape(rows, heads, nodes, -1).transpose(1, 2).reshape(rows, nodes, -1)


AttentionInterface.register(NAME, folded_attention)
# TreeForward brings its own 4-D masks. Whoever calls the model while a generate runs (a callback, a criterion) relies
# on transformers' masks: without a registered function they would be dropped silently, padding included.
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[str]:
    """Use the folded attention inside the block, and the model's own again afterwards.

    Eager models stay eager: they may soft-cap or add sinks, which SDPA cannot. So do functions somebody registered
    under a name of their own: what they compute is not known. Yields the name in use.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation
    used = fitting_attention(model)
    config._attn_implementation = used
    try:
        with _without_cudnn():
            yield used
    finally:
        config._attn_implementation = own


def fitting_attention(model: PreTrainedModel) -> str:
    """By which function a model attends in a decode loop: the folded one wherever its own is plain scaled dot-product
    attention by any of the usual names (a name with a slash is a kernel from the hub), looked up in the registry.

    Models that branch on the name themselves (Falcon) keep theirs: they would take another name for eager attention.
    """
    config = model.config.get_text_config(decoder=True)
    own = config._attn_implementation or "sdpa"
    if getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss":
        return "eager"
    own = str(own.removeprefix("paged|"))
    if own == "sdpa" and AttentionInterface()["sdpa"] is not sdpa_attention_forward:  # somebody put another one there
        return own
    usual = own in ("sdpa", NAME) or own.startswith(("flash_attention", "flex_attention")) or "/" in own
    return NAME if usual and _looks_up(model) else own


def _looks_up(model: PreTrainedModel) -> bool:
    """Whether the model's own module finds its attention function in the registry."""
    return hasattr(sys.modules.get(type(model).__module__), "ALL_ATTENTION_FUNCTIONS")


@contextmanager
def _without_cudnn() -> Iterator[None]:
    """cuDNN attention builds a plan per new shape (tens of ms); a growing tree pass is a new shape every step."""
    if not torch.cuda.is_available():
        yield
        return
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)
