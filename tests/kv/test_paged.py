"""Paged and contiguous caches give the same bits: every drafter, rule and tree, through the real decode loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from checker import Case, Drafting
from test_kv_audit import DRAFTINGS, Audit
from transformers import DynamicCache

import specdec
from specdec.drafters import BestFirst, DySpec, ModelDrafter, NgramDrafter
from specdec.kv import PagedKVCache, UnsupportedArgumentError
from specdec.kv.paged_write import PagedWrite
from specdec.kv.versions import CACHE_KEYWORD, cache_of, cached
from specdec.loop import DecodeLoop

PAGE_SIZES = (1, 7, 16, 256)
sizes = pytest.mark.parametrize("page_size", PAGE_SIZES)


def _model(**options: Any) -> Callable[[str], Any]:
    return lambda family: ModelDrafter(models.draft("near", family, "fp64", 0), **options)


DRAFTERS: dict[str, Callable[[str], Any]] = {
    "none": lambda family: None,
    "chain": _model(k=4),
    "chain-of-itself": lambda family: ModelDrafter(models.draft("self", family, "fp64", 0), k=3),
    "tree-top": _model(tree=(3, 2, 1), children="top"),
    "tree-mixed": _model(tree=(3, 2, 1), children="mixed"),
    "tree-sampled": _model(tree=(2, 2), children="sampled"),
    "paths": _model(tree=[[0], [1], [0, 0], [1, 0], [0, 0, 0]]),
    "best-first": _model(tree=BestFirst(8)),
    "dyspec": _model(tree=DySpec(8)),
    "ngram": lambda family: NgramDrafter(k=5, branches=3),
}
RULES: dict[str, tuple[str, ...]] = {
    "none": ("auto", "coupled"),
    "chain": ("rejection", "block", "recursive_rejection", "traversal", "coupled", "typical"),
    "chain-of-itself": ("auto",),
    "tree-top": ("naive", "budget_flow", "coupled"),
    "tree-mixed": ("budget_flow",),
    "tree-sampled": ("recursive_rejection", "traversal"),
    "paths": ("auto",),
    "best-first": ("auto", "coupled"),
    "dyspec": ("auto",),
    "ngram": ("naive", "budget_flow"),
}


def both(
    target: Any, drafter: Any, rule: str, page_size: int, exactness: str = "distribution", **call: Any
) -> list[Any]:
    """The same call on a contiguous and on a paged cache; the outputs with logits and cache, in that order."""
    ids, mask = models.prompts((6, 2, 9), int(target.config.get_text_config().vocab_size), 3, 0)
    call = {**call, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": models.PAD}
    outs = []
    for layout in (dict(cache="contiguous"), dict(cache="paged", page_size=page_size)):
        spec = specdec.Speculator(target, drafter, rule=rule, lossy=rule == "typical", exactness=exactness, **layout)
        outs.append(spec.generate(input_ids=ids, attention_mask=mask, max_new_tokens=14, **call))
    return outs


def target_of(family: str = "llama-gqa", dtype: str = "fp64") -> Any:
    return models.target(family, dtype, 0)


def assert_same(contiguous: Any, paged: Any) -> None:
    assert torch.equal(contiguous.sequences, paged.sequences)
    for one, other in zip(contiguous.logits, paged.logits, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(cache_of(contiguous).layers, cache_of(paged).layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)


@sizes
@pytest.mark.parametrize(("drafter", "rule"), [(drafter, rule) for drafter in RULES for rule in RULES[drafter]])
def test_sampled_calls_are_the_same(drafter: str, rule: str, page_size: int) -> None:
    assert_same(
        *both(
            target_of(), DRAFTERS[drafter]("llama-gqa"), rule, page_size, do_sample=True, seed=5, eos_token_id=[3, 11]
        )
    )


@sizes
@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_greedy_calls_are_the_same(drafter: str, page_size: int) -> None:
    assert_same(
        *both(target_of(), DRAFTERS[drafter]("llama-gqa"), "auto", page_size, do_sample=False, eos_token_id=None)
    )


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_is_the_same(family: str) -> None:
    assert_same(*both(target_of(family), DRAFTERS["tree-top"](family), "auto", 7, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("options", [dict(k=4), dict(tree=(3, 2, 1))], ids=["chain", "tree"])
def test_strict_bits_are_the_same(options: dict[str, Any]) -> None:
    """Strict passes read the cache in blocks of 64 positions, whatever the pages."""
    drafter = ModelDrafter(models.draft("near", "llama-gqa", "fp32", 0), **options)
    target = target_of(dtype="fp32")
    assert_same(*both(target, drafter, "auto", 7, exactness="strict", do_sample=False, eos_token_id=None))


@sizes
def test_several_samples_of_a_prompt_are_the_same(page_size: int) -> None:
    options: dict[str, Any] = dict(do_sample=True, seed=5, num_return_sequences=4, eos_token_id=None)
    assert_same(*both(target_of(), DRAFTERS["tree-top"]("llama-gqa"), "auto", page_size, **options))


@sizes
def test_a_callers_cache_is_continued(page_size: int) -> None:
    target: Any = models.target("llama-gqa", "fp64", 0)
    ids, _ = models.prompts((9, 9), models.VOCAB, 1, 0)
    outs = []
    for layout in (dict(cache="contiguous"), dict(cache="paged", page_size=page_size)):
        past = DynamicCache()
        with torch.no_grad():
            target(input_ids=ids[:, :5], **cached(target, past))
        spec = specdec.Speculator(target, models.draft("near", "llama-gqa", "fp64", 0), k=3, **layout)
        options: dict[str, Any] = {CACHE_KEYWORD: past, "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
        outs.append(spec.generate(ids, return_dict_in_generate=True, output_logits=True, **options))
    assert_same(*outs)


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: f"{drafting.kind}-{drafting.model}")
def test_pages_hold_what_a_fresh_prefill_gives_after_every_step(
    drafting: Drafting, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("llama-gqa", "fp64", (6, 2, 4), drafting, new_tokens=14, prompt_seed=5, period=3)
    audit = Audit(1e-12)
    original = DecodeLoop.step

    def step(self: DecodeLoop) -> Any:
        traced = original(self)
        audit.check(self)
        assert isinstance(self.cache, PagedKVCache)
        self.cache.pool.check_integrity()
        return traced

    monkeypatch.setattr(DecodeLoop, "step", step)
    case.speculator(cache="paged", page_size=3).generate(**{**case.inputs(), "eos_token_id": [5, 11, 29]})
    assert audit.compared > 0


def test_the_comparison_catches_a_page_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PagedWrite._gathered

    def swapped(self: PagedWrite, storage: Any) -> Any:
        out = original(self, storage)
        return (
            out if out.shape[2] < 12 else torch.cat([out[:, :, 7:8], out[:, :, 1:7], out[:, :, :1], out[:, :, 8:]], 2)
        )

    monkeypatch.setattr(PagedWrite, "_gathered", swapped)
    with pytest.raises(AssertionError):
        assert_same(*both(target_of(), DRAFTERS["chain"]("llama-gqa"), "auto", 7, do_sample=False, eos_token_id=None))


def test_layouts_are_chosen_by_name() -> None:
    target = models.target("llama-gqa", "fp64", 0)
    assert specdec.Speculator(target, cache="paged").page_size == 16
    for options, message in (
        (dict(cache="static"), "'contiguous' or 'paged'"),
        (dict(page_size=4), "needs cache='paged'"),
        (dict(cache="paged", page_size=0), "1 to 256"),
    ):
        with pytest.raises(UnsupportedArgumentError, match=message):
            specdec.Speculator(target, **options)
