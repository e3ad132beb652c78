"""Lengths, masks and modes in which a target would decode differently from plain `generate`: refused before work."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.errors import UnsupportedArgumentError, UnsupportedModelError
from specdec.kv.support import text_config
from specdec.request import Request
from specdec.verify.positions import length_dependent_positions, windows_of
from specdec.verify.quantised import mixes_tokens


def refuse_mixing(target: PreTrainedModel) -> None:
    """Refuse a target that has no law of the next token to keep.

    Raises:
        UnsupportedModelError: a token's logits depend on the tokens beside it in a pass.
    """
    why = mixes_tokens(target)
    if why is not None:
        raise UnsupportedModelError(
            f"target: {type(target).__name__} is quantised: {why}, so a drafted token would change the law of "
            "the tokens before it. Load it with llm_int8_threshold=0.0 or another kind of rounding (a scale for every "
            "token), or use plain generate. As a draft model it can be used as it is."
        )


def refuse_unfit(target: PreTrainedModel, request: Request) -> None:
    """Refuse what this target would decode differently from plain `generate`.

    Raises:
        UnsupportedArgumentError: a text that may outgrow the positions below which rotary frequencies do not depend on
            the length of the pass; a mask with holes where a sliding window may close; or a model that checkpoints.
    """
    _refuse_checkpoints(target)
    _refuse_lengths(target, request)
    _refuse_holes(target, request)


def _refuse_checkpoints(target: PreTrainedModel) -> None:
    if any(part.training and getattr(part, "gradient_checkpointing", False) for part in target.modules()):
        raise UnsupportedArgumentError(
            f"{type(target).__name__} is in training mode with gradient checkpointing, where its layers keep no keys "
            "and values, and drafts are verified on those. Call eval() or gradient_checkpointing_disable() first."
        )


def _refuse_lengths(target: PreTrainedModel, request: Request) -> None:
    limit = length_dependent_positions(text_config(target))
    if limit is None:
        return
    columns, most = request.input_ids.shape[1], request.criteria.max_length
    longest = columns if request.real is None else int(request.real.sum(1).max())
    new = 1 if most is None else max(1, most - columns)
    if longest + new - 1 <= limit:  # the last token is not read
        return
    name = type(target).__name__
    where = f"a prompt of {longest} tokens is longer"
    if longest <= limit:
        fits = f"max_new_tokens={limit + 1 - longest} fits"
        where = f"a prompt of {longest} tokens with max_new_tokens={new} may grow longer; {fits}"
    raise UnsupportedArgumentError(
        f"{name} has rotary frequencies that depend on the length of the pass (rope_type longrope or dynamic) beyond "
        f"{limit} tokens, so that a drafted token would change the law of those before it, and {where}. Use plain "
        "generate for longer texts."
    )


def _refuse_holes(target: PreTrainedModel, request: Request) -> None:
    if request.real is None or not has_holes(request.real):
        return
    window = min((size for size in windows_of(text_config(target)).values() if size is not None), default=None)
    most = request.criteria.max_length
    if window is None or (most is not None and most <= window):
        return
    raise UnsupportedArgumentError(
        f"attention_mask: expected a mask without zeros between a row's tokens, got one with holes. Layers of "
        f"{type(target).__name__} see a window of {window} columns, in which plain generate counts masked columns and "
        "a cache without padding cannot: take the masked tokens out and pad on the left, or use plain generate."
    )


def has_holes(real: Tensor) -> bool:
    """Whether any row of bool `[rows, columns]` has False behind a True."""
    return bool((real[:, :-1] & ~real[:, 1:]).any())
