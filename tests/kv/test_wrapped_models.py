"""Models as users hold them: with adapters, compiled, spread over devices, or as a path. The text is that of their own
`generate`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import arguments
import models
import pytest
import torch
from torch import nn

import specdec
from specdec import UnsupportedModelError

Speculator: Any = specdec.Speculator
Engine: Any = specdec.Engine
generate: Any = specdec.generate
check: Any = specdec.check
patch: Any = specdec.patch
"""Wrapped models have no common type."""

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 10}


class LowRank(nn.Module):
    """A linear layer with an adapter, which can be switched off."""

    def __init__(self, base_layer: nn.Linear, seed: int):
        super().__init__()
        self.base_layer, self.active = base_layer, True
        noise = torch.Generator().manual_seed(seed)
        sizes = ((2, base_layer.in_features), (base_layer.out_features, 2))
        first, second = (torch.randn(*size, generator=noise).to(base_layer.weight.dtype) for size in sizes)
        self.down, self.up = nn.Parameter(first), nn.Parameter(second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.base_layer(x)
        return out + x @ self.down.T @ self.up.T if self.active else out


class Adapted(nn.Module):
    """What peft's PeftModel shows of itself: `peft_config`, `base_model`, `get_base_model`, a `generate` of its own."""

    def __init__(self, model: Any, kind: str = "LORA"):
        super().__init__()
        self.peft_config = {"default": SimpleNamespace(peft_type=SimpleNamespace(value=kind))}
        self.layers = []
        for i, layer in enumerate(model.model.layers):
            layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj, i)
            self.layers.append(layer.self_attn.q_proj)
        self.base_model = nn.Module()
        self.base_model.model = model

    def get_base_model(self) -> Any:
        return self.base_model.model

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self.base_model.model
        model.generation_config = self.__dict__.get("generation_config", model.generation_config)
        return type(model).generate(model, *args, **kwargs)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        for layer in self.layers:
            layer.active = False
        yield
        for layer in self.layers:
            layer.active = True


def stock(family: str = "llama-gqa", dtype: str = "fp32") -> Any:
    return models.target(family, dtype)


def fresh(family: str = "llama-gqa", dtype: str = "fp32") -> Any:
    """One that a test may change."""
    return copy.deepcopy(models.target(family, dtype))


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
def test_a_model_with_adapters_speaks_as_its_wrapper_does(dtype: str) -> None:
    bare = stock(dtype=dtype).generate(IDS, **GREEDY)
    held = Adapted(fresh(dtype=dtype)).eval()
    adapted = held.generate(IDS, **GREEDY)
    assert not torch.equal(adapted, bare)
    spec = Speculator(held, "ngram", k=3)
    assert spec.target is held.get_base_model()
    assert torch.equal(spec.generate(IDS, **GREEDY), adapted)
    with held.disable_adapter():
        assert torch.equal(spec.generate(IDS, **GREEDY), bare)
    assert torch.equal(spec.generate(IDS, **GREEDY), adapted)
    assert torch.equal(generate(held, "ngram", IDS, k=3, **GREEDY), adapted)
    drafted = Speculator(stock(dtype=dtype), held, k=3)
    assert torch.equal(drafted.generate(IDS, **GREEDY), bare)
    assert drafted.report is not None
    assert drafted.report.num_drafter_faults == 0
    assert drafted.report.num_draft_tokens > 0


def test_a_generation_config_set_on_the_wrapper_counts() -> None:
    held = Adapted(fresh()).eval()
    settings = copy.deepcopy(held.get_base_model().generation_config)
    settings.max_new_tokens, settings.do_sample = 3, False
    spec = Speculator(held, "ngram", k=3)
    held.generation_config = settings
    ours = spec.generate(IDS)
    assert torch.equal(ours, held.generate(IDS))
    assert ours.shape[1] == 7


def test_the_object_that_was_patched_speculates_and_no_other() -> None:
    held = Adapted(fresh()).eval()
    plain = held.generate(IDS, **GREEDY)
    with patch(held, "ngram", k=3) as spec:
        assert "generate" not in vars(held.get_base_model())
        assert torch.equal(held.generate(IDS, **GREEDY), plain)
        assert spec.report is not None
        assert held.generate(IDS, custom_generate=lambda *a, **k: "mine", **GREEDY) == "mine"
    assert "generate" not in vars(held)
    assert torch.equal(held.generate(IDS, **GREEDY), plain)


def test_engine_and_check_take_wrapped_models() -> None:
    held = Adapted(fresh()).eval()
    plain = held.generate(IDS, **GREEDY)
    with Engine(held, "ngram", num_pages=64, page_size=16) as engine:
        assert engine.submit(IDS[0].tolist(), **GREEDY).result().token_ids == plain[0, 4:].tolist()
    assert check(held, "ngram", k=2, budget_s=0.5, max_rows=50).passed


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING", "XLORA", "ADAPTION_PROMPT", "A_NEW_ONE"])
def test_adapters_that_need_their_wrapper_are_refused_by_name(kind: str) -> None:
    held: Any = Adapted(fresh(), kind)
    for build in (lambda: Speculator(held, "ngram"), lambda: Speculator(fresh(), held, k=2), lambda: Engine(held)):
        with pytest.raises(UnsupportedModelError, match=kind):
            build()


