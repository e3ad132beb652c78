"""Weights in few bits: what the codes stand for, how far rounding may go, and layers that multiply with them."""

from __future__ import annotations

import copy
from typing import Any

import models
import packed_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_history import history
from torch import Tensor, nn

import specdec
from specdec.kv import SharedKVCache, UnsupportedArgumentError
from specdec.kv.support import num_cache_layers
from specdec.verify.packed import Packed, PackedLinear, rounded_activations
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.parameters import Parameters
from specdec.verify.weights import fingerprint


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_example_of_the_docstring() -> None:
    own = Packed.of(torch.tensor([[-3, 7]]), torch.tensor([[0.5]]), bits=4)
    assert own.dequantized().tolist() == [[-1.5, 3.5]]
    assert own.codes[0, :2].tolist() == [5 | 8 << 4, 15 | 8 << 4]


def test_nibbles_lie_as_in_gguf() -> None:
    codes = torch.arange(64)[None] % 16 - 8
    stored = Packed.of(codes, torch.ones(1, 2), bits=4, group=32).codes
    assert stored[0, :16].tolist() == [i | i << 4 for i in range(16)]
    assert Packed.of(codes, torch.ones(1, 2), bits=4, group=32).integers().tolist() == codes.tolist()


@settings(max_examples=80)
@given(
    out=st.integers(1, 9), width=st.integers(1, 200), bits=st.sampled_from([8, 4]),
    group=st.sampled_from([None, 32, 64, 96]), symmetric=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_rounding_errs_by_half_a_step_at_most(
    out: int, width: int, bits: int, group: int | None, symmetric: bool, seed: int
) -> None:
    weight = normal(out, width, seed=seed)
    own = Packed.rounded(weight, bits, group, symmetric)
    step = own.scales.repeat_interleave(own.group, 1)[:, :width]
    assert bool(((own.dequantized() - weight).abs() <= 0.5001 * step + 1e-6).all())
    if width > 1:  # all codes are used
        codes = own.integers().int()
        most = int(codes.abs().amax() if symmetric else -codes.amin())
        assert most == (127 if bits == 8 else 7) + (not symmetric)
    again = Packed.of(own.integers(), own.scales, own.offsets, bits=bits, group=group)
    assert torch.equal(again.codes, own.codes)


def test_what_fills_up_a_group_does_not_count() -> None:
    """All weights far from zero: a zero at the end would stretch the last group's codes to it."""
    own = Packed.rounded(10 + normal(3, 40).abs(), 4, 32, symmetric=False)
    assert own.scales[:, 1].max() < 0.5


def test_zeros_stay_zeros_and_sizes_add_up() -> None:
    for bits, symmetric in ((8, True), (4, True), (4, False)):
        own = Packed.rounded(torch.zeros(4, 64), bits, 64, symmetric)
        assert own.dequantized().abs().max() == 0
        assert own.num_bytes == 4 * (64 * bits // 8 + (4 if symmetric else 8))


def test_bad_input_is_refused() -> None:
    weight = normal(4, 96)
    with pytest.raises(UnsupportedArgumentError, match="expected 8 or 4, got 3"):
        Packed.rounded(weight, 3)
    with pytest.raises(UnsupportedArgumentError, match="a multiple of 32 below 96, or the whole row"):
        Packed.rounded(weight, 4, 48)
    for wrong in (weight[0], weight.long(), weight / 0):
        with pytest.raises(UnsupportedArgumentError, match="expected finite floats"):
            Packed.rounded(wrong)
    with pytest.raises(UnsupportedArgumentError, match="expected -8 to 7 with 4 bits, got 0 to 9"):
        Packed.of(torch.arange(10)[None], torch.ones(1, 1), bits=4)
    with pytest.raises(UnsupportedArgumentError, match=r"scales: expected .* shape \(4, 3\)"):
        Packed.of(torch.zeros(4, 96), torch.ones(4, 2), group=32)
    with pytest.raises(UnsupportedArgumentError, match=r"bias: expected shape \(4,\)"):
        PackedLinear(Packed.rounded(weight), torch.zeros(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_multiplies_with_the_dequantized_weight(dtype: torch.dtype, bias: bool) -> None:
    own, x = Packed.rounded(normal(32, 96), 4, 64, symmetric=False), normal(2, 3, 96, seed=1).to(dtype)
    given = normal(32, seed=2).to(dtype) if bias else None
    wanted = torch.nn.functional.linear(x, own.dequantized(dtype), given)
    assert torch.equal(PackedLinear(own, given)(x), wanted)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, None, True), (4, 32, True), (4, 64, False)])
def test_torchs_own_products_are_close(
    bits: int, group: int | None, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = PackedLinear(Packed.rounded(normal(64, 128), bits, group, symmetric), normal(64, seed=1))
    x = normal(2, 3, 128, seed=2)
    wanted = layer(x)
    layer.torch_products = True
    monkeypatch.delattr(Packed, "dequantized")  # so that it is torch's product
    found = layer(x)
    assert (found - wanted).abs().max() < 1e-4
    with torch.no_grad():
        layer.codes[5] = layer.codes[6]
    layer.to(torch.float32)  # drops what was made of the codes
    assert (layer(x)[..., 5] - wanted[..., 5]).abs().max() > 0.1


def test_a_format_that_torch_has_no_product_for_is_dequantized() -> None:
    layer = PackedLinear(Packed.rounded(normal(64, 96), 8, 32), torch_products=True)
    x = normal(3, 96, seed=2)
    assert torch.equal(layer(x), x @ layer.packed.dequantized().t())


def test_integer_products_round_activations() -> None:
    own, x = Packed.rounded(normal(32, 96), 8, 32), normal(3, 96, seed=1)
    layer = PackedLinear(own, integer=True)
    rounded = rounded_activations(x)
    steps = x.unflatten(1, (3, 32)).abs().amax(2) / 127
    assert bool(((rounded - x).unflatten(1, (3, 32)).abs() <= 0.501 * steps[..., None]).all())
    assert torch.equal(layer(x), rounded @ own.dequantized().t())
    assert torch.equal(rounded_activations(x[1:2]), rounded[1:2])


def test_a_change_of_dtype_leaves_the_scales_alone() -> None:
    layer = PackedLinear(Packed.rounded(normal(8, 64), 4, 32, False), normal(8))
    before = layer.packed.dequantized()
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.packed.dequantized(), before)
    again = PackedLinear(Packed.rounded(normal(8, 64, seed=5), 4, 32, False), normal(8))
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.packed.dequantized(), before)
    assert "4 bits, group 32" in repr(copy.deepcopy(again))


