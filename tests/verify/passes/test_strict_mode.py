"""Strict mode is refused where it cannot be promised: by name, or by a probe of this machine's kernels."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import transformers as tf
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import NgramDrafter
from specdec.kv import TargetFaultError, UnsupportedArgumentError, UnsupportedModelError
from specdec.verify import strict_mode
from specdec.verify.attention.blocks import BlockPlan
from specdec.verify.native.library import why_not
from specdec.verify.passes.base import Output
from specdec.verify.passes.native import NativePass
from specdec.verify.strict_mode import StrictMode

CPU = torch.device("cpu")


@pytest.fixture
def small() -> PreTrainedModel:
    """A model of its own, to be tampered with."""
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return models.build(tf.LlamaForCausalLM, config, torch.float32, seed=1, attention="sdpa")


def test_the_probe_refuses_kernels_that_depend_on_the_slot(small: Any) -> None:
    StrictMode(small).cost(CPU)

    def drift(module: Any, args: Any, out: Tensor) -> Tensor:
        return out * (1 + 1e-6 * torch.arange(out.shape[1])[:, None])

    small.model.layers[0].mlp.register_forward_hook(drift)
    with pytest.raises(UnsupportedModelError, match="same token has other logits"):
        StrictMode(small).cost(CPU)


def test_the_probe_refuses_kernels_that_depend_on_other_rows(small: Any) -> None:
    def mix(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + 1e-6 * out.mean(1, keepdim=True)

    small.model.layers[0].mlp.register_forward_hook(mix)
    with pytest.raises(UnsupportedModelError, match="same token has other logits"):
        StrictMode(small).cost(CPU)


def way(model: Any) -> str:
    (runner,) = StrictMode(model).forward("target").runners
    return runner.name


def test_a_model_with_a_native_pass_needs_no_padding(small: Any) -> None:
    assert (way(small) == "native") == (why_not() is None)
    assert way(small.double()) == "strict"


@pytest.mark.skipif(why_not() is not None, reason="no native pass")
def test_the_probe_refuses_native_passes_that_depend_on_the_slot(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    StrictMode(small).cost(CPU)
    real = NativePass.__call__

    def drift(self: NativePass, parts: Any) -> list[Output]:
        out = real(self, parts)[0].logits
        return [Output(None if out is None else out * (1 + 1e-6 * torch.arange(out.shape[1])[:, None]))]

    monkeypatch.setattr(NativePass, "__call__", drift)
    with pytest.raises(UnsupportedModelError, match="same token has other logits"):
        StrictMode(small).cost(CPU)


@pytest.mark.skipif(why_not() is not None, reason="no native pass")
def test_the_probe_refuses_native_passes_that_are_not_the_model(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = NativePass.__call__
    monkeypatch.setattr(
        NativePass, "__call__", lambda self, parts: [Output(own.logits.flip(-1)) for own in real(self, parts)]
    )
    with pytest.raises(UnsupportedModelError, match="does not reproduce"):
        StrictMode(small).cost(CPU)


@pytest.mark.skipif(why_not() is not None, reason="no native pass")
def test_a_hook_in_the_middle_of_a_native_call_ends_it(small: Any) -> None:
    """Through its modules the rest of the text would have other bits than the promise says."""

    def hook(trace: Any) -> None:
        if trace.step == 1:
            small.model.norm.register_forward_hook(lambda *args: None)

    ids = torch.tensor([[5, 6, 7]])
    spec = specdec.Speculator(small, exactness="strict")
    with pytest.raises(TargetFaultError, match="changed in the middle of a call"):
        spec.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None, on_step=hook)


def test_the_probe_refuses_an_attention_it_does_not_reproduce(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consistent but different formula: all bits agree with each other, none with the model."""
    monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)

    own = BlockPlan.attend
    monkeypatch.setattr(BlockPlan, "attend", lambda self, query, *rest: own(self, 9 * query, *rest))
    with pytest.raises(UnsupportedModelError, match="does not reproduce"):
        StrictMode(small).cost(CPU)


def test_the_probe_runs_once_per_setting(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = StrictMode(small)
    first = mode.cost(CPU)
    monkeypatch.setattr(strict_mode, "_Probe", None)
    assert mode.cost(CPU) is first


def test_what_cannot_be_promised_is_refused_by_name(small: Any) -> None:
    def refused(error: type[Exception], match: str, target: Any = small, **options: Any) -> None:
        with pytest.raises(error, match=match):
            specdec.Speculator(target, **options)

    refused(UnsupportedArgumentError, "'distribution' or 'strict'", exactness="exact")
    refused(UnsupportedArgumentError, "strict_width=4 needs", strict_width=4)
    refused(UnsupportedArgumentError, "at least 2", exactness="strict", strict_width=1)
    experts = tf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    refused(UnsupportedModelError, "experts", tf.MixtralForCausalLM(experts).eval(), exactness="strict")
    small.train()
    refused(UnsupportedModelError, "training mode", exactness="strict")
    small.eval()
    small.model._hf_hook = object()
    refused(UnsupportedModelError, "accelerate", exactness="strict")


def test_a_tree_wider_than_the_pass_is_an_error_not_another_width(small: Any) -> None:
    class Wide(NgramDrafter):
        def propose(self, budget: Any, uniforms: Any) -> Any:
            wide = type(budget)(budget.depths, 40)
            return super().propose(wide, uniforms)

    ids = torch.tensor([[5, 6, 7] * 20])
    spec = specdec.Speculator(small, Wide(k=30), exactness="strict")
    with pytest.warns(UserWarning, match="failed"):
        out: Any = spec.generate(input_ids=ids, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None)
    plain: Any = specdec.Speculator(small, exactness="strict").generate(
        input_ids=ids, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(out, plain)


def test_a_failing_target_is_reported_as_always(small: Any) -> None:
    spec = specdec.Speculator(small, exactness="strict")
    ids = torch.tensor([[5, 6, 7]])
    spec.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    with torch.no_grad():
        small.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TargetFaultError, match="NaN"):
        spec.generate(input_ids=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
