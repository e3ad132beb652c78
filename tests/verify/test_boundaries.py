"""Edges where a draft could leak into what the caller sees: ends of text, small vocabularies, callbacks."""

from __future__ import annotations

import itertools
from typing import Any

import models
import pytest
import torch
from transformers import FalconConfig, FalconForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

import specdec
from specdec import NgramDrafter, Speculator, UnsupportedArgumentError, UnsupportedModelError

TARGET: Any = models.target("llama-gqa", "fp64", 0)
PROMPT = torch.tensor([[3, 5, 7, 11]])
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(PROMPT)}


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("end", range(1, 7))
def test_processors_are_not_asked_beyond_the_end_of_a_text(k: int, end: int) -> None:
    """The text is forced to end at token `end`; a grammar that raises on anything after it must never be asked."""
    eos = 2

    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        emitted = ids[PROMPT.shape[1] :].tolist()
        assert eos not in emitted, "asked about a prefix beyond the end of the text"
        return [eos] if len(emitted) == end else [token for token in range(3, 20)]

    settings = {**GREEDY, "eos_token_id": eos, "pad_token_id": 0, "prefix_allowed_tokens_fn": allowed}
    ours = Speculator(TARGET, TARGET, k=k).generate(PROMPT, **settings)
    assert torch.equal(ours, TARGET.generate(PROMPT, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("branches", [1, 3])
def test_pure_functions_are_not_asked_below_a_forbidden_token(branches: int) -> None:
    """However deep: an n-gram draft goes on behind a token that the function itself forbids."""
    prompt = torch.tensor([[3, 4, 5, 6, 3, 7, 4, 5, 3]])

    @specdec.pure
    def allowed(_: int, ids: torch.Tensor) -> list[int]:
        assert 4 not in ids[prompt.shape[1] :].tolist(), "asked about a prefix that it has forbidden"
        return [token for token in range(3, 20) if token != 4]

    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 12,
        "eos_token_id": None,
        "prefix_allowed_tokens_fn": allowed,
    }
    spec = Speculator(TARGET, NgramDrafter(k=4, branches=branches))
    ours: Any = spec.generate(prompt, **settings)
    assert torch.equal(ours, TARGET.generate(prompt, **settings))
    assert spec.report is not None
    assert spec.report.num_draft_tokens > 3


def test_pure_functions_are_asked_about_the_texts_of_their_rows_alone() -> None:
    """Rows that have come less far than others stand in for nothing that they are not."""
    ids, mask = models.prompts((4, 4, 4), models.VOCAB, 2)

    @specdec.pure
    def allowed(row: int, seen: torch.Tensor) -> list[int]:
        text = seen.tolist()
        assert text[:4] == ids[row].tolist()
        assert all(one != other for one, other in itertools.pairwise(text[3:])), "asked about what it has forbidden"
        return [token for token in range(3, 9 + row) if token != text[-1]]

    settings: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 14,
        "eos_token_id": None,
        "prefix_allowed_tokens_fn": allowed,
    }
    draft: Any = models.draft("near", "llama-gqa")
    ours: Any = Speculator(TARGET, draft, k=3).generate(ids, attention_mask=mask, **settings)
    assert torch.equal(ours, TARGET.generate(ids, attention_mask=mask, **settings))


def test_a_draft_with_fewer_ids_reads_any_text() -> None:
    small: Any = models.target("llama-gqa", "fp64", 1)
    cut = type(small)(type(small.config)(**{**small.config.to_dict(), "vocab_size": 8})).double().eval()
    spec = Speculator(TARGET, cut, k=3)
    ours = spec.generate(PROMPT, eos_token_id=None, **GREEDY)
    assert torch.equal(ours, TARGET.generate(PROMPT, eos_token_id=None, **GREEDY))  # type: ignore[arg-type]
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0
    assert spec.report.num_draft_tokens > 0


def test_a_call_from_a_callback_is_refused_and_the_speculator_lives_on() -> None:
    spec = Speculator(TARGET, "ngram")

    def nested(_: Any) -> None:
        spec.generate(PROMPT, **GREEDY)

    with pytest.raises(UnsupportedArgumentError, match="already decoding"):
        spec.generate(PROMPT, on_step=nested, **GREEDY)
    assert torch.equal(spec.generate(PROMPT, **GREEDY), TARGET.generate(PROMPT, **GREEDY))  # type: ignore[arg-type]


def test_a_padded_call_of_the_target_from_a_callback_keeps_its_mask() -> None:
    ids = torch.tensor([[0, 0, 3, 5], [4, 6, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        alone = TARGET(ids, attention_mask=mask, position_ids=positions).logits[:, -1]
    seen: list[torch.Tensor] = []

    def look(_: Any) -> None:
        with torch.no_grad():
            seen.append(TARGET(ids, attention_mask=mask, position_ids=positions).logits[:, -1])

    Speculator(TARGET, "ngram").generate(PROMPT, on_step=look, **GREEDY)
    assert seen
    assert all(torch.allclose(alone, logits, atol=1e-10) for logits in seen)


@pytest.mark.parametrize(
    "arguments",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "high"}],
    ids=["contrastive-search", "dola"],
)
@pytest.mark.filterwarnings("ignore")
def test_modes_that_are_neither_greedy_nor_sampling_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises((UnsupportedArgumentError, ValueError)):
        Speculator(TARGET, "ngram").generate(PROMPT, **GREEDY, **arguments)


def test_the_greedy_rule_is_refused_where_sampling_was_asked_for() -> None:
    with pytest.raises(UnsupportedArgumentError, match="argmax"):
        Speculator(TARGET, "ngram", rule="greedy").generate(PROMPT, do_sample=True, max_new_tokens=4, seed=1)


def test_models_that_place_tokens_by_slot_are_refused() -> None:
    falcon = FalconForCausalLM(
        FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True)
    )
    local = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        )
    )
    for model in (falcon, local):
        with pytest.raises(UnsupportedModelError, match="by cache slot"):
            Speculator(model, "ngram")
