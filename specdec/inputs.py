"""What a caller hands to `generate` beside its settings: ids, masks, positions, token types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel

from specdec.kv.errors import UnsupportedArgumentError
from specdec.kv.support import text_config
from specdec.kv.versions import CACHE_KEYWORD, CACHE_KEYWORDS

_MODEL_KWARGS = {"attention_mask", "position_ids", CACHE_KEYWORD, "use_cache", "logits_to_keep"}
"""Model inputs that are understood; anything else would have to reach every forward and is refused."""
_ONLY_COLLECTED = {"output_attentions", "output_hidden_states"}
"""What a call without return_dict_in_generate asks for and plain `generate` throws away (with it: `refuse_config`)."""


def check_call(inputs: Any, config: Any, kwargs: Mapping[str, Any], ways: Mapping[str, Any]) -> None:
    """Refuse by name what cannot be meant for this library, and what `transformers` fails on without naming it.

    Args:
        ways: arguments of `generate` that name other ways to decode.

    Raises:
        UnsupportedArgumentError
    """
    for name, value in {**ways, "assistant_tokenizer": kwargs.get("assistant_tokenizer")}.items():
        if name == "synced_gpus" and value:
            raise UnsupportedArgumentError("synced_gpus=True (ZeRO-3, FSDP) is not supported")
        if name != "synced_gpus" and value is not None:
            raise UnsupportedArgumentError(f"{name}: the drafter is given to Speculator(target, draft), not here")
    for name in ("adapter_names", "alora_offsets"):
        if kwargs.get(name) is not None:
            raise UnsupportedArgumentError(f"{name}: adapters cannot differ between rows; set_adapter(...) for all")
    if kwargs.get("cache_implementation") == "paged":
        raise UnsupportedArgumentError("cache_implementation='paged' selects continuous batching; leave it out")
    for name, value in (("inputs", inputs), ("input_ids", kwargs.get("input_ids"))):
        if value is not None:
            _check_ids(name, value)
    for name in ("attention_mask", "position_ids"):
        value = kwargs.get(name)
        if value is not None and (not isinstance(value, Tensor) or value.dim() < 2):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UnsupportedArgumentError(f"{name}: expected a tensor [rows, columns] like input_ids, got {shape}")
    for name in CACHE_KEYWORDS:
        cache = kwargs.get(name)
        if cache is not None and not isinstance(cache, Cache):
            raise UnsupportedArgumentError(
                f"{name}: expected a transformers DynamicCache, got {type(cache).__name__}. Pass a DynamicCache "
                f"(it is what `generate` returns), or leave {name} out."
            )
    if config is not None and not isinstance(config, GenerationConfig):
        raise UnsupportedArgumentError(
            f"generation_config: expected a GenerationConfig, got {type(config).__name__}. Make one, or pass its "
            "settings as arguments."
        )


def _check_ids(name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor):
        how = "tokenize it first" if isinstance(ids, (str, bytes)) else "pass torch.tensor(...) of it"
        how = "unpack it: generate(**inputs)" if isinstance(ids, Mapping) or hasattr(ids, "input_ids") else how
        raise UnsupportedArgumentError(f"{name}: expected a tensor of token ids, got {type(ids).__name__}: {how}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise UnsupportedArgumentError(f"{name}: expected int64 or int32 token ids, got {ids.dtype}: use ids.long()")
    if ids.dim() != 2 or 0 in ids.shape:
        raise UnsupportedArgumentError(
            f"{name}: expected token ids [rows, columns], at least one row and one column, got {tuple(ids.shape)}"
        )


def checked_ids(input_ids: Tensor, target: PreTrainedModel) -> Tensor:
    """The ids of a prepared call, int64 `[rows, columns]`, where the target's embeddings are.

    Raises:
        UnsupportedArgumentError: none, another dtype, or ids the target has no embedding for.
    """
    _check_ids("input_ids", input_ids)
    embeddings: Any = target.get_input_embeddings()
    low, high = (int(bound) for bound in torch.aminmax(input_ids))
    known = getattr(embeddings, "num_embeddings", None)
    if low < 0 or (known is not None and high >= known):
        raise UnsupportedArgumentError(
            f"input_ids: expected ids in 0..{'' if known is None else known - 1} ({type(target).__name__}), got {low} "
            f"to {high}. Is this another model's tokenizer?"
        )
    device = embeddings.weight.device
    if device.type == "meta":  # offloaded: weights arrive with each forward
        device = input_ids.device
    return input_ids.to(device=device, dtype=torch.int64)


def check_forced_ids(config: GenerationConfig, target: PreTrainedModel) -> None:
    """Refuse forced ids that do not exist: plain decoding fails where they are to be forced, drafts would fail earlier.

    Raises:
        UnsupportedArgumentError
    """
    vocab = int(text_config(target).vocab_size)
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(token, int) and not -vocab <= token < vocab for token in ids):
            raise UnsupportedArgumentError(f"{name}: expected ids in 0..{vocab - 1}, got {value}")


def refuse_unknown(model_kwargs: Mapping[str, Any], input_ids: Tensor, target: PreTrainedModel) -> None:
    """Model inputs that would change the text, or that nobody here knows.

    Raises:
        UnsupportedArgumentError
    """
    given = {name: value for name, value in model_kwargs.items() if not _is_nothing(value)}
    unknown = given.keys() - _MODEL_KWARGS - _ONLY_COLLECTED
    unknown -= {name for name in unknown if _means_text(name, given[name], input_ids, target)}
    if unknown:
        raise UnsupportedArgumentError(
            f"model inputs {sorted(unknown)} are not supported: only text prompts (input_ids, attention_mask) can be "
            "drafted for. Remove them, or use plain generate."
        )
    keep = given.get("logits_to_keep", 1)
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 0:
        raise UnsupportedArgumentError(
            f"logits_to_keep: expected a number of last tokens, got {keep!r}: the last token's logits are needed. "
            "Leave it out."
        )


def _means_text(name: str, value: Any, input_ids: Tensor, target: PreTrainedModel) -> bool:
    """Whether these are token types that every processor returns for text, and without which the model sees the same.

    Type 0 is text where a model could see or hear; BERT's decoders take it where none is given. Elsewhere (GPT-2) a
    type is looked up and added, 0 as well.
    """
    if name not in ("token_type_ids", "mm_token_type_ids") or not isinstance(value, Tensor):
        return False
    if value.shape != input_ids.shape or bool(value.any()):
        return False
    if name == "mm_token_type_ids" or hasattr(target.config, "vision_config"):
        return True
    return any(path.endswith("token_type_embeddings") for path, _ in target.named_modules())


def _is_nothing(value: Any) -> bool:
    """Whether nothing is meant: None, or the empty dict that multimodal models pass along with every text."""
    return value is None or (isinstance(value, dict) and not value)


def real_columns(input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
    """Bool `[rows, columns]`, False for pads; None where there is no mask.

    Raises:
        UnsupportedArgumentError: another shape, values between or beyond 0 and 1, or a masked last token.
    """
    if mask is None:
        return None
    if mask.shape != input_ids.shape:
        raise UnsupportedArgumentError(
            f"attention_mask: expected the shape of input_ids {tuple(input_ids.shape)}, got {tuple(mask.shape)}. "
            f"input_ids must hold the whole text, the part already in {CACHE_KEYWORD} included."
        )
    mask = mask.to(device=input_ids.device)
    real = mask == 1
    if not bool((real | (mask == 0)).all()):
        raise UnsupportedArgumentError("attention_mask: expected 1 for tokens and 0 for padding, got other values.")
    if not bool(real[:, -1].all()):
        raise UnsupportedArgumentError(
            "attention_mask: the last token of a prompt is masked. Pad on the left (tokenizer.padding_side='left')."
        )
    return real


def check_positions(position_ids: Tensor | None, real: Tensor | None, input_ids: Tensor) -> None:
    """Raises:
    UnsupportedArgumentError: positions that do not count the real tokens.
    """
    if position_ids is None:
        return
    mask = torch.ones_like(input_ids) if real is None else real.long()
    expected = (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
    width = min(position_ids.shape[-1], expected.shape[1])
    # Models that could see place a token on several axes ([axes, rows, columns]), all the same in plain text.
    planes = position_ids.to(input_ids.device).reshape(-1, *position_ids.shape[-2:])[..., -width:]
    if bool(((planes != expected[:, -width:]) & (mask[:, -width:] == 1)).any()):
        raise UnsupportedArgumentError(
            "position_ids: only consecutive positions from 0 are supported (a token's cache slot is its position). "
            "Leave position_ids out."
        )
