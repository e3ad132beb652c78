"""What makes a text of tokens: stop strings, penalties, single tokens; each against its definition."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import byte_tokenizer
from transformers import LogitsProcessorList

from specdec import Speculator
from specdec.serve.answers import ChatForm, CompletionForm, event
from specdec.serve.choice import Piece
from specdec.serve.processors import Biases, CountPenalties, StopTexts
from specdec.serve.stops import StopFilter
from specdec.serve.token_texts import TokenTexts
from specdec.verify.purity import is_pure

FAMILY = "llama-gqa"
SHORT = st.text("ab\n", min_size=1, max_size=4)


@given(st.lists(st.text("ab\n", max_size=4), max_size=12), st.lists(SHORT, max_size=3))
def test_a_text_ends_before_its_first_stop_string_however_it_is_cut(parts: list[str], stops: list[str]) -> None:
    found, out = StopFilter(stops), []
    for end in range(1, len(parts) + 1):
        out.append(found.push(parts[end - 1]))
        text = "".join(parts[:end])
        hit = [stop for stop in stops if stop in text]
        assert found.stopped == bool(hit)
        if hit:
            assert "".join(out) == text[: min(text.index(stop) for stop in hit)]
            return
        assert text.startswith("".join(out))
        rest = text[len("".join(out)) :]
        assert not rest or any(stop.startswith(rest) for stop in stops), "held back without need"
    assert "".join(out) + found.flush() == "".join(parts)


@given(st.text(max_size=6), st.booleans(), st.booleans())
def test_a_chunk_made_from_prepared_parts_is_the_encoded_one(text: str, chat: bool, with_usage: bool) -> None:
    kind = ChatForm if chat else CompletionForm
    form = kind('a "model" of any text', TokenTexts(byte_tokenizer()), None, False, with_usage)
    for piece in (Piece("other"), Piece(text), Piece(text, finish_reason="stop")):
        assert form.chunk(3, piece, first=False) == event(form._chunk(3, piece, first=False))


def penalised(ids: list[int], scores: torch.Tensor, begin: int, presence: float, frequency: float) -> torch.Tensor:
    out = scores.clone()
    for token in set(ids[begin:]):
        out[token] -= ids[begin:].count(token) * frequency + presence
    return out


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12), st.floats(-2, 2), st.floats(-2, 2))
def test_penalties_are_openais(ids: list[int], presence: float, frequency: float) -> None:
    scores = torch.linspace(-3, 3, 7).expand(2, -1)
    rows = [ids, ids[::-1]]
    found = CountPenalties(2, presence, frequency)(torch.tensor(rows), scores)
    for row, one in zip(rows, found, strict=True):
        torch.testing.assert_close(one, penalised(row, scores[0], 2, presence, frequency))


def test_biases_are_added() -> None:
    found = Biases({3: 5.0, 0: -1.0})(torch.tensor([[1]]), torch.zeros(1, 5))
    assert found.tolist() == [[-1.0, 0.0, 0.0, 5.0, 0.0]]


def test_drafts_are_judged_under_penalties_as_ever() -> None:
    """Several tokens a pass, and the text of plain decoding."""
    target: Any = models.target(FAMILY)
    draft = models.draft("near", FAMILY)
    prompt = torch.tensor([[5, 6, 7, 8]])
    own = LogitsProcessorList([CountPenalties(4, 0.4, 0.3), Biases({9: 1.0})])
    assert all(map(is_pure, own))
    spec = Speculator(target, draft, k=3)
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out: Any = spec.generate(prompt, **options, logits_processor=own)
    plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), **options, logits_processor=own)
    assert torch.equal(out, plain)
    assert not torch.equal(plain, target.generate(prompt, attention_mask=torch.ones_like(prompt), **options))
    assert spec.report is not None
    assert spec.report.num_steps < 39
    assert not spec.report.processor_calls, "called in plain order"


def test_a_criterion_stops_at_the_token_that_completes_a_stop_string() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("abcabd").input_ids
    criterion = StopTexts(tokenizer, ["bd"], 2)
    told = [bool(criterion(torch.tensor([ids[:end]]), None)) for end in range(3, len(ids) + 1)]
    assert told == [False, False, False, True]


@pytest.mark.parametrize("text", ["a", "é", "日", "🙂"])
def test_bytes_of_tokens_join_to_the_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    texts = TokenTexts(tokenizer)
    ids = tokenizer(text).input_ids
    assert bytes(byte for token in ids for byte in texts.bytes(token)).decode() == text
    assert all(len(texts.text(token)) == 1 for token in ids)
