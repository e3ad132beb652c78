"""Returned objects: the fields, lengths, types and numbers of plain greedy `generate`."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from checker import Case, Drafting
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from specdec.kv import UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORD, cache_of

FAMILIES = ("llama-gqa", "qwen2", "mistral-window", "gpt2", "gemma")
DRAFTINGS = [
    Drafting("none"),
    Drafting("chain", "near", k=4),
    Drafting("tree", "near", widths=(3, 2, 1)),
    Drafting("ngram", k=5, branches=2),
]
ALL: dict[str, Any] = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


def both(case: Case, **arguments: Any) -> tuple[Any, Any]:
    target: Any = case.target
    inputs = {**case.inputs(), **arguments}
    return target.generate(**inputs), case.speculator().generate(**inputs)


def live_tokens(sequences: torch.Tensor, prompt: int, eos: set[int]) -> list[int]:
    """Emitted tokens of each row up to and including its end of sequence."""
    counts = []
    for row in sequences[:, prompt:].tolist():
        counts.append(next((i + 1 for i, token in enumerate(row) if token in eos), len(row)))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: drafting.kind)
def test_scores_logits_and_sequences_equal_plain(family: str, drafting: Drafting) -> None:
    case = Case(family, "fp64", (6, 3, 4), drafting, new_tokens=14, prompt_seed=11)
    eos = {2, 5, 9, 17}
    for extra in ({}, {"repetition_penalty": 1.3, "min_new_tokens": 3}):
        plain, ours = both(case, eos_token_id=sorted(eos), **ALL, **extra)
        assert type(ours) is type(plain)
        assert ours.keys() == plain.keys()
        assert ours.sequences.dtype == plain.sequences.dtype
        assert torch.equal(ours.sequences, plain.sequences)
        counts = live_tokens(plain.sequences, 6, eos)
        for name in ("scores", "logits"):
            mine, theirs = ours[name], plain[name]
            assert type(mine) is type(theirs) is tuple
            assert len(mine) == len(theirs) == plain.sequences.shape[1] - 6
            for t, (got, wanted) in enumerate(zip(mine, theirs, strict=True)):
                assert got.shape == wanted.shape
                assert got.dtype == wanted.dtype == torch.float32
                rows = [row for row, count in enumerate(counts) if t < count]
                # Both sides hand out float32 copies of float64 logits: one rounding apart at most.
                torch.testing.assert_close(got[rows], wanted[rows], rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(
    "drafting", [*DRAFTINGS[:3], Drafting("chain", "self", k=6)], ids=lambda d: f"{d.kind}-{d.model}"
)
def test_scores_behind_a_rows_end_are_zero(drafting: Drafting) -> None:
    case = Case("llama-gqa", "fp64", (6, 3, 4), drafting, new_tokens=14, prompt_seed=11)
    eos = {2, 5, 9, 17}
    _, ours = both(case, eos_token_id=sorted(eos), **ALL)
    counts = live_tokens(ours.sequences, 6, eos)
    assert len(set(counts)) > 1
    for name in ("scores", "logits"):
        for t, values in enumerate(ours[name]):
            assert [bool((row != 0).any()) for row in values] == [t < count for count in counts]


class RowsEndApart(StoppingCriteria):
    """Without an end-of-sequence rule: stops row `i` of a batch, or a row alone, once its own text is long enough."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([len(set(row[6:])) >= 3 for row in input_ids.tolist()])


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: drafting.kind)
@pytest.mark.parametrize("new_tokens", [4, 14])
def test_where_no_row_is_padded_every_score_is_plains(drafting: Drafting, new_tokens: int) -> None:
    """Finished rows go on while others run: what they are given there is part of the output."""
    case = Case("llama-gqa", "fp64", (6, 3, 4), drafting, new_tokens=new_tokens, prompt_seed=11)
    for criteria in ([], [RowsEndApart()]):
        plain, ours = both(case, eos_token_id=None, stopping_criteria=StoppingCriteriaList(criteria), **ALL)
        assert torch.equal(ours.sequences, plain.sequences)
        for name in ("scores", "logits"):
            assert len(ours[name]) == len(plain[name]) == plain.sequences.shape[1] - 6
            for got, wanted in zip(ours[name], plain[name], strict=True):
                torch.testing.assert_close(got, wanted, rtol=2e-7, atol=1e-9)


