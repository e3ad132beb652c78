"""A target that drafts for itself: the text is plain generate's, and its K/V are those of a fresh prefill."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import models
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from specdec import BestFirst, DySpec, Speculator
from specdec.drafters.self_draft import SelfDrafter
from specdec.kv.versions import CACHE_KEYWORD, cache_of, cached
from specdec.monitor import Monitor

FORMS = ("int8", "int4", "exit1", "skip0", "hot50", "wanda50")
FAMILY = "llama-gqa"
VOCAB = models.VOCAB
NEW = 16


@lru_cache(maxsize=32)
def drafter(form: str, family: str = FAMILY, *dtype: str) -> Any:
    target = models.target(family, *dtype)  # the very model that the test asks for
    texts = list(models.prompts((16, 16), target.config.get_text_config().vocab_size, 9)[0])
    return SelfDrafter(target, form, calibration=texts)


def plain(target: Any, ids: Tensor, mask: Tensor, new: int = NEW) -> Tensor:
    out = target.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
    assert isinstance(out, Tensor)
    return out


class Audit(Monitor):
    """Holds the target's K/V after every step against a fresh prefill of the same text."""

    def __init__(self) -> None:
        self.found: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []

    def stepped(self, loop: Any) -> None:
        for i, row in enumerate(loop.rows.live):
            assert loop.cache.lengths[i] == loop.rows.num_tokens[row] - 1
            assert loop.cache.filled("target")[i] == loop.cache.filled("draft")[i] == loop.cache.lengths[i]
            text = loop.rows.text[row, : loop.cache.lengths[i]].clone()
            self.found.append((text, [(k.clone(), v.clone()) for k, v in loop.cache.layers("target", i)]))

    def check(self, target: Any) -> None:
        assert self.found
        for text, layers in self.found:
            cache: Any = DynamicCache()
            with torch.no_grad():
                target(input_ids=text[None], **cached(target, cache))
            for (keys, values), fresh in zip(layers, cache.layers, strict=True):
                torch.testing.assert_close(keys, fresh.keys[0], rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(values, fresh.values[0], rtol=1e-10, atol=1e-10)


SHAPES: dict[str, dict[str, Any]] = {
    "chain": {"k": 4},
    "tree": {"tree": (2, 2, 1)},
    "best first": {"tree": BestFirst(depth=3, top_k=2, num_nodes=6)},
    "value-driven": {"tree": DySpec(3, 5, 2)},
}


@pytest.mark.parametrize("layout", [{}, {"cache": "paged", "page_size": 4}], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("form", "shape"), [*((form, "chain") for form in FORMS), *(("exit1", one) for one in SHAPES)])
def test_greedy_texts_of_a_padded_batch_and_the_kv_behind_them(form: str, shape: str, layout: dict[str, Any]) -> None:
    target: Any = models.target(FAMILY)
    ids, mask = models.prompts((5, 9, 1, 7), VOCAB, 3)
    audit = Audit()
    spec: Any = Speculator(target, drafter(form).shaped(**SHAPES[shape]), monitor=audit, **layout)
    assert torch.equal(spec.generate(ids, attention_mask=mask, max_new_tokens=NEW), plain(target, ids, mask))
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    assert spec.report.num_draft_tokens > 2 * NEW
    assert spec.report.kv_models == 1
    audit.check(target)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt-neox", "gemma2", "gemma3", "qwen3", "llama-tied", "mistral-window", "qwen2-mixed-window"]
)
def test_every_family_drafts_for_itself(family: str) -> None:
    """Windows, learned positions, scaled embeddings and layers that hold their weights the other way round."""
    target = models.target(family)
    lengths = (7, 7) if family == "gemma2" else (5, 9)  # its eager attention gives NaN where all is padding
    ids, mask = models.prompts(lengths, target.config.get_text_config().vocab_size, 3)
    wanted = plain(target, ids, mask)
    for form in ("int8", "int4", "exit1", "skip0", "wanda50"):
        spec: Any = Speculator(target, drafter(form, family).shaped(k=3))
        assert torch.equal(spec.generate(ids, attention_mask=mask, max_new_tokens=NEW), wanted), form
        assert spec.report is not None
        assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
        assert spec.report.num_draft_tokens > NEW // 2
        if form == "int8":  # 41 random tokens leave room for other ones, eight bits hardly
            assert spec.report.draft_acceptance_rate > 0.7


