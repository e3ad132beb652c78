"""The model inside what users hold: with adapters, compiled, spread over devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from specdec.kv.errors import UnsupportedModelError
from specdec.kv.overlap import overlapping

_PER_TOKEN_ADAPTERS = {
    "ADALORA", "BOFT", "BONE", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR",
    "LORA", "MISS", "OFT", "RANDLORA", "ROAD", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""peft's adapters that live inside the model's own modules and see one token at a time."""


def unwrapped(model: object, role: str) -> object:
    """The model that `model.generate` runs, where `model` only wraps it; anything else as it is.

    A `PeftModel` becomes the model its adapters were put into, where they stay as they are: active, disabled, merged,
    switched later. What `torch.compile(model)` returns becomes the model that was compiled, which is also what its
    own `generate` runs.

    Args:
        role: "target" or "draft", for the message.

    Raises:
        UnsupportedModelError: adapters that need their wrapper (virtual tokens, activated LoRA, mixtures), and
            wrappers without `generate` (DataParallel, DistributedDataParallel), with what to pass instead.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        module = isinstance(inner, nn.Module)
        if not module:  # anything may claim to have any attribute
            _refuse_holders(inner, role)
            return inner
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif hasattr(inner, "peft_config") and hasattr(inner, "base_model"):
            _check_adapters(inner, role)
            inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner.base_model.model
        else:
            _refuse_holders(inner, role)
            return inner
    return inner


def carry_settings(given: Any, model: PreTrainedModel) -> None:
    """A generation config that was set on a wrapper becomes the model's, as a PeftModel's own `generate` has it.

    Raises:
        UnsupportedModelError: adapters were added since that need their wrapper.
    """
    while given is not model:
        if hasattr(given, "peft_config"):
            _check_adapters(given, "target")
        own = vars(given).get("generation_config") if hasattr(given, "__dict__") else None
        if own is not None:
            model.generation_config = own
            return
        given = getattr(given, "_orig_mod", model)


@contextmanager
def uncompiled(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block whatever `torch.compile` made of the model or of its modules runs as it was written: passes over
    drafts come in many shapes, each of which would be compiled."""
    if any(_is_compiled(part) for part in model.modules()):
        with overlapping("torch.compile", lambda: torch.compiler.set_stance("force_eager")):
            yield
    else:
        yield


def bytes_moved_by_a_pass(model: PreTrainedModel) -> int:
    """Bytes of weights that accelerate's hooks fetch in every pass, from memory or from disk (`device_map`); 0 where
    all weights stay where they are used."""
    if not hasattr(model, "_hf_hook"):
        return 0
    return sum(sum(map(_nbytes, _fetched(part, hook))) for part in model.modules() for hook in _hooks(part))


def _hooks(part: nn.Module) -> list[Any]:
    hook = vars(part).get("_hf_hook")
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _fetched(part: nn.Module, hook: Any) -> Iterator[torch.Tensor]:
    """The tensors of `part` that one of accelerate's hooks brings in before its forward and drops after it."""
    if getattr(hook, "offload", False):
        deep = hook.place_submodules
        yield from part.parameters(recurse=deep)
        if hook.offload_buffers:
            for owner in part.modules() if deep else [part]:
                yield from (own for name, own in owner._buffers.items()
                            if own is not None and name not in owner._non_persistent_buffers_set)  # fmt: skip


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_compiled(part: nn.Module) -> bool:
    own = vars(part)
    call, forward = own.get("_compiled_call_impl"), own.get("forward")
    return call is not None or "_orig_mod" in own or hasattr(forward, "_torchdynamo_orig_callable")


def _check_adapters(wrapper: Any, role: str) -> None:
    for name, config in wrapper.peft_config.items():
        kind = getattr(config, "peft_type", None)
        kind = str(getattr(kind, "value", kind))
        if kind in _PER_TOKEN_ADAPTERS and not getattr(config, "alora_invocation_tokens", None):
            continue
        what = "activated LoRA" if kind in _PER_TOKEN_ADAPTERS else kind
        raise UnsupportedModelError(
            f"{role}: expected adapters that work inside the model's modules, token by token (LoRA and its like), got "
            f"adapter {name!r} of type {what}, which needs its {type(wrapper).__name__} around every pass. Merge it "
            "where it can be (merge_and_unload()), or use plain generate."
        )


def _refuse_holders(holder: Any, role: str) -> None:
    for attribute in ("module", "model"):
        inner: Any = getattr(holder, attribute, None)
        while isinstance(inner, nn.Module) and hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        if isinstance(inner, PreTrainedModel) or (isinstance(inner, nn.Module) and hasattr(inner, "peft_config")):
            raise UnsupportedModelError(
                f"{role}: expected a transformers PreTrainedModel, got {type(holder).__name__}, which holds one: pass "
                f"its `.{attribute}`."
            )
