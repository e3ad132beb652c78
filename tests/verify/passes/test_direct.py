"""The direct pass: the bits of the model's own modules, and only where nobody changed them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from pkgutil import resolve_name
from typing import Any

import models
import pytest
import torch
from checker import Case, Drafting
from pass_history import history
from torch import Tensor, nn
from transformers import AttentionInterface

import specdec
from specdec.kv import SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify.attention.register import attention_of
from specdec.verify.passes.forward import Forward, observing
from specdec.verify.passes.parameters import Parameters

DIRECT = [
    "llama-mha", "llama-gqa", "llama-mqa", "llama-tied", "llama-bias", "llama-rope-linear", "llama-rope-dynamic",
    "llama-rope-llama3", "llama-rope-yarn", "llama-past-maximum", "qwen2", "qwen3", "mistral", "mistral-window",
    "qwen2-mixed-window", "gemma", "gemma3-mixed", "phi3", "phi3-longrope", "granite", "smollm3",
]  # fmt: skip
MODULES = ["gpt2", "gpt-neox"]


def goes_direct(forward: Forward) -> bool:
    direct: Any = forward.runners[1]
    return direct.parameters is not None


def passes(model: Any, direct: bool, lengths: Sequence[int] = (7, 3)) -> list[Tensor]:
    """The history's logits and K/V, straight over the parameters or through the modules."""
    cache = SharedKVCache({"target": num_cache_layers(model)}, len(lengths), capacity=4)
    forward = Forward(model, "target")
    with torch.no_grad(), forward.prepared() if direct else attention_of(model):
        assert goes_direct(forward) == direct
        return history(forward, cache, lengths)


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("family", DIRECT)
def test_bits_are_those_of_the_modules(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)
    model = models.target(family, dtype)
    for lengths in ((7, 3), (4,)):
        ours, theirs = passes(model, True, lengths), passes(model, False, lengths)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_angles_outgrow_their_first_table() -> None:
    model = models.target("llama-gqa", "fp64")
    text = torch.randint(3, models.VOCAB, (1, 700), generator=torch.Generator().manual_seed(0))
    out = []
    for direct in (True, False):
        cache = SharedKVCache({"target": 2}, 1)
        forward = Forward(model, "target")
        with torch.no_grad(), forward.prepared() if direct else attention_of(model):
            for start in range(0, 700, 100):
                logits = forward.causal(cache, text[:, start : start + 100], [start], None, keep=0).logits
        out.append(logits)
    assert torch.equal(out[0], out[1])


def test_the_table_of_angles_holds_every_position_asked_for() -> None:
    """One too few would be an address behind its end for the native pass."""
    direct = Parameters.of(models.target("llama-gqa"))
    assert direct is not None
    for count in (1, 512, 513, 1026, 1027, 2055):
        assert len(direct.angles.table(direct.embed, count)) >= count


@pytest.mark.parametrize("family", MODULES)
def test_other_families_go_through_their_modules(family: str) -> None:
    forward = Forward(models.target(family), "target")
    with forward.prepared():
        assert not goes_direct(forward)


class Adapter(nn.Linear):
    """A subclass such as quantisers and adapters put in place of a layer."""


class Quantised(Tensor):
    """What quantisers put in place of a weight."""


def _hooked(name: str, kind: str) -> Callable[[Any], Any]:
    return lambda model: getattr(model.get_submodule(name), kind)(lambda *args: None)


def _trained(model: Any, name: str, value: float) -> None:
    layer = model.model.layers[1]
    setattr(layer.self_attn if name == "attention_dropout" else layer, name, value)
    assert Parameters.of(model) is not None, "in evaluation mode it changes nothing"
    model.train()


def _patched(model: Any) -> None:
    layer = model.model.layers[1].mlp
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)


