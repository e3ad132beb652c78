"""Native passes of models that differ from Llama: every class that is said to run natively does, and everything in
which it differs is seen by the comparison."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import models
import packed_models
import pytest
import torch
from families import small_model
from pass_history import history
from test_native import bits_depend_on_the_text_alone, caches, error
from test_native import pytestmark as pytestmark
from test_native_long import LENGTH, read, threads, tree_of
from torch import Tensor
from ways import forward_by, native_of

import specdec
from specdec.verify import DraftTree, Topology
from specdec.verify.passes import native, parameters
from specdec.verify.passes.base import Runner
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.native_weights import NativeWeights
from specdec.verify.passes.parameters import Parameters
from specdec.verify.stock import FAMILIES

SHAPES = ("gemma", "gemma2-capped", "gemma3-mixed", "granite", "mistral-window", "phi3", "phi3-longrope", "smollm3")

__all__ = ["threads"]


def run(model: Any, way: str, lengths: tuple[int, ...] = (7, 3, 5), which: int = 0) -> list[Tensor]:
    return history(forward_by(model, way), list(caches(model, len(lengths)))[which], lengths)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_class_that_runs_natively_computes_what_its_modules_do(name: str) -> None:
    exact = small_model(f"{name}ForCausalLM")
    if name == "Gemma2":
        exact.config._attn_implementation = "eager"
    model = copy.deepcopy(exact).float()
    wanted = run(exact, "modules")
    assert error(run(model, "native"), wanted) < 4 * error(run(model, "modules"), wanted) + 1e-6
    assert error(run(model, "native", which=1), wanted) < 1e-5


@pytest.mark.parametrize("family", SHAPES)
def test_sizes_and_parts_of_every_kind(family: str) -> None:
    exact, model = models.target(family), models.target(family, "fp32")
    wanted = run(exact, "modules")
    for which in (0, 1):
        assert error(run(model, "native", which=which), wanted) < 1e-5
    bits_depend_on_the_text_alone(model)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", SHAPES)
def test_states_are_rounded_where_the_modules_round(family: str, dtype: str) -> None:
    model = models.target(family, dtype)
    wanted = run(packed_models.converted(model, torch.float64), "modules")
    modules, found = run(model, "modules"), run(model, "native")
    pairs = list(zip(found, modules, strict=True))
    assert all(a.dtype == b.dtype for a, b in pairs)
    equal = [float((a == b).float().mean()) for a, b in pairs]
    assert sum(equal) / len(equal) > 0.9  # sums of another order leave their traces
    assert error(found, wanted) < 1.5 * error(modules, wanted) + 1e-3


def _unset(owner: str, name: str, value: Any) -> Callable[[Parameters], None]:
    def change(own: Parameters) -> None:
        for one in own.layers if owner == "layers" else [own]:
            setattr(one, name, value)

    return change


WRONG: dict[str, tuple[str, Callable[[Parameters], None]]] = {
    "window": ("mistral-window", _unset("layers", "window", None)),
    "a window one too wide": ("phi3", _unset("layers", "window", 7)),
    "angles of another kind": ("gemma3-mixed", _unset("layers", "angles", 0)),
    "rotated": ("smollm3", _unset("layers", "angles", 0)),
    "silu": ("gemma", _unset("layers", "gelu", False)),
    "norm of attention": ("gemma3-mixed", _unset("layers", "attended", None)),
    "norm of the inner layer": ("gemma3-mixed", _unset("layers", "fed", None)),
    "embeddings": ("gemma", _unset("model", "embed_scale", 1.0)),
    "scores": ("gemma2-capped", _unset("model", "score_cap", 0.0)),
    "logits": ("gemma3-mixed", _unset("model", "logit_cap", 0.0)),
    "divisor": ("granite", _unset("model", "divisor", 1.0)),
    "what is added": ("granite", _unset("layers", "added_scale", 1.0)),
}


@pytest.mark.parametrize("what", WRONG)
def test_each_difference_matters(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls: without it the comparison fails by far."""
    family, change = WRONG[what]
    model = models.target(family, "fp32")
    wanted = run(model, "modules")

    class Wrong(NativeWeights):
        def __init__(self, own: Parameters, copies: Any):
            change(own)
            super().__init__(own, copies)

    monkeypatch.setattr(native, "NativeWeights", Wrong)
    assert error(run(model, "native"), wanted) > 1e-3


def test_a_norm_is_rounded_after_its_weight_where_the_modules_do_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.target("gemma", "bf16")
    wanted, found = run(model, "modules"), run(model, "native")

    class Wrong(NativeWeights):
        def __init__(self, own: Parameters, copies: Any):
            own.norm.centred = False
            super().__init__(own, copies)

    monkeypatch.setattr(native, "NativeWeights", Wrong)
    apart = [
        sum(int((a != b).sum()) for a, b in zip(other, wanted, strict=True)) for other in (found, run(model, "native"))
    ]
    assert apart[1] > 4 * apart[0] + 100