def test_the_first_draft_is_made_when_the_prompt_has_been_read() -> None:
    """The prompt is read once, by the first step's pass of the target, whose K/V the drafts need."""
    target: Any = models.target(FAMILY)
    ids, mask = models.prompts((9,), VOCAB, 3)
    drafted: list[list[int]] = []
    spec: Any = Speculator(target, drafter("int8").shaped(k=3))
    spec.generate(ids, attention_mask=mask, max_new_tokens=8, on_step=lambda trace: drafted.append(trace.drafted))
    assert drafted[0] == [0]
    assert drafted[1] == [3]


@pytest.mark.parametrize("form", FORMS)
def test_coupled_texts_are_the_undrafted_ones(form: str) -> None:
    target: Any = models.target(FAMILY)
    ids, mask = models.prompts((5, 9), VOCAB, 4)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": True, "seed": 3}
    plainly: Any = Speculator(target, None, rule="coupled")
    wanted = plainly.generate(ids, **given)
    for shape in ("chain", "tree"):
        spec: Any = Speculator(target, drafter(form).shaped(**SHAPES[shape]), rule="coupled")
        assert torch.equal(spec.generate(ids, **given), wanted)


@pytest.mark.parametrize("form", FORMS)
def test_strict_texts_are_the_undrafted_ones(form: str) -> None:
    target = models.target(FAMILY, "fp32")
    ids, mask = models.prompts((5, 9), VOCAB, 5)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW}
    plainly: Any = Speculator(target, None, exactness="strict")
    wanted = plainly.generate(ids, **given)
    spec: Any = Speculator(target, drafter(form, FAMILY, "fp32").shaped(k=4), exactness="strict")
    assert torch.equal(spec.generate(ids, **given), wanted)


@pytest.mark.parametrize("form", ["int8", "exit1"])
def test_a_conversation_goes_on_from_its_cache(form: str) -> None:
    target: Any = models.target(FAMILY)
    ids, _ = models.prompts((8,), VOCAB, 6)
    spec: Any = Speculator(target, drafter(form).shaped(k=3))
    first: Any = spec.generate(ids, max_new_tokens=6, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
    second = spec.generate(more, max_new_tokens=6, **{CACHE_KEYWORD: cache_of(first)})
    assert torch.equal(second, plain(target, more, torch.ones_like(more), 6))
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0


def test_several_texts_of_one_prompt() -> None:
    """The prompt is read once and shared; each text drafts on its own."""
    target: Any = models.target(FAMILY)
    ids, mask = models.prompts((7,), VOCAB, 8)
    layouts: tuple[dict[str, Any], ...] = ({}, {"cache": "paged", "page_size": 4})
    for layout in layouts:
        spec: Any = Speculator(target, drafter("int8").shaped(k=3), rule="coupled", **layout)
        given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": True, "seed": 1}
        out = spec.generate(ids, num_return_sequences=4, **given)
        plainly: Any = Speculator(target, None, rule="coupled")
        wanted = plainly.generate(ids, num_return_sequences=4, **given)
        assert torch.equal(out, wanted)


def test_a_draft_that_fails_leaves_no_trace() -> None:
    class Failing(SelfDrafter):
        steps = 0

        def propose(self, budget: Any, uniforms: Tensor) -> Any:
            tree = super().propose(budget, uniforms)
            self.steps += 1
            if self.steps % 2:
                raise RuntimeError("on purpose")
            return tree

    target: Any = models.target(FAMILY)
    ids, mask = models.prompts((5, 9), VOCAB, 3)
    audit = Audit()
    spec: Any = Speculator(target, Failing(target, "int8", k=3), monitor=audit)
    with pytest.warns(specdec.drafters.DrafterFaultWarning, match="on purpose"):
        out = spec.generate(ids, attention_mask=mask, max_new_tokens=NEW)
    assert torch.equal(out, plain(target, ids, mask))
    audit.check(target)


@pytest.mark.parametrize("draft", ["self", ["self", "ngram"], ["self:int8", "ngram"]])
def test_planned_with_ngrams(draft: Any) -> None:
    target = models.target(FAMILY, "fp32")
    ids, mask = models.prompts((9, 12), VOCAB, 3, period=4)
    spec: Any = Speculator(target, draft)
    assert spec.drafter is not None
    assert spec.drafter.name == {"self": "self:int8+self:int4"}.get(str(draft), spec.drafter.name)
    for _ in range(2):
        assert torch.equal(spec.generate(ids, attention_mask=mask, max_new_tokens=40), plain(target, ids, mask, 40))
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    assert spec.report.plan is not None
