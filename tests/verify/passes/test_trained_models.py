"""A model in a trainer's hands keeps its fast passes where training mode changes no number."""

from __future__ import annotations

import copy
import functools
import os
import types
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch

import specdec
from specdec.verify.passes.parameters import Parameters
from specdec.verify.purity import callers_code

IDS = models.prompts((6,), models.VOCAB, 3)[0]
TRL = os.path.join("somewhere", "trl", "trainer", "utils.py")
FUSED = """
def add_fused_lm_head(model):
    original_forward = model.forward
    @functools.wraps(type(model).forward)
    def _fused_forward(self, *args, fused_lm_head=False, **kwargs):
        assert not fused_lm_head
        return original_forward(*args, **kwargs)
    model.forward = types.MethodType(_fused_forward, model)
"""
"""What TRL does to a model it trains, but for the loss (test_recipes.py has the real one)."""


def add_fused_head(model: Any, source: str = FUSED, home: str = TRL) -> None:
    names: dict[str, Any] = {"types": types, "functools": functools}
    exec(compile(source, home, "exec"), names)
    names["add_fused_lm_head"](model)


def in_training(model: Any) -> Any:
    model.train()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()  # as trainers do before they generate
    model.enable_input_require_grads()
    return model


def another_forward(model: Any) -> None:
    plain = type(model).forward

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        out.logits = -out.logits
        return out

    model.forward = types.MethodType(forward, model)
    add_fused_head(model)


OTHERS: dict[str, Callable[[Any], None]] = {
    "of another package": lambda model: add_fused_head(model, home=os.path.join("somewhere", "mine", "utils.py")),
    "by another name": lambda model: add_fused_head(model, FUSED.replace("_fused_forward", "_my_forward")),
    "around another forward": another_forward,
    "of another model": lambda model: setattr(model, "forward", fused_elsewhere()),
}


def fused_elsewhere() -> Any:
    other: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    add_fused_head(other)
    return other.forward


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trl_and_training_mode_change_nothing() -> None:
    model = in_training(copy.deepcopy(models.target("llama-gqa", "fp32")))
    assert Parameters.of(model) is not None
    add_fused_head(model)
    assert Parameters.of(model) is not None
    assert callers_code(model) is None
    compare(model)


@pytest.mark.parametrize("other", OTHERS)
def test_other_forwards_are_called(other: str) -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    OTHERS[other](model)
    assert Parameters.of(model) is None
    assert callers_code(model) == "another forward on LlamaForCausalLM"
    compare(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_checkpoints_leave_no_keys_to_verify_on() -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    model.gradient_checkpointing_enable()
    compare(model)  # in evaluation mode they are not made
    model.train()
    with pytest.raises(specdec.UnsupportedArgumentError, match=r"gradient checkpointing.* Call eval\(\)"):
        specdec.Speculator(model, "ngram", k=3).generate(IDS, max_new_tokens=2)
    model.gradient_checkpointing_disable()
    compare(model)


def compare(model: Any) -> None:
    found: Any = specdec.Speculator(model, "ngram", k=3).generate(IDS, max_new_tokens=12, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=12, do_sample=False))