@pytest.mark.parametrize("window", [5, 100])
def test_windows_of_long_texts(window: int, threads: Any) -> None:
    """Many blocks, threads that share one text, tiles: the bits of a token read alone by one thread, in whatever draft;
    and the numbers of the modules."""
    config, build = models.BUILDERS["gemma3-mixed"]()[1], models.BUILDERS["gemma3-mixed"]()[0]
    config.sliding_window = window
    model = models.build(build, config, torch.float32, 1, "sdpa")
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(3, models.VOCAB, (1, LENGTH + 40), generator=generator)
    forward, stop = forward_by(model, "native"), LENGTH + 12
    threads(1)
    cache = read(forward, next(caches(model, 1)), text, [LENGTH])
    single = torch.cat([forward.causal(cache, text[:, i : i + 1], [i], None, 0).logits for i in range(LENGTH, stop)], 1)
    tree, path = tree_of(text)
    for which, count in ((0, 1), (1, 2), (0, 3)):
        threads(1)
        cache = read(forward, list(caches(model, 1))[which], text, [LENGTH])
        threads(count)
        assert torch.equal(forward.causal(cache, text[:, LENGTH:stop], [LENGTH], None, 0).logits, single)
        assert torch.equal(forward.tree(cache, tree).logits[:, path], single[:, : len(path)])
    threads(1)
    modules = forward_by(model, "modules")
    cache = read(modules, next(caches(model, 1)), text, [LENGTH])
    assert error([single], [modules.causal(cache, text[:, LENGTH:stop], [LENGTH], None, 0).logits]) < 1e-5


def test_a_tree_grown_level_by_level_in_windows() -> None:
    """Its earlier nodes are in the tail already; the window of the deepest ones ends among them."""
    model = models.target("gemma3-mixed", "fp32")
    forward = forward_by(model, "native")
    text = models.prompts((9,), models.VOCAB, 3)[0]
    tree = DraftTree.build(Topology.widths((2, 1, 1, 1, 1, 1, 1, 1)), torch.arange(3, 20)[None])
    given = []
    for cuts in ((0, 17), (0, 1, 3, 9, 17)):
        cache = next(caches(model, 1))
        forward.prefill(cache, text, [0], [9])
        cache.set_length(0, 9)
        for first, stop in pairwise(cuts):
            nodes = tree.tokens[:, first:stop], tree.depths[:, :stop], tree.ancestor_mask[:, first:stop, :stop]
            given.append(forward.nodes(cache, *nodes, first).logits)
    assert torch.equal(torch.cat(given[1:], 1), given[0])


def test_fused_weights_in_few_bits_are_taken_apart() -> None:
    for bits, integer in ((8, False), (4, True)):
        model = packed_models.target("phi3", bits=bits, integer=integer)
        assert native_of(model) is not None
        assert error(run(model, "native"), run(model, "direct")) < (0.02 if integer else 3e-5)


def test_soft_capped_attention_has_no_other_way_past_its_modules() -> None:
    """Long texts are read natively as well; without a native pass the modules run."""
    model = models.target("gemma2-capped", "fp32")
    text = models.prompts((300,), models.VOCAB, 3)[0]
    forward = Forward(model, "target")
    with forward.prepared(), torch.no_grad():
        way: Runner = forward.runners[0]
        assert way.stride(0, 300) == 300
        cache = next(caches(model, 1))
        found = forward.causal(cache, text, [0], None, keep=0).logits
        assert error([found], [model(text).logits]) < 1e-5
    assert native_of(models.target("gemma2-capped", "fp64")) is None
    with pytest.raises(RuntimeError, match="soft-capped"):
        forward_by(models.target("gemma2-capped"), "direct").causal(next(caches(model, 1)), text, [0], None, keep=0)


@pytest.mark.parametrize("family", ["gemma2-capped", "gemma3-mixed", "phi3"])
def test_greedy_text_is_plain_generates(family: str) -> None:
    """By drafts of its own lean copy, which reads the target's K/V."""
    model: Any = models.target(family, "fp32")
    ids, mask = models.prompts((7, 12), models.VOCAB, 5)
    arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
    spec = specdec.Speculator(model, "self:int8", k=3)
    assert torch.equal(spec.generate(ids, **arguments), type(model).generate(model, ids, **arguments))  # type: ignore[arg-type]
    assert spec.report is not None
    assert not spec.report.num_drafter_faults


def test_what_is_not_as_its_class_says_is_left_to_the_modules() -> None:
    def cut(model: Any) -> None:
        inner = model.model.layers[1].self_attn
        inner.qkv_proj.weight = torch.nn.Parameter(inner.qkv_proj.weight[:-8])

    def dropping(model: Any) -> None:
        model.model.layers[0].resid_attn_dropout.p = 0.5
        model.train()

    def otherwise(model: Any) -> None:
        model.model.layers[0].mlp.activation_fn = torch.nn.ReLU()

    for change in (cut, dropping, otherwise):
        model = copy.deepcopy(models.target("phi3", "fp32"))
        assert parameters.Parameters.of(model) is not None
        change(model)
        assert parameters.Parameters.of(model) is None
