"""Native passes over weights in bfloat16, float16 and few bits: whose numbers they compute, and with which rounding."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import packed_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_history import history
from test_native import bits_depend_on_the_text_alone, caches, error
from test_native import pytestmark as pytestmark
from torch import Tensor
from ways import forward_by, native_of

from specdec.kv import SharedKVCache
from specdec.verify.native import build, library
from specdec.verify.packed import PackedLinear
from specdec.verify.passes import native

FORMATS: dict[str, Callable[[str], Any]] = {
    "bf16": lambda family: models.target(family, "bf16"),
    "fp16": lambda family: models.target(family, "fp16"),
    "int8": lambda family: packed_models.target(family, bits=8),
    "int8 with offsets": lambda family: packed_models.target(family, bits=8, symmetric=False),
    "int4": lambda family: packed_models.target(family, bits=4, symmetric=False),
    "int8 of bf16": lambda family: packed_models.target(family, "bf16", bits=8, group=None),
    "int8 integers": lambda family: packed_models.target(family, bits=8, integer=True),
    "int4 integers": lambda family: packed_models.target(family, bits=4, symmetric=False, integer=True),
}


def run(model: Any, way: str = "native", lengths: tuple[int, ...] = (7, 3, 5)) -> list[Tensor]:
    return history(forward_by(model, way), next(caches(model, len(lengths))), lengths)


@pytest.mark.parametrize("name", FORMATS)
def test_a_tokens_bits_depend_on_its_text_alone(name: str) -> None:
    bits_depend_on_the_text_alone(FORMATS[name]("llama-gqa"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-tied", "llama-bias", "qwen2", "qwen3", "llama-rope-dynamic"])
def test_no_further_from_exact_numbers_than_torch(family: str, dtype: str) -> None:
    model = models.target(family, dtype)
    wanted = run(packed_models.converted(model, torch.float64), "direct")
    torchs, found = run(model, "direct"), run(model)
    assert all(a.dtype == b.dtype for a, b in zip(found, torchs, strict=True))
    assert error(found, wanted) < 1.5 * error(torchs, wanted) + 1e-3


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["llama-gqa", "llama-bias", "qwen3"])
def test_states_are_rounded_where_the_modules_round(family: str, dtype: str) -> None:
    """Then almost all numbers of the first layer's K/V are those of the modules, bit for bit; later sums of other
    orders have left their traces."""
    model = models.target(family, dtype)
    text = models.prompts((30,), models.target(family).config.vocab_size, 3)[0]
    states = []
    for way in ("native", "direct"):
        cache = SharedKVCache({"target": model.config.num_hidden_layers}, 1)
        with torch.no_grad():
            forward_by(model, way).causal(cache, text, [0], None, keep=1)
        cache.set_length(0, 30)
        states.append(torch.cat([one.flatten() for one in next(iter(cache.layers("target", 0)))]))
    assert float((states[0] == states[1]).float().mean()) > 0.98


def test_every_number_of_two_bytes_is_read_as_what_it_is() -> None:
    """All 65536, subnormal ones, infinities and NaN included: as embeddings, the states that enter the first layer."""
    for dtype in (torch.bfloat16, torch.float16):
        model: Any = packed_models.converted(models.llama(vocab=2048, hidden=32, heads=2), dtype)
        every = torch.arange(65536).to(torch.uint16).view(dtype).view(2048, 32)
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(every)
            forward, cache = forward_by(model, "native"), next(caches(model, 1))
            forward.features = (0,)
            found = forward.causal(cache, torch.arange(2048)[None], [0], None, keep=1).features[0][0]
        assert torch.equal(found.nan_to_num(7.5), every.nan_to_num(7.5))
        assert torch.equal(found.isnan(), every.isnan())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 64, None])
def test_symmetric_codes_are_multiplied_like_the_numbers_they_stand_for(bits: int, group: int | None) -> None:
    """Bit for bit in rows of whole vectors: an unpacked number is rounded once, as is the number that it stands for."""
    model = packed_models.packed(models.llama(hidden=96, intermediate_size=80, heads=4, head_dim=16), bits, group)
    assert native_of(model) is not None
    pairs = zip(run(model), run(packed_models.dequantized(model)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@settings(max_examples=40)
@given(
    hidden=st.sampled_from([12, 36, 72, 96, 136]),
    inner=st.integers(3, 170),
    bits=st.sampled_from([8, 4]),
    group=st.sampled_from([32, 64, 96, None]),
    symmetric=st.booleans(),
    integer=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_size_and_group(
    hidden: int, inner: int, bits: int, group: int | None, symmetric: bool, integer: bool, seed: int
) -> None:
    model = models.llama(hidden=hidden, intermediate_size=inner, heads=2, head_dim=10, layers=1, seed=seed)
    own = packed_models.packed(model, bits, group, symmetric, integer=integer)
    # A number in the middle between two codes may be rounded to either.
    assert error(run(own, lengths=(7, 3)), run(own, "direct", lengths=(7, 3))) < (0.02 if integer else 3e-5)


def test_the_comparison_sees_a_single_wrong_scale() -> None:
    for integer in (False, True):
        model: Any = packed_models.target("llama-gqa", bits=4, integer=integer)
        wanted = run(model)
        layer: PackedLinear = model.model.layers[1].self_attn.v_proj
        with torch.no_grad():
            layer.scales[3, 0] *= 1.3
        assert error(run(model), wanted) > 0.03


def test_integer_products_round_their_tokens() -> None:
    model = packed_models.target("llama-gqa", integer=True)
    assert 1e-4 < error(run(model), run(packed_models.target("llama-gqa"))) < 0.1


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="processors of the x86 kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_on_processors_with_other_vectors(processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = library._load(build.compiled(tmp_path, processor))
    wanted = {name: run(make("qwen3")) for name, make in FORMATS.items()}
    monkeypatch.setattr(native, "library", lambda: other)
    for name, make in FORMATS.items():
        assert error(run(make("qwen3")), wanted[name]) < (0.1 if "bf16" in name else 0.02), name
    test_every_number_of_two_bytes_is_read_as_what_it_is()
    test_symmetric_codes_are_multiplied_like_the_numbers_they_stand_for(4, 32)
    test_every_size_and_group()
    test_a_tokens_bits_depend_on_its_text_alone("bf16")
    test_a_tokens_bits_depend_on_its_text_alone("int4 integers")
