"""After every step the committed K/V of both models is that of a fresh prefill of the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checker import Case, Drafting
from transformers import DynamicCache

from specdec.drafters.base import CACHE_NAME
from specdec.kv.shared import SharedKVCache
from specdec.kv.versions import cache_of, cached
from specdec.loop import DecodeLoop
from specdec.target import TARGET

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
"""Relative and absolute. A fresh prefill multiplies other shapes than a tree pass, so it rounds differently."""


def fresh_cache(model: Any, text: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer `(keys, values)` `[kv_heads, tokens, head_dim]` of a plain prefill on transformers' own cache."""
    cache: Any = DynamicCache()  # without a config no layer drops tokens, windowed ones included
    config = model.config.get_text_config()
    inside, config._attn_implementation = config._attn_implementation, "sdpa"  # a decode loop may be running
    try:
        with torch.no_grad():
            model(input_ids=text[None], **cached(model, cache))
    finally:
        config._attn_implementation = inside
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


class Audit:
    """Checks the invariants of a running DecodeLoop; counts what it saw, so that a test cannot pass on nothing."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.steps = self.compared = self.lagged = 0

    def check(self, loop: DecodeLoop) -> None:
        self.steps += 1
        rows, cache = loop.rows, loop.cache
        assert cache.num_rows == len(rows.live)
        for i, row in enumerate(rows.live):
            assert cache.lengths[i] == rows.num_tokens[row] - 1
            assert cache.filled(TARGET)[i] == cache.lengths[i]
            self.compare(loop, TARGET, loop.target, i, row, cache.lengths[i])
            if loop.drafter is not None and loop.drafter.num_cache_layers:
                held = cache.filled(CACHE_NAME)[i]
                assert held <= cache.lengths[i]
                self.lagged += held < cache.lengths[i]
                drafter: Any = loop.drafter.inner
                self.compare(loop, CACHE_NAME, drafter.model, i, row, held)

    def compare(self, loop: DecodeLoop, name: str, model: Any, i: int, row: int, held: int) -> None:
        if held == 0:
            return
        expected = fresh_cache(model, loop.rows.text[row, :held])
        found = list(loop.cache.layers(name, i))
        assert len(found) == len(expected)
        for ours, plain in zip(found, expected, strict=True):
            for got, wanted in zip(ours, plain, strict=True):
                torch.testing.assert_close(got, wanted, rtol=self.tolerance, atol=self.tolerance)
                self.compared += 1


def audited(case: Case, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Audit, Any]:
    """Generate with an audit after the prefill and after every step; returns the audit and the report."""
    audit = Audit(TOLERANCE[case.dtype])
    original: Callable[[DecodeLoop], Any] = DecodeLoop.step

    def step(self: DecodeLoop) -> Any:
        traced = original(self)
        audit.check(self)
        return traced

    speculator = case.speculator()
    with monkeypatch.context() as patch:
        patch.setattr(DecodeLoop, "step", step)
        speculator.generate(**{**case.inputs(), **options})
    return audit, speculator.report


DRAFTINGS = [
    Drafting("chain", "near", k=4),
    Drafting("tree", "near", widths=(3, 2, 1)),
    Drafting("tree", "far", widths=(4, 2, 2)),
    Drafting("ngram", k=5, branches=3),
    Drafting("chain", "self", k=3),
]


@pytest.mark.parametrize("family", ["llama-gqa", "llama-past-maximum", "mistral-window", "qwen2-mixed-window", "gpt2"])
@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: f"{drafting.kind}-{drafting.model}")
def test_kv_equals_a_fresh_prefill_after_every_step(
    family: str, drafting: Drafting, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype, eos in (("fp64", None), ("fp32", [5, 11, 29])):
        case = Case(family, dtype, (6, 2, 4), drafting, new_tokens=14, prompt_seed=5, period=3)
        audit, report = audited(case, monkeypatch, eos_token_id=eos)
        assert audit.steps == report.num_steps
        assert audit.compared > 0 or eos is not None


def test_sampled_histories_and_non_first_branches_are_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rejections in the middle of a run, gathers of later siblings and a lagging drafter all occur in the audit."""
    gathered: list[list[int]] = []
    original = SharedKVCache.commit

    def commit(self: SharedKVCache, paths: list[list[int]]) -> None:
        gathered.extend(path for path in paths if path != list(range(len(path))))
        original(self, paths)

    monkeypatch.setattr(SharedKVCache, "commit", commit)
    lagged = 0
    for drafting in (Drafting("tree", "near", widths=(3, 2, 1)), Drafting("chain", "near", k=3)):
        case = Case("llama-gqa", "fp64", (5, 3), drafting, new_tokens=20, prompt_seed=1)
        audit, report = audited(case, monkeypatch, do_sample=True, seed=3, temperature=0.7, eos_token_id=None)
        lagged += audit.lagged
        assert 0 < report.num_accepted_tokens < report.num_draft_tokens
    assert gathered
    assert lagged > 0


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes with the bits of the model's modules, which native ones have not."""
    monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)


def test_the_first_pass_is_bitwise_that_of_plain_decoding(in_torch: None) -> None:
    """Same shapes, same bits: without a draft both sides run the whole prompt in one pass."""
    case = Case("llama-gqa", "fp32", (9,), Drafting("none"), new_tokens=2)
    out = case.speculator().generate(**case.inputs(), return_dict_in_generate=True)
    expected = fresh_cache(case.target, out.sequences[0, :9])
    for ours, (keys, values) in zip(cache_of(out).layers, expected, strict=True):
        assert torch.equal(ours.keys[0, :, :9], keys)
        assert torch.equal(ours.values[0, :, :9], values)


@pytest.mark.parametrize("family", ["llama-mha", "llama-gqa", "gpt2"])
def test_a_chain_of_accepted_drafts_is_bitwise_the_same_passes_on_a_plain_cache(family: str, in_torch: None) -> None:
    """Replaying the very passes on transformers' own cache gives the same bits: commit and storage add no rounding."""
    case = Case(family, "fp32", (6,), Drafting("chain", "self", k=3), new_tokens=16)
    target: Any = case.target
    widths: list[int] = []
    inputs = {**case.inputs(), "eos_token_id": None}
    out = case.speculator().generate(
        **inputs, return_dict_in_generate=True, on_step=lambda trace: widths.append(1 + trace.drafted[0])
    )
    cache: Any = DynamicCache()
    start = 5 + widths[0]  # the prompt is read along with the first draft
    with torch.no_grad():
        target(input_ids=out.sequences[:, :start], **cached(target, cache))
        for width in widths[1:]:
            target(input_ids=out.sequences[:, start : start + width], **cached(target, cache))
            start += width
    assert start >= out.sequences.shape[1] - 1
    for ours, plain in zip(cache_of(out).layers, cache.layers, strict=True):
        held = ours.keys.shape[2]
        assert torch.equal(ours.keys, plain.keys[:, :, :held])
        assert torch.equal(ours.values, plain.values[:, :, :held])


def test_the_audit_catches_a_commit_that_skips_the_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SharedKVCache.commit
    monkeypatch.setattr(
        SharedKVCache, "commit", lambda self, paths: original(self, [list(range(len(path))) for path in paths])
    )
    case = Case("llama-gqa", "fp64", (5, 3), Drafting("tree", "near", widths=(3, 2, 1)), new_tokens=20, prompt_seed=1)
    with pytest.raises(AssertionError):
        audited(case, monkeypatch, eos_token_id=None, do_sample=True, seed=3)
