"""Is a model one that `transformers` wrote and nobody changed? Only then may a pass go past its modules."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from specdec.kv.support import text_config
from specdec.verify.attention.register import NAME, fitting_attention
from specdec.verify.packed import PackedLinear
from specdec.verify.passes.linear import is_dense
from specdec.verify.quantised import packed_of


class Family(NamedTuple):
    """In what the modules of a family differ from Llama's.

    fused: one weight for queries, keys and values, and one for both halves of the inner layer. partial: heads may be
    rotated in part. head_norms: queries and keys are normalised. centred: norms by 1 + weight, rounded afterwards, and
    scaled embeddings. sandwich: what a layer adds is normalised first. score_caps, logit_caps: soft-capped, where the
    configuration says so. multipliers: of embeddings, of what layers add, of logits. unrotated: some layers do not
    rotate.
    """

    fused: bool = False
    partial: bool = False
    head_norms: bool = False
    centred: bool = False
    sandwich: bool = False
    score_caps: bool = False
    logit_caps: bool = False
    multipliers: bool = False
    unrotated: bool = False


FAMILIES = {
    **dict.fromkeys(("Cwm", "Llama", "Ministral", "Mistral", "Qwen2", "SeedOss"), Family()),
    "Gemma": Family(centred=True),
    "Gemma2": Family(centred=True, sandwich=True, score_caps=True, logit_caps=True),
    "Gemma3": Family(centred=True, sandwich=True, head_norms=True, logit_caps=True),
    "Granite": Family(multipliers=True),
    "Phi3": Family(fused=True, partial=True),
    "Qwen3": Family(head_norms=True),
    "SmolLM3": Family(unrotated=True),
}
"""Model classes, `...ForCausalLM` of transformers, whose layers have Llama's shape but for that (docs/models.md)."""
_PARTS = ("DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_BODIES, _SCALED = ("TextModel", "Model"), "TextScaledWordEmbedding"
_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half")
GELU = type(ACT2FN["gelu_pytorch_tanh"])
_LEAVES = (nn.Linear, nn.Embedding, nn.Dropout, type(ACT2FN["silu"]), GELU, nn.ModuleList, PackedLinear)
_DROPPING = ("attention_dropout", "residual_dropout", "gradient_checkpointing")
"""What modules have that compute something else in training mode."""
_FUSED_FORWARD, _FUSED_HOME = "add_fused_lm_head.<locals>._fused_forward", os.path.join("trl", "trainer", "utils.py")
_HOMES = tuple(str(Path(str(package.__file__)).parent) for package in (torch, transformers))


def family_of(model: PreTrainedModel) -> Family | None:
    """The family of `model`'s class; None where it is none of `FAMILIES`."""
    name, home = type(model).__name__, type(model).__module__
    ours = name.endswith("ForCausalLM") and home.startswith("transformers.models.")
    return FAMILIES.get(name.removesuffix("ForCausalLM")) if ours else None


def is_stock(model: PreTrainedModel) -> bool:
    """Whether the parameters of `model` say all about it, for a pass on the CPU.

    Not for other families, for models that drop out or checkpoint (in training mode), off the CPU or in several places,
    for eager attention, nor for any model somebody has changed: hooks, adapters, wrapped layers, patched forwards;
    quantised layers only where they multiply with a `Packed` (see `packed_of`).
    """
    family, kind = family_of(model), type(model)
    if family is None or fitting_attention(model) != ("eager" if family.score_caps and caps_scores(model) else NAME):
        return False
    if (
        torch.is_autocast_enabled("cpu")
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
    ):
        return False
    home, name = sys.modules[kind.__module__], kind.__name__.removesuffix("ForCausalLM")
    parts = [*_PARTS, next(body for body in _BODIES if hasattr(home, name + body)), *[_SCALED] * family.centred]
    stock = {kind, *(getattr(home, name + part, nn.Module) for part in parts)}
    used = (*(part.forward for part in (*stock, *_LEAVES[:-2])), *(getattr(home, name) for name in _FUNCTIONS))
    if not all(original(function) for function in used):  # patched for all models of the family
        return False
    if any(_changed(part) for part in model.modules()):
        return False
    own = [part for part in model.modules() if packed_of(part) is None]
    if any(type(part) not in (*_LEAVES, *stock) for part in own):
        return False
    weights = [weight for part in own for weight in part.parameters(recurse=False)]
    if not all(map(is_dense, weights)):
        return False
    places = {(weight.device.type, weight.dtype) for weight in weights}
    return len(places) == 1 and places.pop()[0] == "cpu"


def caps_scores(model: PreTrainedModel) -> bool:
    """Whether the configuration soft-caps attention."""
    return getattr(text_config(model), "attn_logit_softcapping", None) is not None


def original(function: Any) -> bool:
    """Whether a function and whatever it wraps was written in transformers or torch."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_HOMES):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _changed(part: nn.Module) -> bool:
    own = part.__dict__
    drops = isinstance(part, nn.Dropout) and part.p > 0
    if part.training and (drops or any(getattr(part, name, False) for name in _DROPPING)):
        return True
    if isinstance(part, nn.Embedding) and part.max_norm is not None:
        return True
    if isinstance(part, (nn.Linear, nn.Embedding)) and "weight" not in part._parameters:  # set by something else
        return True
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    patched = "forward" in own and not is_trainers(own["forward"], part)
    return patched or "_hf_hook" in own or not all(map(_changes_nothing, hooks))


def is_trainers(forward: Any, part: nn.Module) -> bool:
    """Whether a forward set on a module is what TRL's trainers put on the model they train.

    It computes the loss where it is asked to (`fused_lm_head=True`); otherwise it calls the forward it found, by TRL's
    documentation ("so generation is unchanged"). That must have been the class's own.
    """
    function: Any = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    if code is None or code.co_qualname != _FUSED_FORWARD or not code.co_filename.endswith(_FUSED_HOME):
        return False
    cells = dict(zip(code.co_freevars, function.__closure__, strict=True))
    found = cells["original_forward"].cell_contents if "original_forward" in cells else None
    return getattr(found, "__func__", None) is type(part).forward and getattr(found, "__self__", None) is part


def _changes_nothing(hook: Any) -> bool:
    """Whether a hook is one of two that `transformers` leaves on a model: once it was asked for hidden states, which
    does nothing in a pass that was not; and for checkpoints in training, which marks embeddings for autograd."""
    home, name = getattr(hook, "__module__", None), getattr(hook, "__qualname__", "")
    collects = home == "transformers.utils.output_capturing"
    marks = home == "transformers.modeling_utils" and name.endswith(".make_inputs_require_grads")
    return (collects or marks) and original(hook)
