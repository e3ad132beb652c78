"""Is a model one that `transformers` wrote and nobody changed? Only then may a pass go past its modules."""

from __future__ import annotations

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
_HOMES = tuple(str(Path(str(package.__file__)).parent) for package in (torch, transformers))


def is_stock(model: PreTrainedModel) -> bool:
    """Whether the parameters of `model` say all about it, for a pass on the CPU.

    Not for other families, for models in training mode, off the CPU or in several places, for eager attention, nor
    for any model somebody has changed: hooks, adapters, quantised or wrapped layers, patched forwards.
    """
    kind = type(model)
    family = next((name for name in _FAMILIES if kind.__name__ == f"{name}ForCausalLM"), None)
    if family is None or model.training or not kind.__module__.startswith("transformers.models."):
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
    if part.training and hasattr(part, "attention_dropout"):  # in a model that is otherwise in evaluation mode
        return True
    if isinstance(part, nn.Embedding) and part.max_norm is not None:
        return True
    if isinstance(part, (nn.Linear, nn.Embedding)) and "weight" not in part._parameters:  # set by something else
        return True
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    return "forward" in own or "_hf_hook" in own or not all(map(_only_collects, hooks))


def _only_collects(hook: Any) -> bool:
    """Whether a hook is one that `transformers` leaves on a model once it was asked for hidden states: it does nothing
    in a pass that was not."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing" and original(hook)
