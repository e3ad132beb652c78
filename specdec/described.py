"""Models and drafters in a few words, for `repr`."""

from __future__ import annotations

from typing import Any

from specdec.drafters import Drafter, SelfDrafter
from specdec.planner.options import Options


def model_words(model: Any) -> str:
    """E.g. "LlamaForCausalLM of 12.3M parameters, float32 on cpu"."""
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e6 else str(count)
    return f"{type(model).__name__} of {size} parameters, {str(model.dtype).removeprefix('torch.')} on {model.device}"


def drafter_words(drafter: Drafter | None) -> str:
    """E.g. "model+ngram, planned step by step"; "ngram, up to 10 tokens a step"."""
    if drafter is None:
        return "none (plain decoding)"
    if isinstance(drafter, Options):
        return f"{drafter.name}, planned step by step"
    tree = f" in {drafter.max_depth} levels" if drafter.max_nodes > drafter.max_depth else ""
    if isinstance(drafter, SelfDrafter):
        size = f"{drafter.copy.num_bytes / 1e6:.1f} MB more" if drafter.copy.num_bytes else "no memory more"
        return f"{drafter.name} ({drafter.form.words}, {size}), up to {drafter.max_nodes} tokens a step{tree}"
    model = getattr(drafter, "model", None)
    name = drafter.name if model is None else f"{drafter.name} ({model_words(model)})"
    return f"{name}, up to {drafter.max_nodes} tokens a step{tree}"
