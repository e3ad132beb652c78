"""Float weights that lie on a grid of few bits are read packed: with the same bits, for as long as they lie there."""

from __future__ import annotations

import copy
import gc
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import packed_models
import pytest
import torch
from pass_history import history
from test_native import bits_depend_on_the_text_alone, caches
from test_native import pytestmark as pytestmark
from torch import Tensor
from ways import forward_by, native_of

from specdec import Speculator
from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.native import build, library
from specdec.verify.packed import Packed
from specdec.verify.passes import native, packed_copies
from specdec.verify.passes.parameters import Parameters

SIZES: dict[str, dict[str, int]] = {
    "whole vectors": dict(hidden=96, intermediate_size=160, heads=4, head_dim=16),
    "tails": dict(hidden=72, intermediate_size=83, heads=2, head_dim=34),
}


def on_grids(sizes: str = "whole vectors", layers: int = 2) -> Any:
    """float32, layer by layer on grids of other kinds; the head is on none."""
    model: Any = models.llama(layers=layers, **SIZES[sizes])
    generator = torch.Generator().manual_seed(0)
    for number, layer in enumerate(model.model.layers):
        for name, part in layer.named_modules():
            if isinstance(part, torch.nn.Linear):
                with torch.no_grad():
                    part.weight.copy_(grid(part.weight.shape, 8 if number or "v_proj" in name else 4, generator))
    return model


def grid(shape: Any, bits: int, generator: torch.Generator) -> Tensor:
    """Q8_0 or Q4_1."""
    out, width = shape
    groups = -(-width // 32)
    codes = torch.randint(-127, 128, (out, groups, 32), generator=generator)
    codes[..., 0] = 127
    scales = (torch.rand(out, groups, 1, generator=generator) / 500).half().float()
    weight = scales * codes
    if bits == 4:
        codes = torch.randint(0, 16, (out, groups, 32), generator=generator)
        codes[..., 0], codes[..., 1] = 0, 15
        weight = 30 * scales
        weight = weight.half().float() * codes - (200 * scales).half().float()
    return weight.flatten(1)[:, :width]


def copies_of(model: Any) -> Any:
    own = Parameters.of(model)
    assert own is not None
    return packed_copies.packed_copies(model, own)


def run(model: Any, lengths: tuple[int, ...] = (7, 3, 5)) -> list[Tensor]:
    return history(forward_by(model, "native"), next(caches(model, len(lengths))), lengths)


def reads_the_same(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_grids(sizes)
    assert len(copies_of(model)) == 7 * len(model.model.layers)
    packed = run(model)
    monkeypatch.setenv(packed_copies.VARIABLE, "0")
    assert not copies_of(model)
    assert all(torch.equal(a, b) for a, b in zip(packed, run(model), strict=True))
    monkeypatch.delenv(packed_copies.VARIABLE)


@pytest.mark.parametrize("sizes", SIZES)
def test_packed_and_not_passes_give_the_same_bits(sizes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reads_the_same(sizes, monkeypatch)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="processors of the x86 kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_on_processors_with_other_vectors(processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = library._load(build.compiled(tmp_path, processor))
    monkeypatch.setattr(native, "library", lambda: other)
    for sizes in SIZES:
        reads_the_same(sizes, monkeypatch)


def test_the_copies_are_what_is_read() -> None:
    """Another scale in a copy is another model."""
    model = on_grids()
    before = run(model)
    next(iter(copies_of(model).values())).scales[3] *= 1.5
    assert not all(torch.equal(a, b) for a, b in zip(before, run(model), strict=True))


def test_a_tokens_bits_depend_on_its_text_alone() -> None:
    bits_depend_on_the_text_alone(on_grids())


def _step(model: Any) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], 0.1).step()


def _loaded(model: Any) -> None:
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})


def _merged(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.weight.data += 0.01


def _row(model: Any) -> None:
    model.model.layers[0].mlp.gate_proj.weight.data[3] += 0.01


def _number(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] += 0.01


def _column(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.weight.data[:, 7] += 0.01


def _exchanged(model: Any) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.01)


@pytest.mark.parametrize("change", [_step, _loaded, _merged, _exchanged, _row, _column, _number])
def test_copies_of_weights_that_have_changed_are_dropped(change: Callable[[Any], None]) -> None:
    model = on_grids()
    before = run(model)
    assert copies_of(model)
    change(model)
    fresh = copy.deepcopy(model)
    after, wanted = run(model), run(fresh)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, wanted, strict=True))
    assert len(copies_of(model)) == len(copies_of(fresh)) < 14


def test_a_model_is_searched_once_and_trained_ones_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Tensor]()
    exactly = packed_copies.exactly

    def noting(weight: Tensor) -> Packed | None:
        asked.append(weight)
        return exactly(weight)

    monkeypatch.setattr(packed_copies, "exactly", noting)
    model = on_grids(layers=3)
    for _ in range(3):
        run(model)
    assert len(asked) == 3 * 7 + 1
    assert native_of(model) is not None
    plain: Any = models.llama(layers=3)
    asked.clear()
    for _ in range(3):
        run(plain)
        _step(plain)
    assert len(asked) == 2 * 7  # of the first layer and the one in the middle


def test_models_are_not_kept_alive() -> None:
    model = on_grids()
    run(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_float32_weights_have_copies(dtype: torch.dtype) -> None:
    assert not copies_of(packed_models.converted(on_grids(), dtype))


def test_texts_are_the_same_and_strict_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_grids()
    text = models.prompts((9,), model.config.vocab_size, 3)[0]
    for exactness in ("distribution", "strict"):
        texts = list[Any]()
        for asked in ("1", "0"):
            monkeypatch.setenv(packed_copies.VARIABLE, asked)
            speculator = Speculator(model, "ngram", exactness=exactness)
            texts.append(speculator.generate(text, max_new_tokens=20, do_sample=False))
        assert torch.equal(texts[0], texts[1])


def test_other_words_than_0_and_1_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packed_copies.VARIABLE, "yes")
    with pytest.raises(UnsupportedArgumentError, match=packed_copies.VARIABLE):
        copies_of(models.llama())
