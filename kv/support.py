"""Which models the shared cache can serve: everything attention-only whose K/V can be rolled back."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from specdec.kv.errors import UnsupportedModelError
from specdec.kv.quantised import Quantised
from specdec.kv.versions import CACHE_KEYWORDS, cache_argument, cached, naming_the_tested_range, tested_range
from specdec.kv.wrappers import unwrapped

ROLLBACK_LAYERS = {"full_attention", "sliding_attention"}
"""`config.layer_types` entries whose K/V are kept per token. Windowed layers are kept whole and masked."""

_RECURRENT_FIELDS = (
    "ssm_cfg",
    "mamba_d_state",
    "state_size",
    "rwkv_version",
    "attn_layer_indices",
    "linear_num_key_heads",
)

_UNSUPPORTED_TYPES = {
    "doge": "chooses the keys a token attends to from all keys of the pass, so that nodes of a draft tree would change "
    "each other's logits",
    "git": "counts positions through the padding of a batch in plain `generate`, which a cache without padding cannot",
    "kosmos-2.5": "counts positions through the padding of a batch in plain `generate`, as Git does",
    "paligemma": "lets the tokens of a prompt attend to later ones",
    "blt": "cuts its text into patches, so that a token's logits depend on the text around it",
    "csm": "generates frames of speech, not text",
    "xglm": "takes no attention mask that the rows of a batch share",
    "moshi": "gives other logits on the shared cache than in plain `generate`",
}
"""`config.model_type`s that look supported and would give other texts than plain `generate`, and why."""


def text_config(model: PreTrainedModel) -> Any:
    """The decoder's own config (multimodal models nest it)."""
    return model.config.get_text_config(decoder=True)


def num_cache_layers(model: PreTrainedModel) -> int:
    return int(text_config(model).num_hidden_layers)


def bytes_per_token(model: PreTrainedModel, quantised: Quantised | None = None) -> int:
    """Bytes of K/V one token takes in all layers, measured on a pass over one token: how many heads are kept, how wide
    and in which dtype is the model's own business."""
    embeddings: Any = model.get_input_embeddings()
    device = embeddings.weight.device
    cache: Any = DynamicCache()
    with torch.no_grad():
        # Offloaded weights are on "meta" between passes.
        token = torch.zeros(1, 1, dtype=torch.int64, device="cpu" if device.type == "meta" else device)
        model(input_ids=token, **cached(model, cache))
    states = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    if quantised is not None:
        return sum(tensor[..., 0].numel() * quantised.width(tensor.shape[-1]) for tensor in states)
    return sum(tensor.nbytes for tensor in states)


@naming_the_tested_range
def check_model(model: object, role: str) -> PreTrainedModel:
    """Return `model`, out of its wrappers (see `unwrapped`), if it can be decoded on a rollback cache, else say by name
    why not.

    Args:
        role: "target" or "draft", for the message.

    Raises:
        UnsupportedModelError: not a causal LM, encoder-decoder, recurrent or chunked state, shared K/V layers,
            or a forward without `position_ids`.
    """
    model = unwrapped(model, role)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{role}: expected a transformers PreTrainedModel with a language-modelling head, got "
            f"{type(model).__name__}. Load one with AutoModelForCausalLM.from_pretrained(...)."
        )
    name = type(model).__name__
    config = text_config(model)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{role}: {name} is an encoder-decoder model; only decoder-only models are supported."
        )
    if not model.can_generate() or model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{role}: {name} has no language-modelling head; load it with AutoModelForCausalLM."
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= ROLLBACK_LAYERS:
        raise UnsupportedModelError(
            f"{role}: {name} has layers of type {sorted(kinds - ROLLBACK_LAYERS)}, whose state cannot be rolled back "
            f"token by token; supported layer types are {sorted(ROLLBACK_LAYERS)}."
        )
    if getattr(model, "_is_stateful", False) or any(getattr(config, field, None) for field in _RECURRENT_FIELDS):
        raise UnsupportedModelError(
            f"{role}: {name} carries recurrent state, which cannot be rolled back; use an attention-only model."
        )
    if getattr(config, "alibi", False) or "local" in (getattr(config, "attention_layers", None) or ()):
        raise UnsupportedModelError(
            f"{role}: {name} places tokens by cache slot (ALiBi or local attention layers) instead of by position, so "
            "siblings of a draft tree cannot share one."
        )
    for kind in (model.config.model_type, config.model_type):
        if kind in _UNSUPPORTED_TYPES:
            raise UnsupportedModelError(f"{role}: {name} {_UNSUPPORTED_TYPES[kind]}; use plain generate.")
    home = sys.modules.get(type(model).__module__)
    if hasattr(home, "create_bidirectional_mask") and not hasattr(home, "create_causal_mask"):
        raise UnsupportedModelError(
            f"{role}: {name} lets a token attend to later ones in this version of transformers (not even its own cache "
            "gives the logits of a pass without one), so nodes of a draft tree would change each other's logits."
        )
    if getattr(config, "cross_attention_layers", None):
        raise UnsupportedModelError(
            f"{role}: {name} has layers that attend to an image, whose K/V the shared cache does not hold."
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"{role}: {name} shares K/V between layers, which the shared cache does not support."
        )
    head: Any = model.get_output_embeddings()
    width = getattr(head, "out_features", 0)
    if isinstance(width, int) and width > int(config.vocab_size):
        raise UnsupportedModelError(
            f"{role}: {name} has an output layer of {width} tokens, but its configuration says vocab_size="
            f"{config.vocab_size}: set config.vocab_size, or use resize_token_embeddings."
        )
    parameters = inspect.signature(model.forward).parameters
    if cache_argument(model) is None:
        raise UnsupportedModelError(
            f"{role}: {name}.forward takes neither {' nor '.join(f'`{word}`' for word in CACHE_KEYWORDS)}; use plain "
            f"generate ({tested_range()})."
        )
    for needed in ("position_ids", "attention_mask"):
        if needed not in parameters:
            raise UnsupportedModelError(
                f"{role}: {name}.forward takes no `{needed}`; sibling draft tokens share a position, so a tree cannot "
                f"be verified with this model ({tested_range()})."
            )
    return model
