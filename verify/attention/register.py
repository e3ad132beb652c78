"""How a pass of unmodified modules reaches our attention.

`transformers` models look their attention function up by the name in their configuration. One function is registered,
under `NAME`; `attention_of` puts that name into a model for a whole call, `attending` for one pass that has a `Plan`.
The function attends as the plan of the running pass says, or, where there is none, under the model's own masks by
folded SDPA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from specdec.kv.errors import UnsupportedModelError
from specdec.kv.overlap import overlapping
from specdec.kv.support import text_config
from specdec.verify.attention.fold import folded_attention

NAME = "specdec"

TERMS = ("s_aux", "sinks", "position_bias", "alibi", "relative_position_bias", "softcap")
"""Arguments by which models add terms to the softmax."""


class Plan(Protocol):
    """How the layers of one pass attend.

    Attributes:
        computes: which of `TERMS` it computes.
        refuses: what is said of the others: "... has s_aux in its attention, which `refuses`".
    """

    computes: ClassVar[tuple[str, ...]]
    refuses: ClassVar[str]

    def mask_for(self, window: int | None) -> Tensor:
        """What layers that look back `window` positions (None: all) are given as their mask, 4-D.

        It comes back in `attend`, perhaps as a copy on another device.
        """
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None
    ) -> Tensor:
        """`[rows, T, heads, value's head_dim]` from what the layer and the cache hand over."""
        ...


class _Pass(NamedTuple):
    config: Any  # whose modules are meant: a hook may call another model in the middle of a pass
    plan: Plan


_running: ContextVar[_Pass | None] = ContextVar("specdec_pass", default=None)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **terms: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer of the pass that runs; the function registered with `transformers`.

    Args:
        query: `[rows, heads, T, head_dim]`; key, value: what the cache's `update` returned.
        attention_mask: the plan's, or without one as in `folded_attention`.

    Returns:
        `[rows, T, heads, value's head_dim]` and no weights.

    Raises:
        UnsupportedModelError: the model's softmax has terms that the plan does not compute.
    """
    running = _running.get()
    if running is None or getattr(module, "config", None) is not running.config:
        return folded_attention(query, key, value, attention_mask, scaling, dropout), None
    plan = running.plan
    unknown = [name for name in TERMS if name not in plan.computes and terms.get(name) is not None]
    unknown += [f"dropout={dropout} (call model.eval())"] if dropout else []
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} has {', '.join(unknown)} in its attention, which {plan.refuses}"
        )
    assert attention_mask is not None, "the pass was given its plan's mask"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return plan.attend(query, key, value, attention_mask, scale, terms.get("softcap")), None


AttentionInterface.register(NAME, attention)
# Passes bring their own 4-D masks. Whoever calls the model while a generate runs (a callback, a criterion) relies on
# transformers' masks: without a registered function they would be dropped silently, padding included.
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def attending(model: PreTrainedModel, plan: Plan, windows: Mapping[str, int | None]) -> Iterator[Any]:
    """Inside the block `model` attends as `plan` says, whatever its own attention is; then as before.

    Args:
        windows: attention window per layer type; empty when every layer sees everything (see `Forward`).

    Yields:
        what to pass as `attention_mask`: a dict by layer type where there are several.
    """
    config = text_config(model)
    masks = {kind: plan.mask_for(window) for kind, window in windows.items()} or {"": plan.mask_for(None)}
    token = _running.set(_Pass(config, plan))
    try:
        with _named(config, NAME):
            yield masks if len(masks) > 1 else next(iter(masks.values()))
    finally:
        _running.reset(token)


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[str]:
    """Inside the block `model` attends by `fitting_attention`, whose name is yielded; then by its own again."""
    used, config = fitting_attention(model), text_config(model)
    with overlapping(("attention", id(config)), lambda: _named(config, used)), overlapping("cudnn", _without_cudnn):
        yield used


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    own = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = own


def fitting_attention(model: PreTrainedModel) -> str:
    """By which function a model attends in a decode loop: ours wherever its own is plain scaled dot-product attention
    by any of the usual names (a name with a slash is a kernel from the hub), looked up in the registry.

    Eager models stay eager: they may soft-cap or add sinks, which SDPA cannot. A model with such terms that attends by
    `transformers`' own SDPA all the same (the default of older versions) goes on with what that computes. So do models
    with functions somebody registered under a name of their own: what they compute is not known. Models that branch on
    the name themselves (Falcon) keep theirs: they would take another name for eager attention.
    """
    config = text_config(model)
    own = config._attn_implementation or "sdpa"
    if getattr(config, "attn_logit_softcapping", None) is not None or config.model_type == "gpt_oss":
        return own if own == "sdpa" else "eager"  # whose sdpa leaves such terms out, or refuses them: so must a draft's
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