def passes(model: Any) -> list[Tensor]:
    cache = SharedKVCache({"target": num_cache_layers(model)}, 2, capacity=4)
    forward = Forward(model, "target")
    with torch.no_grad(), forward.prepared():
        return history(forward, cache, (7, 3))


@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "llama-bias", "qwen3"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_packed_model_computes_what_its_numbers_say(family: str, dtype: str) -> None:
    """Straight over the parameters, which is possible; and not by what is left of the layers' weights."""
    model = packed_models.target(family, dtype, bits=4, symmetric=False)
    assert Parameters.of(model) is not None
    wanted = passes(packed_models.dequantized(model))
    tolerance = 1e-4 if dtype == "fp32" else 0.1
    pairs = zip(passes(model), wanted, strict=True)
    assert all((a - b).float().norm() <= tolerance * b.float().norm() for a, b in pairs)
    pairs = zip(passes(models.target(family, dtype)), wanted, strict=True)
    assert any((a - b).float().norm() > tolerance * b.float().norm() for a, b in pairs)


def test_text_is_that_of_plain_generate() -> None:
    model: Any = packed_models.target("llama-gqa", "fp64")
    ids, mask = models.prompts((7, 3), models.VOCAB, 0)
    options: dict[str, Any] = dict(attention_mask=mask, max_new_tokens=12, do_sample=False)
    spec: Any = specdec.Speculator(model, "ngram", k=3)
    assert torch.equal(spec.generate(ids, **options), model.generate(ids, **options))


def test_hooks_and_patches_of_packed_layers_are_kept() -> None:
    model: Any = packed_models.target("llama-gqa")
    layer = model.model.layers[1].mlp.up_proj
    handle = layer.register_forward_hook(lambda *args: None)
    assert Parameters.of(model) is None
    handle.remove()
    assert Parameters.of(model) is not None
    layer.forward = lambda x: 2 * PackedLinear.forward(layer, x)
    assert Parameters.of(model) is None


def test_layers_that_do_not_fit_together_are_left_to_the_modules() -> None:
    model: Any = packed_models.target("llama-gqa")
    model.model.layers[1].mlp.up_proj = PackedLinear(Packed.rounded(normal(48, 64)))
    assert Parameters.of(model) is None


def test_fingerprints_read_the_codes() -> None:
    one, other = packed_models.target("llama-gqa"), packed_models.target("llama-gqa")
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.lm_head.codes += 1
    assert fingerprint(one) != fingerprint(other)
    assert isinstance(one.lm_head, nn.Module)
