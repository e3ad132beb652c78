"""The native pass: float32's accuracy over every layout and shape, the same bits whatever else is in the pass."""

from __future__ import annotations

import copy
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_history import history
from test_direct import DIRECT
from torch import Tensor
from ways import forward_by, native_of

from specdec.kv import SharedKVCache
from specdec.kv.paged import PagedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import DraftTree, Topology
from specdec.verify.native import build, library
from specdec.verify.passes import native
from specdec.verify.passes.base import Text
from specdec.verify.passes.forward import Forward
from specdec.verify.passes.parameters import Parameters

WITHOUT = library.why_not()
pytestmark = pytest.mark.skipif(WITHOUT is not None, reason=f"no native pass: {WITHOUT}")


def caches(model: Any, rows: int) -> Iterator[Any]:
    layers = {"target": num_cache_layers(model)}
    yield SharedKVCache(layers, rows, capacity=4)
    yield PagedKVCache.fresh(layers, rows, page_size=4)


def error(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("family", DIRECT)
@pytest.mark.parametrize("lengths", [(7,), (7, 3, 5), (4, 4)])
def test_as_accurate_as_float32_in_torch(family: str, lengths: tuple[int, ...]) -> None:
    model, exact = models.target(family, "fp32"), models.target(family, "fp64")
    rows = len(lengths)
    layouts = zip(caches(model, rows), caches(model, rows), caches(exact, rows), strict=True)
    for ours, theirs, reference in layouts:
        wanted = history(forward_by(exact, "direct"), reference, lengths)
        torchs = error(history(forward_by(model, "direct"), theirs, lengths), wanted)
        found = error(history(forward_by(model, "native"), ours, lengths), wanted)
        assert found < 4 * torchs + 1e-6


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="processors of the x86 kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_on_processors_with_other_vectors(processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Vectors of 4 and 8 floats, where this machine may have 16."""
    other = library._load(build.compiled(tmp_path, processor))
    monkeypatch.setattr(native, "library", lambda: other)
    for family in ("qwen3", "gemma3-mixed", "granite"):
        test_as_accurate_as_float32_in_torch(family, (7, 3, 5))
    capped, exact = models.target("gemma2-capped", "fp32"), models.target("gemma2-capped")
    wanted = history(forward_by(exact, "modules"), next(caches(exact, 2)), (7, 3))
    assert error(history(forward_by(capped, "native"), next(caches(capped, 2)), (7, 3)), wanted) < 1e-5
    for family in ("llama-gqa", "gemma3-mixed", "gemma2-capped"):
        test_a_tokens_bits_depend_on_its_text_alone(family)


def test_the_comparison_sees_a_single_wrong_weight() -> None:
    model, exact = models.target("llama-gqa", "fp32"), models.target("llama-gqa", "fp64")
    wrong: Any = copy.deepcopy(model)
    with torch.no_grad():
        wrong.model.layers[1].self_attn.k_proj.weight[3, 5] += 1e-3
    lengths = (7, 3, 5)
    wanted = history(forward_by(exact, "direct"), next(caches(exact, 3)), lengths)
    found = error(history(forward_by(wrong, "native"), next(caches(model, 3)), lengths), wanted)
    assert found > 1e-5


@settings(max_examples=60)
@given(
    hidden=st.sampled_from([12, 36, 60]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 2)]),
    head_dim=st.sampled_from([2, 10, 16, 40, 72]),
    inner=st.integers(3, 70),
    vocab=st.integers(5, 70),
    width=st.integers(1, 11),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_every_size(
    hidden: int, heads: tuple[int, int], head_dim: int, inner: int, vocab: int, width: int, threads: int, seed: int
) -> None:
    """Sizes that fit no vector, rows of weights that fit no block, more threads than chunks."""
    model = models.llama(
        vocab=vocab, hidden=hidden, heads=heads[0], num_key_value_heads=heads[1], head_dim=head_dim,
        intermediate_size=inner, seed=seed,
    )  # fmt: skip
    text = torch.randint(0, vocab, (2, 9 + width), generator=torch.Generator().manual_seed(seed))
    outs = []
    before = torch.get_num_threads()
    exact: Any = copy.deepcopy(model)
    for one, way in ((model, "native"), (exact.double(), "direct")):
        forward, cache = forward_by(one, way), next(caches(one, 2))
        torch.set_num_threads(threads if way == "native" else before)
        try:
            with torch.no_grad():
                forward.causal(cache, text[:, :9], [0, 0], None, keep=1)
                outs.append([forward.causal(cache, text[:, 9:], [9, 5], None, keep=0).logits])
        finally:
            torch.set_num_threads(before)
        if way == "native":  # and token by token, the same bits
            again = next(caches(one, 2))
            with torch.no_grad():
                forward.causal(again, text[:, :9], [0, 0], None, keep=1)
                single = [
                    forward.causal(again, text[:, 9 + i : 10 + i], [9 + i, 5 + i], None, keep=0).logits
                    for i in range(width)
                ]
            assert torch.equal(torch.cat(single, 1), outs[0][0])
    assert error(*outs) < 3e-5


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3"])
def test_a_tokens_bits_depend_on_its_text_alone(family: str) -> None:
    bits_depend_on_the_text_alone(models.target(family, "fp32"))


