"""Greedy drafts in one native call: the tokens, and the K/V, that passes level by level find and write."""

from __future__ import annotations

import copy
from typing import Any

import models
import pytest
import torch
from test_native import caches
from test_native import pytestmark as pytestmark
from torch import Tensor
from ways import forward_by

import specdec
from specdec.verify.passes.native import Native

LEVELS = 5
FAMILIES = ["llama-gqa", "llama-tied", "qwen3", "mistral"]


def read(forward: Any, cache: Any, text: Tensor, lengths: list[int]) -> None:
    forward.prefill(cache, text, [0] * len(lengths), lengths)
    for row, length in enumerate(lengths):
        cache.set_length(row, length)


def by_levels(forward: Any, cache: Any, roots: Tensor, vocab: int) -> Tensor:
    found, tokens = [], roots
    for level in range(LEVELS):
        starts = [length + level for length in cache.lengths]
        logits = forward.causal(cache, tokens, starts, None, keep=0).logits
        tokens = logits[:, -1:, :vocab].argmax(-1)
        found.append(tokens)
    return torch.cat(found, 1)


def committed(cache: Any, count: int) -> list[Tensor]:
    """K/V of each row once the chain is kept."""
    cache.commit([list(range(LEVELS))] * count)
    return [state.clone() for row in range(count) for layer in cache.layers("target", row) for state in layer]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_and_states(family: str, dtype: str) -> None:
    model, lengths = models.target(family, dtype), [9, 3, 6]
    text = torch.randint(3, models.VOCAB, (3, 9), generator=torch.Generator().manual_seed(5))
    forward = forward_by(model, "native")
    for vocab in (models.VOCAB, 20):
        for ours, theirs in zip(caches(model, 3), caches(model, 3), strict=True):
            with forward.prepared():
                assert forward.runners[0].decodes
                for cache in (ours, theirs):
                    read(forward, cache, text, lengths)
                wanted = by_levels(forward, theirs, text[:, :1], vocab)
                found = forward.best_chain(ours, text[:, :1], lengths, LEVELS, vocab)
            assert found is not None
            assert found.tolist() == wanted.tolist()
            assert len(set(found.flatten().tolist())) > 3, "a text that stands still shows nothing"
            assert (found < vocab).all()
            for one, other in zip(committed(ours, 3), committed(theirs, 3), strict=True):
                assert torch.equal(one, other)


def test_of_equal_logits_the_first_is_taken() -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    with torch.no_grad():
        model.lm_head.weight[7:] = model.lm_head.weight[7].clone()
    forward, cache = forward_by(model, "native"), next(caches(model, 1))
    with forward.prepared():
        read(forward, cache, torch.tensor([[5, 6, 7]]), [3])
        found = forward.best_chain(cache, torch.tensor([[9]]), [3], 8, models.VOCAB)
    assert found is not None
    assert found.max() <= 7


def test_nan_is_refused() -> None:
    model: Any = copy.deepcopy(models.target("llama-gqa", "fp32"))
    with torch.no_grad():
        model.lm_head.weight[models.VOCAB - 1] = float("nan")
    forward, cache = forward_by(model, "native"), next(caches(model, 1))
    with forward.prepared():
        read(forward, cache, torch.tensor([[5, 6, 7]]), [3])
        with pytest.raises(FloatingPointError, match="NaN"):
            forward.best_chain(cache, torch.tensor([[9]]), [3], 2, models.VOCAB)
        assert forward.best_chain(cache, torch.tensor([[9]]), [3], 2, models.VOCAB - 1) is not None


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}], ids=["raw", "penalty"])
def test_drafts_are_those_of_single_passes(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch, with padding; a law that is not the logits is applied level by level."""
    target: Any = models.target("llama-gqa", "fp32")
    draft = models.noisy_copy(target, 0.1)
    ids, mask = models.prompts((9, 4, 6), models.VOCAB, seed=3)
    calls, own = list[int](), Native.best_chain

    def counted(self: Native, part: Any, levels: int, vocab: int) -> Tensor:
        calls.append(levels)
        return own(self, part, levels, vocab)

    monkeypatch.setattr(Native, "best_chain", counted)
    call: dict[str, Any] = dict(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=None, **options
    )
    spec = specdec.Speculator(target, draft, k=4)
    text: Any = spec.generate(**call)
    told = spec.report
    assert bool(calls) == (not options)
    monkeypatch.setattr(Native, "decodes", property(lambda self: False))
    again: Any = spec.generate(**call)
    single = spec.report
    assert told is not None
    assert single is not None
    assert torch.equal(text, again)
    assert told.num_draft_tokens == single.num_draft_tokens > 0
    assert told.num_accepted_tokens == single.num_accepted_tokens > 0
    assert torch.equal(text, target.generate(**call, pad_token_id=models.PAD))
