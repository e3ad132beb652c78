"""A second model made of the modules of a first one: it shares all parameters, and any part of it can be exchanged."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdec.kv.errors import UnsupportedModelError
from specdec.kv.support import text_config
from specdec.verify.passes.linear import is_dense
from specdec.verify.quantised import is_quantised, weight_of_quantised

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


def refuse_spread(model: PreTrainedModel) -> None:
    """Raises:
    UnsupportedModelError: a model whose modules bring their weights in for every pass.
    """
    if any("_hf_hook" in vars(part) for part in model.modules()):
        raise UnsupportedModelError(
            f"draft 'self:...': {type(model).__name__} is spread over devices or offloaded (accelerate's hooks are on "
            "its modules), and a copy of it would have to be spread, too. Load it whole onto one device, or draft with "
            "'ngram' or another model."
        )


def mirrored(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same modules over the same parameters and buffers, with a configuration of its own.

    Hooks are left behind: they are their owner's business, and would be called for drafts.
    """
    refuse_spread(model)
    configs: dict[int, Any] = {}
    copy.deepcopy(model.config, configs)
    made: dict[int, Any] = {}
    return _mirror(model, made, configs)


def _mirror(part: nn.Module, made: dict[int, Any], configs: dict[int, Any]) -> Any:
    if id(part) in made:
        return made[id(part)]
    own = made[id(part)] = object.__new__(type(part))
    state = own.__dict__
    state.update(vars(part))
    for table in ("_parameters", "_buffers"):
        state[table] = dict(state[table])
    state.update({hooks: OrderedDict() for hooks in _HOOKS})
    state.pop("_compiled_call_impl", None)
    if type(part) is nn.Linear:
        state.pop("forward", None)  # a faster one, for as long as somebody generates
    state["_modules"] = {
        name: None if child is None else _mirror(child, made, configs) for name, child in part._modules.items()
    }
    for name, value in vars(part).items():
        if id(value) in configs and hasattr(value, "to_dict"):
            state[name] = configs[id(value)]
    return own


def named_weighted(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Every linear layer, plain or quantised, by its path; of layers with adapters the one that was there before."""
    found: dict[str, nn.Linear | Conv1D] = {}
    adapted: tuple[str, ...] = ()
    for path, part in model.named_modules():
        if type(part).__module__.startswith("peft."):
            adapted += (f"{path}.",)
        elif (type(part) in (nn.Linear, Conv1D) and is_dense(part.weight)) or is_quantised(part):
            if not path.startswith(adapted) or path.endswith(".base_layer"):
                found[path] = part
    return found


def weight_of(layer: nn.Linear | Conv1D) -> Tensor:
    """`[out, in]`, contiguous; a `Conv1D` holds it the other way round, a quantised layer in few bits."""
    if is_quantised(layer):
        return weight_of_quantised(layer)
    return (layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()).contiguous()


def device_of(layer: nn.Module) -> torch.device:
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def keep_layers(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave out all decoder layers but these, which go on reading the K/V of their own number.

    Raises:
        UnsupportedModelError: the model has no list of layers.
    """
    layers = decoder_layers(model)
    only = nn.ModuleList([layers[i] for i in kept]).train(layers.training)
    for parent in list(model.modules()):
        parent._modules.update({name: only for name, child in parent._modules.items() if child is layers})
    config = text_config(model)
    config.num_hidden_layers = len(kept)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        config.layer_types = [kinds[i] for i in kept]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of a model's layers.

    Raises:
        UnsupportedModelError: there is no such list.
    """
    count = int(text_config(model).num_hidden_layers)
    for part in model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise UnsupportedModelError(f"draft 'self:...': {type(model).__name__} has no list of its {count} layers")