def test_transition_scores_can_be_computed_from_our_output() -> None:
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=4), 10)
    target: Any = case.target
    scores = [
        target.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
        for out in both(case, eos_token_id=None, **ALL)
    ]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("drafting", DRAFTINGS, ids=lambda drafting: drafting.kind)
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_the_returned_cache_has_plains_type_length_and_content(family: str, drafting: Drafting) -> None:
    case = Case(family, "fp64", (6, 3, 4), drafting, new_tokens=12, prompt_seed=11)
    inputs = case.inputs()
    for eos in (None, [5, 9, 17]):
        plain, ours = both(case, return_dict_in_generate=True, eos_token_id=eos)
        assert torch.equal(ours.sequences, plain.sequences)
        mine, theirs = cache_of(ours), cache_of(plain)
        assert type(mine) is type(theirs) is DynamicCache
        width = plain.sequences.shape[1] - 1
        assert mine.get_seq_length() == theirs.get_seq_length() == width
        counts = live_tokens(plain.sequences, 6, set(eos or ()))
        real = torch.zeros(3, width, dtype=torch.bool)
        for row, count in enumerate(counts):
            real[row, : 6 + count - 1] = True
        real[:, :6] &= inputs["attention_mask"].bool()
        for got, wanted in zip(mine.layers, theirs.layers, strict=True):
            for name in ("keys", "values"):
                a, b = getattr(got, name), getattr(wanted, name)
                assert a.shape == b.shape
                assert a.dtype == b.dtype
                torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_callers_cache_is_extended_in_place_as_plain_does(as_dict: bool) -> None:
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=3), 8)
    target: Any = case.target
    lengths = []
    for generate in (target.generate, case.speculator().generate):
        cache = DynamicCache()
        out = generate(**case.inputs(), **{CACHE_KEYWORD: cache}, return_dict_in_generate=as_dict)
        assert not as_dict or cache_of(out) is cache
        lengths.append(cache.get_seq_length())
    assert lengths[0] == lengths[1] > 5


def test_a_callers_cache_of_the_whole_prompt_is_refused() -> None:
    """Nothing would be left to read, so that nothing could be said of the next token; one column less is enough."""
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=3), 8)
    target: Any = case.target
    ids = case.inputs()["input_ids"]
    for cached in (5, 4):
        cache = DynamicCache()
        target(ids[:, :cached], **{CACHE_KEYWORD: cache})
        if cached == 5:
            with pytest.raises(UnsupportedArgumentError, match="at least one token that is not cached"):
                case.speculator().generate(**case.inputs(), **{CACHE_KEYWORD: cache})
            continue
        ours = case.speculator().generate(**case.inputs(), **{CACHE_KEYWORD: cache})
        assert torch.equal(ours, target.generate(**case.inputs()))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"output_scores": True},
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_logits": True},
        {"return_dict_in_generate": True, "output_scores": True},
    ],
    ids=str,
)
def test_only_what_was_asked_for_is_there(arguments: dict[str, Any]) -> None:
    case = Case("llama-gqa", "fp64", (5, 2), Drafting("tree", "near", widths=(2, 2)), 6)
    plain, ours = both(case, **arguments)
    assert type(ours) is type(plain)
    if arguments.get("return_dict_in_generate"):
        for name in ("sequences", "scores", "logits", "attentions", "hidden_states", CACHE_KEYWORD):
            assert (ours[name] if name in ours else None) is None or name in plain
            assert type(getattr(ours, name)) is type(getattr(plain, name))


def test_text_stops_inside_an_accepted_run_exactly_where_plain_stops() -> None:
    """The target drafts for itself: every run is fully accepted, so each stop falls inside one."""
    case = Case("llama-gqa", "fp64", (6,), Drafting("chain", "self", k=8), 24)
    target: Any = case.target
    free = target.generate(**{**case.inputs(), "eos_token_id": None})[0, 6:].tolist()
    cut = 0
    for position, token in enumerate(free):
        if token in free[:position]:
            continue
        plain, ours = both(case, eos_token_id=token)
        assert torch.equal(plain, ours)
        assert ours.shape[1] == 6 + position + 1
        cut += position % 9 != 8
    assert cut >= 5


def test_the_report_counts_what_was_returned() -> None:
    case = Case("llama-gqa", "fp64", (6, 3, 4), Drafting("chain", "near", k=4), 14, prompt_seed=11)
    speculator = case.speculator()
    traces: list[Any] = []
    out = speculator.generate(**{**case.inputs(), "eos_token_id": [5, 9, 17]}, on_step=traces.append)
    report = speculator.report
    emitted = sum(live_tokens(out, 6, {5, 9, 17}))
    assert report.num_emitted_tokens == emitted == sum(len(run) for trace in traces for run in trace.emitted)
    assert report.num_steps == len(traces)
    for row in range(3):
        runs = [trace.emitted[trace.rows.index(row)] for trace in traces if row in trace.rows]
        text = [token for run in runs for token in run]
        assert text == out[row, 6 : 6 + len(text)].tolist()
    assert models.PAD not in out[:, -1] or len(set(live_tokens(out, 6, {5, 9, 17}))) > 1
