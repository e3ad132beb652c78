"""Ids, masks and token types in every form users hold them: plain `generate`'s text and dtype, or a refusal that names
the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import families
import models
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BatchEncoding, DynamicCache, GenerationConfig

from specdec import Speculator, UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD, cache_of

TARGET: Any = models.target("llama-gqa", "fp64", 0)
FAST: Any = models.target("llama-gqa", "fp32", 0)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 7}


def spec(target: Any = TARGET) -> Any:
    return Speculator(target, models.draft("near", "llama-gqa"), k=4)


def same(plain: Tensor, ours: Tensor) -> None:
    assert ours.dtype == plain.dtype == torch.int64
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("target", [TARGET, FAST], ids=["fp64", "native"])
def test_int32_ids_give_plains_text_and_dtype(rows: int, masked: bool, target: Any) -> None:
    ids = IDS[:rows].int()
    inputs = {**GREEDY, "attention_mask": MASK[:rows].int()} if masked else GREEDY
    plain = target.generate(ids, **inputs)
    same(plain, spec(target).generate(ids, **inputs))
    same(plain, target.generate(ids, custom_generate=spec(target), **inputs))


def test_int32_ids_return_the_scores_of_int64_ids() -> None:
    asked = {**GREEDY, "attention_mask": MASK, "return_dict_in_generate": True, "output_scores": True}
    asked["repetition_penalty"] = 1.3
    narrow, wide = (spec().generate(ids, **asked) for ids in (IDS.int(), IDS))
    assert torch.equal(narrow.sequences, wide.sequences)
    assert all(torch.equal(a, b) for a, b in zip(narrow.scores, wide.scores, strict=True))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, torch.float16, torch.float64])
@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["padded", "whole"])
def test_masks_of_any_dtype_are_read_as_plain_reads_them(dtype: torch.dtype, mask: Tensor) -> None:
    plain = TARGET.generate(IDS, attention_mask=mask, **GREEDY)
    same(plain, TARGET.generate(IDS, attention_mask=mask.to(dtype), **GREEDY))
    same(plain, spec().generate(IDS, attention_mask=mask.to(dtype), **GREEDY))
    assert torch.equal(mask, MASK) != torch.equal(plain, TARGET.generate(IDS, **GREEDY))  # padding is seen


@pytest.mark.parametrize(
    "ids",
    [IDS.t().contiguous().t(), torch.arange(3, 35).view(2, 16)[:, ::4], IDS[:1].expand(3, 4), IDS.flip(0)],
    ids=["transposed", "strided", "expanded", "flipped"],
)
def test_ids_in_any_layout(ids: Tensor) -> None:
    before = ids.clone()
    same(TARGET.generate(ids, **GREEDY), spec().generate(ids, **GREEDY))
    assert torch.equal(ids, before)


def test_a_batch_encoding_is_unpacked() -> None:
    encoding = BatchEncoding({"input_ids": IDS, "attention_mask": MASK})
    same(TARGET.generate(**encoding, **GREEDY), spec().generate(**encoding, **GREEDY))


REFUSED: dict[str, Callable[[], dict[str, Any]]] = {
    r"got list: pass torch.tensor": lambda: {"inputs": IDS.tolist()},
    r"got ndarray: pass torch.tensor": lambda: {"inputs": IDS.numpy()},
    r"got BatchEncoding: unpack it": lambda: {"inputs": BatchEncoding({"input_ids": IDS})},
    r"got dict: unpack it": lambda: {"inputs": {"input_ids": IDS}},
    r"got str: tokenize": lambda: {"inputs": "once upon a time"},
    r"input_ids: expected int64 or int32 token ids, got torch.int16": lambda: {"input_ids": IDS.short()},
    r"got torch.uint8": lambda: {"inputs": IDS.byte()},
    r"got torch.float32": lambda: {"inputs": IDS.float()},
    r"\[rows, columns\].* got \(4,\)": lambda: {"inputs": IDS[0]},
    r"\[rows, columns\].* got \(1, 2, 4\)": lambda: {"inputs": IDS[None]},
    r"\[rows, columns\].* got \(0, 4\)": lambda: {"inputs": IDS[:0]},
    r"\[rows, columns\].* got \(2, 0\)": lambda: {"inputs": IDS[:, :0]},
    r"ids in 0..40 \(LlamaForCausalLM\), got 5 to 41": lambda: {"inputs": torch.tensor([[5, 41]])},
    r"got -1 to 5": lambda: {"inputs": torch.tensor([[5, -1]])},
    r"attention_mask: expected a tensor .* got list": lambda: {"inputs": IDS, "attention_mask": MASK.tolist()},
    r"attention_mask: expected a tensor .* got \(4,\)": lambda: {"inputs": IDS[:1], "attention_mask": MASK[0]},
    r"attention_mask: expected 1 .* other values": lambda: {"inputs": IDS, "attention_mask": MASK * 2},
    r"attention_mask: expected 1 for tokens": lambda: {"inputs": IDS, "attention_mask": MASK - 0.5},
    r"attention_mask: expected 1": lambda: {"inputs": IDS, "attention_mask": MASK / torch.tensor([0.0, 1, 1, 1])},
    r"position_ids: expected a tensor .* got list": lambda: {"inputs": IDS, "position_ids": [[0, 1, 2, 3]] * 2},
    rf"{CACHE_KEYWORD}: expected .* got tuple": lambda: {"inputs": IDS, CACHE_KEYWORD: ((IDS, IDS),)},
    rf"{CACHE_KEYWORD}: expected .* got str": lambda: {"inputs": IDS, CACHE_KEYWORD: "cache"},
    r"generation_config: expected .* got dict": lambda: {"inputs": IDS, "generation_config": {"do_sample": False}},
    r"logits_to_keep: expected": lambda: {"inputs": IDS, "logits_to_keep": torch.tensor([0])},
    r"whole number, got a limit of 6.5 columns": lambda: {"inputs": IDS, "max_new_tokens": 2.5},
    r"whole number, got a limit of nan": lambda: {"inputs": IDS, "max_new_tokens": float("nan")},
    r"inputs_embeds.*not supported": lambda: {"inputs_embeds": TARGET.get_input_embeddings()(IDS)},
    r"adapter_names: adapters cannot differ": lambda: {"inputs": IDS, "adapter_names": ["one", "two"]},
}


@pytest.mark.parametrize("match", REFUSED, ids=str)
@pytest.mark.parametrize("target", [TARGET, FAST], ids=["fp64", "native"])
def test_what_is_not_a_prompt_is_named_and_the_next_call_works(match: str, target: Any) -> None:
    speculator = spec(target)
    with pytest.raises(UnsupportedArgumentError, match=match):
        speculator.generate(**{"do_sample": False, "max_new_tokens": 3, **REFUSED[match]()})
    same(target.generate(IDS, **GREEDY), speculator.generate(IDS, **GREEDY))


@pytest.mark.parametrize("limit", [np.int64(3), torch.tensor(3)], ids=["numpy", "tensor"])
def test_whole_limits_of_any_type(limit: Any) -> None:
    settings = {"do_sample": False, "max_new_tokens": limit}
    same(TARGET.generate(IDS, **settings), spec().generate(IDS, **settings))


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_number_of_logits_to_keep_changes_nothing(keep: int) -> None:
    same(TARGET.generate(IDS, logits_to_keep=keep, **GREEDY), spec().generate(IDS, logits_to_keep=keep, **GREEDY))


def test_extra_entries_of_a_generation_config_are_carried_as_plain_carries_them() -> None:
    config = GenerationConfig(do_sample=False, max_new_tokens=5, stop_strings=None, an_entry_of_ours=[1])
    before = config.to_dict()
    same(TARGET.generate(IDS, config), spec().generate(IDS, config))
    assert config.to_dict() == before


TYPED = [
    ("Gemma3ForConditionalGeneration", "token_type_ids"),
    ("Qwen2_5_VLForConditionalGeneration", "mm_token_type_ids"),
    ("Glm4vForConditionalGeneration", "mm_token_type_ids"),
    ("BertLMHeadModel", "token_type_ids"),
    ("RobertaForCausalLM", "token_type_ids"),
]


@pytest.mark.parametrize(("name", "types"), TYPED, ids=[name for name, _ in TYPED])
def test_the_types_every_processor_returns_for_text_are_taken(name: str, types: str) -> None:
    torch.manual_seed(0)
    target = families.small_model(name)
    speculator: Any = Speculator(target, "ngram", k=3)
    for mask in (torch.ones_like(MASK), MASK):
        inputs = {**GREEDY, "attention_mask": mask}
        plain = target.generate(IDS, **inputs, **{types: torch.zeros_like(IDS)})
        same(plain, speculator.generate(IDS, **inputs, **{types: torch.zeros_like(IDS)}))
        same(plain, target.generate(IDS, custom_generate=speculator, **inputs, **{types: torch.zeros_like(IDS)}))
        with pytest.raises(UnsupportedArgumentError, match=types):
            speculator.generate(IDS, **inputs, **{types: torch.ones_like(IDS)})
        with pytest.raises(UnsupportedArgumentError, match=types):
            speculator.generate(IDS, **inputs, **{types: torch.zeros_like(IDS[:, :2])})


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "GPTJForCausalLM", "CodeGenForCausalLM"])
def test_types_that_are_looked_up_and_added_are_refused_also_where_all_are_zero(name: str) -> None:
    torch.manual_seed(0)
    target = families.small_model(name)
    zeros = torch.zeros_like(IDS)
    with pytest.raises(UnsupportedArgumentError, match="token_type_ids"):
        Speculator(target, "ngram", k=3).generate(IDS, token_type_ids=zeros, **GREEDY)
    plain, typed = target.generate(IDS, **GREEDY), target.generate(IDS, token_type_ids=zeros, **GREEDY)
    assert not torch.equal(plain, typed)  # had they been dropped, the text would be another


def test_columns_of_a_callers_cache_are_left_as_they_are_pads_included() -> None:
    """What the cache holds at pads is arbitrary; the text does not depend on it, and it is the caller's."""
    first = TARGET.generate(IDS, attention_mask=MASK, return_dict_in_generate=True, min_new_tokens=3, **GREEDY)
    mask = torch.cat([MASK, torch.ones(2, 7, dtype=torch.int64)], dim=1)
    width = cache_of(first).get_seq_length()

    def copy() -> DynamicCache:
        cache = DynamicCache()
        for i, layer in enumerate(cache_of(first).layers):
            cache.update(layer.keys.clone(), layer.values.clone(), i)
        return cache

    ours, theirs = copy(), copy()
    fresh: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    plain = TARGET.generate(first.sequences, **{CACHE_KEYWORD: theirs}, **fresh)
    same(plain, spec().generate(first.sequences, **{CACHE_KEYWORD: ours}, **fresh))
    assert ours.get_seq_length() == theirs.get_seq_length() > width
    for mine, other, before in zip(ours.layers, theirs.layers, cache_of(first).layers, strict=True):
        for name in ("keys", "values"):
            kept, held = getattr(mine, name), getattr(before, name)
            assert torch.equal(kept[:, :, :width], held)
            assert held[0, :, :2].abs().min() > 0  # what stood at the pads was not zero
            torch.testing.assert_close(kept[:, :, width:], getattr(other, name)[:, :, width:], rtol=1e-9, atol=1e-9)
