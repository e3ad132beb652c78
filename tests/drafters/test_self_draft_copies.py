"""Lean copies of a target: what they share with it, what they take, when they are made again, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import nn

from specdec import Speculator, UnsupportedArgumentError, UnsupportedModelError
from specdec.drafters.self_draft import SelfDrafter
from specdec.drafters.self_draft import lean as lean_module
from specdec.drafters.self_draft.calibration import Inputs, fit_in_order, own_texts
from specdec.drafters.self_draft.forms import Form
from specdec.drafters.self_draft.gptq import gptq
from specdec.drafters.self_draft.lean import LeanCopy
from specdec.verify.kept import kept_files
from specdec.verify.packed import Packed, PackedLinear
from specdec.verify.weights import fingerprint

TEXTS = list(models.prompts((24, 24), models.VOCAB, 9)[0])


def fresh(**sizes: Any) -> Any:
    return models.llama(hidden=64, layers=3, num_key_value_heads=2, **sizes)


def made(target: Any, form: str) -> LeanCopy:
    return LeanCopy(target, Form.parse(form), TEXTS)


def test_embeddings_and_norms_are_the_targets_and_int8_takes_a_quarter() -> None:
    target = fresh()
    own = made(target, "int8")
    names = dict(target.named_parameters())
    for name, parameter in own.model.named_parameters():
        assert parameter is names[name]
    weights = sum(part.weight.nbytes for part in target.modules() if isinstance(part, nn.Linear))
    assert own.num_bytes <= 0.28 * weights  # 8 bits a number, and a scale for every 64
    layers = [part for part in own.model.modules() if isinstance(part, PackedLinear)]
    assert len(layers) == 3 * 7 + 1
    assert not any(isinstance(part, PackedLinear) for part in target.modules())


def test_layers_that_are_left_out_take_nothing_and_the_rest_keep_their_numbers() -> None:
    target = fresh()
    for form, kept in {"exit2": [0, 1], "skip1": [0, 2], "skip0-1": [2], "skip0,2": [1]}.items():
        own = made(target, form)
        assert own.num_bytes == 0
        inner: Any = own.model.model
        assert [layer.self_attn.layer_idx for layer in inner.layers] == kept
        assert own.model.config.num_hidden_layers == len(kept)
    assert target.config.num_hidden_layers == 3


def test_hot_keeps_the_neurons_that_matter_and_wanda_prunes_every_row() -> None:
    target = fresh()
    with torch.no_grad():
        target.model.layers[1].mlp.down_proj.weight[:, 5] *= 100
        target.model.layers[1].mlp.down_proj.weight[:, 6] = 0
    own: Any = made(target, "hot25").model
    mlp = own.model.layers[1].mlp
    assert mlp.gate_proj.weight.shape == mlp.up_proj.weight.shape == (12, 64)
    rows = target.model.layers[1].mlp.gate_proj.weight
    assert (mlp.gate_proj.weight == rows[5]).all(1).any()
    assert not (mlp.gate_proj.weight == rows[6]).all(1).any()
    pruned: Any = made(target, "wanda50").model
    for path, part in target.model.layers.named_modules():
        if isinstance(part, nn.Linear):
            weight = pruned.model.layers.get_submodule(path).weight
            assert ((weight == 0).sum(1) >= part.in_features // 2).all()
            assert ((weight == part.weight) | (weight == 0)).all()


def test_four_bits_by_gptq_err_less_on_their_inputs_than_by_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 96, generator=generator)
    mixed = torch.randn(96, 96, generator=generator) / 10
    x = torch.randn(300, 96, generator=generator) @ mixed
    error = {}
    for name, packed in {
        "rounded": Packed.rounded(weight, 4, 64, symmetric=False),
        "gptq": gptq(weight, Inputs(x), 4, 64),
    }.items():
        error[name] = float((x @ (packed.dequantized() - weight).t()).square().mean())
        assert packed.shape == weight.shape
    assert error["gptq"] < 0.6 * error["rounded"]


def test_outer_layers_and_the_head_keep_eight_bits() -> None:
    target = models.llama(hidden=32, layers=8, num_key_value_heads=2)
    layers: Any = made(target, "int4").model
    bits = [layer.mlp.up_proj.bits for layer in layers.model.layers]
    assert bits == [8, 4, 4, 4, 4, 4, 4, 8]
    assert layers.lm_head.bits == 8


@pytest.mark.parametrize(("changed", "same"), [("k_proj", True), ("v_proj", True), ("q_proj", False)])
def test_layers_are_fitted_beside_the_targets_own_keys_and_values(changed: str, same: bool) -> None:
    def inputs(changes: dict[str, Any]) -> Any:
        model: Any = fresh()
        found: list[Any] = []
        fits: dict[nn.Module, Any] = {model.model.layers[2].mlp.up_proj: lambda given: found.append(given.tokens)}
        attention = model.model.layers[0].self_attn
        fits.update({getattr(attention, name): lambda _, weight=weight: weight for name, weight in changes.items()})
        fit_in_order(model, TEXTS, fits)
        return found[0]

    attention: Any = fresh().model.layers[0].self_attn
    other = torch.randn(getattr(attention, changed).weight.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(inputs({}), inputs({changed: other})) is same
    assert len(inputs({})) == sum(map(len, TEXTS))  # of the copy's stream alone


def test_a_model_writes_the_same_texts_every_time() -> None:
    target = fresh()
    state = torch.random.get_rng_state()
    first = own_texts(target)
    assert torch.equal(first, own_texts(target))
    assert torch.equal(state, torch.random.get_rng_state())
    assert len({tuple(text) for text in first.tolist()}) == len(first)


@pytest.mark.parametrize("form", ["int8", "int4", "exit2", "hot50", "wanda50"])
def test_a_copy_follows_the_targets_weights(form: str) -> None:
    target = fresh()
    spec: Any = Speculator(target, SelfDrafter(target, form, k=3, calibration=TEXTS))
    ids, mask = models.prompts((7,), models.VOCAB, 2)
    drafter = spec.drafter.inner
    spec.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert drafter.copy.num_made == 1
    other = models.llama(seed=5, hidden=64, layers=3, num_key_value_heads=2)
    target.load_state_dict(other.state_dict())
    out = spec.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(out, target.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    assert drafter.copy.num_made == 2
    again = made(target, form).model if form in ("int8", "exit2") else None
    if again is not None:
        with torch.no_grad():
            assert torch.equal(again(input_ids=ids).logits, drafter.model(input_ids=ids).logits)
    spec.generate(ids, attention_mask=mask, max_new_tokens=12)
    assert drafter.copy.num_made == 2


def test_hooks_on_the_target_do_not_hear_of_drafts() -> None:
    target = fresh()
    heard: list[int] = []
    target.lm_head.register_forward_hook(lambda *_: heard.append(1))
    drafter = SelfDrafter(target, "int8", k=3)
    with torch.no_grad():
        drafter.model(input_ids=torch.tensor([[3, 4]]))
    assert not heard


def test_the_packed_copy_is_found_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    target = fresh()
    first = made(target, "int4").model
    (kept,) = kept_files(tmp_path / "cache")
    assert kept.what == "packed copy"
    monkeypatch.setattr(lean_module, "gptq", lambda *_: pytest.fail("calibrated again"))
    second = made(target, "int4").model
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    kept.path.write_bytes(b"\x00" * 7)  # no good: made anew
    monkeypatch.undo()
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    third = made(target, "int4").model
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, third(input_ids=ids).logits)
        target.lm_head.weight += 0.1
    made(target, "int4")
    assert len(kept_files(tmp_path / "cache")) == 2


def test_a_target_that_differs_in_a_single_number_has_a_stored_copy_of_its_own() -> None:
    target, other = fresh(), fresh()
    assert fingerprint(target, whole=True) == fingerprint(other, whole=True)
    with torch.no_grad():  # the second number of a row: beside those that a quick look takes
        other.model.layers[1].mlp.up_proj.weight[0, 1] += 0.5
    assert fingerprint(target) == fingerprint(other)  # the control
    assert fingerprint(target, whole=True) != fingerprint(other, whole=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("self:int3", "'self:int8' and 'self:int4'"),
        ("self:", "'self:exit8'"),
        ("self:exit0", "between 1 and 2 layers"),
        ("self:exit3", "between 1 and 2 layers"),
        ("self:skip3", "layers 0 to 2"),
        ("self:skip0-2", "not all of them"),
        ("self:skip2-", "layers such as"),
        ("self:skip2-1", "lower layer first"),
        ("self:hot0", "between 1 and 99 percent"),
        ("self:wanda100", "between 1 and 99 percent"),
    ],
)
def test_what_is_no_form_is_refused_with_what_is(name: str, words: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=words):
        Speculator(fresh(), name)


def test_a_model_that_samples_no_texts_is_refused_by_name() -> None:
    target = fresh()
    with torch.no_grad():
        target.model.embed_tokens.weight[models.BOS] = float("nan")
    with pytest.raises(UnsupportedArgumentError, match=r"NaN in its logits.*calibration="):
        SelfDrafter(target, "hot50")
    assert SelfDrafter(target, "hot50", calibration=TEXTS).copy.num_made == 1


def test_what_does_not_fit_together_is_refused() -> None:
    target = fresh()
    with pytest.raises(UnsupportedArgumentError, match="one model among several drafters"):
        Speculator(target, ["self:int8", copy.deepcopy(target)])
    with pytest.raises(UnsupportedArgumentError, match="each int64"):
        SelfDrafter(target, "int4", calibration=[])
    with pytest.raises(UnsupportedModelError, match=r"MLPs of gate_proj, up_proj, down_proj"):
        SelfDrafter(models.target("gpt2"), "hot30")
    spread = fresh()
    spread.lm_head._hf_hook = object()
    with pytest.raises(UnsupportedModelError, match="spread over devices"):
        SelfDrafter(spread)