def bits_depend_on_the_text_alone(model: Any) -> None:
    """One by one, in chains of any length, on a branch of a tree, with companions, with other threads, in pages."""
    text = models.prompts((30,), models.VOCAB, 3)[0]
    forward = forward_by(model, "native")
    before = torch.get_num_threads()

    def fresh(rows: int = 1, which: int = 0) -> Any:
        cache = list(caches(model, rows))[which]
        with torch.no_grad():
            forward.causal(cache, text[:, :10].expand(rows, -1), [0] * rows, None, keep=1)
        for row in range(rows):
            cache.set_length(row, 10)
        return cache

    with torch.no_grad():
        cache = fresh()
        single = torch.cat([forward.causal(cache, text[:, i : i + 1], [i], None, 0).logits for i in range(10, 30)], 1)
        for width in (2, 3, 5, 7, 20):  # 20 at once: in four pieces
            for which in (0, 1):
                cache = fresh(which=which)
                spans = [(i, min(i + width, 30)) for i in range(10, 30, width)]
                chunks = [forward.causal(cache, text[:, a:b], [a], None, 0).logits for a, b in spans]
                assert torch.equal(torch.cat(chunks, 1), single)
        empty = next(caches(model, 1))
        assert torch.equal(
            forward.causal(empty, text, [0], None, keep=7).logits, single[:, -7:]
        )  # with what came before
        for i in range(30):  # and what came before token by token
            last = forward.causal(empty, text[:, i : i + 1], [i], None, keep=1).logits
        assert torch.equal(last, single[:, -1:])
        for threads in (2, 3):
            torch.set_num_threads(threads)
            try:
                assert torch.equal(forward.causal(fresh(), text[:, 10:], [10], None, 0).logits, single)
            finally:
                torch.set_num_threads(before)
        cache = fresh(rows=2)
        tree = DraftTree.build(Topology.widths((2, 1, 1)), torch.full((2, 7), 5))
        path = [0, 2, 4, 6]  # the second branch
        tokens = tree.tokens.clone()
        tokens[1, path] = text[0, 10:14]
        tree = DraftTree.build(Topology.widths((2, 1, 1)), tokens)
        logits = forward.tree(cache, tree).logits
        assert torch.equal(logits[1, path], single[0, :4])
        cache.commit([[0], path])
        rest = text[:, 14:20].expand(2, -1)
        assert torch.equal(forward.causal(cache, rest, cache.lengths, None, 0).logits[1], single[0, 4:10])
        one, others = fresh(), [Text(fresh(), text[:, 10:13], [10], None)]
        chain = DraftTree.build(Topology.chain(3), text[:, 10:14])
        assert torch.equal(forward.together(one, chain, others)[0].logits, single[:, :4])


def test_torchs_products_do_depend_on_the_rest() -> None:
    """The control: what the test above asserts is no matter of course."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 384, generator=generator), torch.randn(1024, 384, generator=generator)
    alone = torch.cat([torch.nn.functional.linear(x[i : i + 1], weight) for i in range(40)])
    assert any(not torch.equal(torch.nn.functional.linear(x[:n], weight), alone[:n]) for n in range(2, 41))


def test_ids_without_an_embedding_are_refused_before_anything_is_written() -> None:
    model = models.target("llama-gqa", "fp32")
    forward, cache = forward_by(model, "native"), next(caches(model, 1))
    for wrong in (models.VOCAB, -1):
        with pytest.raises(IndexError, match=rf"token id {wrong} .* {models.VOCAB} rows"):
            forward.causal(cache, torch.tensor([[3, wrong]]), [0], None, keep=0)
    assert cache.filled("target") == [0]


def test_nan_and_infinity_reach_the_logits() -> None:
    for bad in (float("nan"), float("inf")):
        for name in (
            "model.embed_tokens",
            "model.layers.1.self_attn.v_proj",
            "model.layers.0.mlp.gate_proj",
            "lm_head",
        ):
            model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
            with torch.no_grad():
                model.get_submodule(name).weight[7] = bad
                forward, cache = forward_by(model, "native"), next(caches(model, 1))
                ours = forward.causal(cache, torch.tensor([[3, 7, 5]]), [0], None, keep=0).logits
                theirs = model(torch.tensor([[3, 7, 5]])).logits
            assert torch.equal(ours[:, 1:].isfinite(), theirs[:, 1:].isfinite()), (bad, name)
            # torch multiplies what the mask hides by zero, and 0 * NaN is NaN; here a token before it is not touched
            assert bool(ours[:, 0].isfinite().all()) == (
                name == "model.embed_tokens" or bool(theirs[:, 0].isfinite().all())
            )


def test_which_passes_are_native() -> None:
    assert native_of(models.target("llama-gqa", "fp64")) is None
    assert native_of(models.target("llama-gqa", "bf16")) is not None
    forward = Forward(models.target("llama-gqa", "fp32"), "target")
    with forward.prepared():
        assert forward.runners[0].serves  # type: ignore[attr-defined]
    uneven: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    uneven.model.layers[1].input_layernorm.variance_epsilon = 1e-3
    assert Parameters.of(uneven) is not None
    assert native_of(uneven) is None