def test_adapters_are_looked_at_again_at_each_call() -> None:
    held: Any = Adapted(fresh()).eval()
    spec = Speculator(held, "ngram", k=3)
    held.peft_config["later"] = SimpleNamespace(peft_type="LORA", alora_invocation_tokens=[7])
    with pytest.raises(UnsupportedModelError, match="'later' of type activated LoRA"):
        spec.generate(IDS, **GREEDY)
    del held.peft_config["later"]
    assert torch.equal(spec.generate(IDS, **GREEDY), held.generate(IDS, **GREEDY))


@pytest.mark.parametrize("role", ["target", "draft"])
def test_holders_without_a_generate_say_what_to_pass(role: str) -> None:
    for holder in (nn.DataParallel(fresh()), nn.DataParallel(Adapted(fresh()))):
        with pytest.raises(
            UnsupportedModelError, match=rf"{role}: .*DataParallel, which holds one: pass its `.module`"
        ):
            Speculator(holder, "ngram") if role == "target" else Speculator(fresh(), holder, k=2)
    with pytest.raises(UnsupportedModelError, match=r"pass its `\.model`"):
        Speculator(SimpleNamespace(model=fresh()), "ngram")


def _compiled(how: str, model: Any, ran: list[int]) -> Any:
    """`model`, compiled; the compiler only notes that it was called."""

    def compiler(graph: Any, inputs: Any) -> Any:
        ran.append(1)
        return graph.forward

    if how == "whole":
        return torch.compile(model, backend=compiler)
    if how == "in place":
        model.compile(backend=compiler)
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend=compiler)
    else:
        model.model = torch.compile(model.model, backend=compiler)
    return model


@pytest.mark.parametrize("how", ["whole", "in place", "forward", "part"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_compiled_models_run_as_they_were_written(how: str, family: str) -> None:
    plain = stock(family).generate(IDS, **GREEDY)
    ran: list[int] = []
    inner = fresh(family)
    held = _compiled(how, inner, ran)
    spec = Speculator(held, held, k=3)
    assert spec.target is inner
    assert torch.equal(spec.generate(IDS, **GREEDY), plain)
    with patch(held, "ngram", k=3) as patched:
        assert torch.equal(held.generate(IDS, **GREEDY), plain)
        assert patched.report is not None
    assert "generate" not in vars(inner)
    assert not ran


def test_a_generate_that_a_compiled_model_had_comes_back() -> None:
    inner = fresh()
    own = inner.generate = lambda *args, **kwargs: "own"
    with patch(torch.compile(inner, backend="eager"), "ngram", k=3):
        assert inner.generate is not own
    assert inner.generate is own


def test_a_path_is_loaded_with_its_tokenizer(tmp_path: Path) -> None:
    target = fresh()
    target.save_pretrained(tmp_path)
    arguments.tokenizer().save_pretrained(tmp_path)
    plain = target.generate(IDS, **GREEDY)
    for name in (str(tmp_path), tmp_path):
        spec = Speculator(name, name, k=2)
        assert spec.target.dtype == torch.float32
        assert torch.equal(spec.generate(IDS, **GREEDY), plain)
    stopped = {**GREEDY, "stop_strings": ["d"]}
    expected = target.generate(IDS[:1], tokenizer=arguments.tokenizer(), **stopped)
    assert torch.equal(spec.generate(IDS[:1], **stopped), expected)
    assert torch.equal(generate(str(tmp_path), "ngram", IDS, k=2, **GREEDY), plain)
    with Engine(tmp_path, "ngram", num_pages=64, page_size=16) as engine:
        assert engine.submit(IDS[0].tolist(), **stopped).result().token_ids == expected[0, 4:].tolist()
    assert check(tmp_path, "ngram", k=2, budget_s=0.5, max_rows=50).passed


def test_a_model_saved_alone_or_in_half_precision_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    fresh().bfloat16().save_pretrained(tmp_path)
    spec = Speculator(str(tmp_path), "ngram", k=2)
    assert spec.target.dtype == torch.bfloat16
    assert not spec.target.training
    assert spec.tokenizer is None
    with pytest.raises(ValueError, match="stop_strings needs the tokenizer"):
        spec.generate(IDS, stop_strings=["d"], **GREEDY)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("/no/such/folder", "no such folder"),
        ("./nothing", "no such folder"),
        ("", "no config.json in it"),
        ("nobody/no-such-model", "cannot be reached"),
        ("a b/c", "Repo id"),
        ("x" * 5000, "File name too long"),
        (__file__, "it is a file"),
    ],
    ids=["folder", "relative", "empty", "hub", "not an id", "long", "file"],
)
@pytest.mark.parametrize("build", [Speculator, Engine, check, lambda name: Speculator(fresh(), name, k=2)])
def test_what_cannot_be_loaded_is_said_on_one_line(name: str, match: str, build: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(specdec.SpecdecError, match=match) as caught:
        build(name)
    assert "\n" not in str(caught.value)