def _adapted(model: Any) -> None:
    old = model.model.layers[0].mlp.up_proj
    model.model.layers[0].mlp.up_proj = Adapter(old.in_features, old.out_features, bias=False)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "dropout": lambda model: _trained(model, "attention_dropout", 0.1),
    "checkpoints": lambda model: _trained(model, "gradient_checkpointing", True),
    "hook": _hooked("model.layers.1.mlp.down_proj", "register_forward_hook"),
    "pre-hook": _hooked("", "register_forward_pre_hook"),
    "patched forward": _patched,
    "adapter": _adapted,
    "mixed dtypes": lambda model: model.lm_head.float(),
    "a weight that is no plain tensor": lambda model: setattr(
        model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().as_subclass(Quantised))
    ),
    "another norm": lambda model: setattr(model.model, "norm", nn.RMSNorm(32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_keeps_its_changes(change: str) -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa"))
    assert Parameters.of(model) is not None
    CHANGES[change](model)
    assert Parameters.of(model) is None


def test_eager_attention_and_global_hooks_are_kept() -> None:
    assert Parameters.of(models.target("llama-gqa", attention="eager")) is None
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert Parameters.of(models.target("llama-gqa")) is None
    finally:
        handle.remove()


@pytest.mark.parametrize("where", ["LlamaAttention.forward", "LlamaRMSNorm.forward", "apply_rotary_pos_emb"])
def test_a_family_patched_as_a_whole_keeps_its_patch(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.target("llama-gqa")
    assert Parameters.of(model) is not None
    monkeypatch.setattr(f"transformers.models.llama.modeling_llama.{where}", lambda *args, **kwargs: None)
    assert Parameters.of(model) is None


@pytest.mark.parametrize(
    "where",
    [
        "transformers.models.llama.modeling_llama.LlamaMLP.forward",
        "torch.nn.Linear.forward",
        "torch.nn.Embedding.forward",
    ],
)
def test_a_patch_that_looks_like_the_original_is_noticed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """functools.wraps copies module and name."""
    original = resolve_name(where)

    @wraps(original)
    def doubled(*args: Any) -> Any:
        return 2 * original(*args)

    monkeypatch.setattr(where, doubled)
    assert Parameters.of(models.target("llama-gqa")) is None


def test_another_function_under_the_usual_name_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = AttentionInterface._global_mapping
    monkeypatch.setitem(mapping, "sdpa", lambda *args, **kwargs: mapping["eager"](*args, **kwargs))
    model = models.target("llama-gqa")
    assert Parameters.of(model) is None
    with attention_of(model) as used:
        assert used == "sdpa"


def test_autocast_goes_through_the_modules() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert Parameters.of(models.target("llama-gqa", "fp32")) is None


def test_a_hook_of_the_user_sees_every_pass_of_the_target() -> None:
    """Whoever looks into the model with hooks must find there what plain generate would have run."""
    model: Any = copy.deepcopy(models.target("llama-gqa"))
    seen: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda *args: seen.append(1))
    spec = specdec.Speculator(model, models.draft("near", "llama-gqa"), k=2)
    spec.generate(models.prompts((5,), models.VOCAB, 0)[0], max_new_tokens=8, do_sample=False)
    assert spec.report is not None
    assert len(seen) >= spec.report.num_steps


def test_the_modules_of_a_stock_model_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = models.target("llama-gqa")
    case = Case("llama-gqa", "fp64", (7, 3), Drafting("chain", k=3), 8)
    spec = case.drafting.speculator(model, case.family, case.dtype, case.seed)
    ids, mask = models.prompts((7, 3), models.VOCAB, 0)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a module was called")

    attention = type(model.model.layers[0].self_attn)
    monkeypatch.setattr("specdec.verify.stock.original", lambda function: True)  # else the patch would be kept
    monkeypatch.setattr(attention, "forward", refuse)
    out = spec.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("hooked", [False, True])
def test_observers_hear_of_every_pass(hooked: bool) -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa"))
    handle = model.register_forward_hook(lambda *args: None) if hooked else nullcontext()
    heard: list[tuple[Any, float]] = []
    spec = specdec.Speculator(model)
    ids = models.prompts((5,), models.VOCAB, 0)[0]
    with observing(lambda used, seconds: heard.append((used, seconds))), handle:
        spec.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert len(heard) == 6  # one pass a token, the first one over the prompt
    assert all(used is model and seconds > 0 for used, seconds in heard)
    spec.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert len(heard) == 6


@pytest.mark.parametrize("pre", [False, True])
def test_a_hook_put_on_the_model_during_a_call_is_called_from_then_on(pre: bool) -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa"))
    ids = models.prompts((7,), models.VOCAB, 1)[0]
    wanted = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)
    seen: list[int] = []
    steps: list[int] = []
    handles: list[Any] = []

    def look(*_: Any) -> None:
        seen.append(len(steps))

    def register(trace: Any) -> None:
        steps.append(trace.step)
        if len(steps) == 2:
            part = model.model.layers[1].mlp
            handles.append(part.register_forward_pre_hook(look) if pre else part.register_forward_hook(look))

    out = specdec.Speculator(model, "ngram", k=2).generate(
        ids, max_new_tokens=16, do_sample=False, eos_token_id=None, on_step=register
    )
    assert torch.equal(out, wanted)  # type: ignore[arg-type]
    assert len(steps) > 3
    assert seen == list(range(2, len(steps)))


def test_a_model_that_was_asked_for_hidden_states_is_still_a_stock_one() -> None:
    """transformers leaves its collecting hooks on every layer; a hook of the user's beside them still counts."""
    model: Any = copy.deepcopy(models.target("llama-gqa"))
    with torch.no_grad():
        model(models.prompts((5,), models.VOCAB, 0)[0], output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks, "no longer so? then this test and its reason can go"
    own: Any = Parameters.of(model)
    before = own.hooked
    model.model.layers[1].register_forward_hook(lambda *args: None)
    assert (before, own.hooked) == (False, True)
    assert Parameters.of(model) is None
