"""Is a model one that `transformers` wrote and nobody changed? Only then may a pass go past its modules."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules import module as torch_modules
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from specdec.verify.attention.register import NAME, fitting_attention
from specdec.verify.packed import PackedLinear
from specdec.verify.passes.linear import is_dense

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
"""Model classes whose layers have this shape; one with a sliding window is left to its modules (see `Forward`)."""
_PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half")
_LEAVES = (nn.Linear, nn.Embedding, type(ACT2FN["silu"]), nn.ModuleList, PackedLinear)
_FUSED_FORWARD, _FUSED_HOME = "add_fused_lm_head.<locals>._fused_forward", os.path.join("trl", "trainer", "utils.py")
_HOMES = tuple(str(Path(str(package.__file__)).parent) for package in (torch, transformers))


def is_stock(model: PreTrainedModel) -> bool:
    """Whether the parameters of `model` say all about it, for a pass on the CPU.

    Not for other families, for models that drop out or checkpoint (in training mode), off the CPU or in several places,
    for eager attention, nor for any model somebody has changed: hooks, adapters, quantised or wrapped layers, patched
    forwards.
    """
    kind = type(model)
    family = next((name for name in _FAMILIES if kind.__name__ == f"{name}ForCausalLM"), None)
    if family is None or not kind.__module__.startswith("transformers.models."):
        return False
    if fitting_attention(model) != NAME or model.config.hidden_act not in ("silu", "swish"):
        return False
    if (
        torch.is_autocast_enabled("cpu")
        or torch_modules._global_forward_hooks
        or torch_modules._global_forward_pre_hooks
    ):
        return False
    home = sys.modules[kind.__module__]
    stock = {getattr(home, family + part) for part in _PARTS}
    used = (*(part.forward for part in (*stock, *_LEAVES[:3])), *(getattr(home, name) for name in _FUNCTIONS))
    if not all(original(function) for function in used):  # patched for all models of the family
        return False
    if any(type(part) not in (*_LEAVES, *stock) or _changed(part) for part in model.modules()):
        return False
    if not all(is_dense(weight) for weight in model.parameters()):
        return False
    places = {(weight.device.type, weight.dtype) for weight in model.parameters()}
    return len(places) == 1 and places.pop()[0] == "cpu"


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
    if part.training and (getattr(part, "attention_dropout", False) or getattr(part, "gradient_checkpointing", False)):
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
