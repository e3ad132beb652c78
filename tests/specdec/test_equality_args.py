"""Greedy equality with plain `generate` under its arguments: processors, stopping, stop strings, lengths, caches."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import arguments
import checker
import models
import pytest
import torch
from checker import Case, Drafting, NearTies
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

from specdec.kv.versions import CACHE_KEYWORD, cache_of
from specdec.stopping import StopRules
from specdec.verify import law

ARGUMENT_FAMILIES = ("llama-gqa", "qwen2", "mistral-window", "gpt2", "gemma")
LENGTHS = st.lists(st.integers(1, 8), min_size=1, max_size=5).map(tuple)
EOS = st.sampled_from([models.EOS, (2, 5, 9, 17, 23), None])


@pytest.fixture(scope="module")
def ties() -> Iterator[NearTies]:
    counted = NearTies()
    yield counted
    counted.assert_rare()


def cases(eos: st.SearchStrategy[Any] = EOS, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    fields: dict[str, st.SearchStrategy[Any]] = dict(
        family=st.sampled_from(ARGUMENT_FAMILIES),
        dtype=st.sampled_from(["fp64", "fp64", "fp32"]),
        lengths=LENGTHS,
        drafting=checker.draftings(("near", "far", "self", "padded-vocab")),
        new_tokens=st.integers(1, 16),
        seed=st.integers(0, 2),
        prompt_seed=st.integers(0, 10**6),
        period=st.sampled_from([0, 2]),
        eos=eos,
    )
    return st.builds(Case, **{**fields, **fixed})


@pytest.mark.filterwarnings("ignore:Unfeasible length constraints")  # a minimum beyond the maximum: plain warns, too
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=50)
@given(data=st.data())
def test_processors(part: int, ties: NearTies, data: st.DataObject) -> None:
    eos = st.sampled_from([models.EOS, (2, 5, 9, 17, 23)])  # plain's decay of length refuses to work without one
    checker.compare(data.draw(cases(eos=eos, arguments=arguments.processors())), ties)


@pytest.mark.parametrize("position", range(len(arguments.PROCESSORS)))
def test_each_processor_alone_on_a_tree_and_on_a_chain(position: int) -> None:
    """Every entry of the pool is exercised by a tree and by a chain, whatever hypothesis drew."""
    given_arguments = arguments.PROCESSORS[position]
    for drafting in (Drafting("tree", "near", widths=(2, 2)), Drafting("chain", "near", k=5)):
        case = Case(
            "llama-gqa", "fp64", (5, 2, 4), drafting, 14, prompt_seed=3, eos=models.EOS, arguments=given_arguments
        )
        checker.compare(case, NearTies())


@settings(max_examples=70)
@given(cases(new_tokens=st.just(18)), arguments.criteria())
def test_own_stopping_criteria(ties: NearTies, case: Case, criteria: Any) -> None:
    """Without an end-of-sequence token plain decoding keeps extending finished rows until the last one stops."""
    checker.compare(case, ties, stopping_criteria=criteria)


STOP_STRINGS = st.lists(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=3), min_size=1, max_size=4)


@settings(max_examples=60)
@given(cases(new_tokens=st.just(18), family=st.sampled_from(["llama-gqa", "qwen2", "gemma"])), STOP_STRINGS)
def test_stop_strings(ties: NearTies, case: Case, strings: list[str]) -> None:
    checker.compare(case, ties, stop_strings=strings, tokenizer=arguments.tokenizer())


def test_stop_strings_of_these_cases_really_stop() -> None:
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=4), 30)
    report = checker.compare(case, NearTies(), stop_strings=list("abcdefghijklm"), tokenizer=arguments.tokenizer())
    assert report.num_emitted_tokens < 30


@pytest.mark.parametrize("explicit", [{}, {"stop_strings": None}], ids=["the model's own", "explicitly none"])
def test_stop_strings_of_the_models_own_config(explicit: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=4), 30)
    monkeypatch.setattr(case.target.generation_config, "stop_strings", list("abcdefghijklm"), raising=False)
    report = checker.compare(case, NearTies(), tokenizer=arguments.tokenizer(), **explicit)
    assert (report.num_emitted_tokens < 30) == (not explicit)
    assert case.target.generation_config.stop_strings == list("abcdefghijklm")


@pytest.mark.parametrize("limits", [(9, 12), (12, 9)])
def test_of_several_limits_the_lowest_counts(limits: tuple[int, int]) -> None:
    case = Case("llama-gqa", "fp64", (5, 3), Drafting("chain", "self", k=4), 30, eos=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # plain generate has a word to say on criteria that arguments stand for
        criteria = StoppingCriteriaList(map(MaxLengthCriteria, limits))
        report = checker.compare(case, NearTies(), stopping_criteria=criteria)
    assert report.num_emitted_tokens == 2 * (9 - 5)


def test_stop_strings_of_a_given_configuration_stay_in_it() -> None:
    case, strings = Case("llama-gqa", "fp64", (5,), Drafting("chain", "near", k=4), 30), list("abcdefghijklm")
    config = GenerationConfig(stop_strings=strings, do_sample=False, max_new_tokens=30)
    for _ in range(2):
        report = checker.compare(case, NearTies(), generation_config=config, tokenizer=arguments.tokenizer())
        assert report.num_emitted_tokens < 30
        assert config.stop_strings == strings


@settings(max_examples=50)
@given(cases(), st.integers(9, 24), st.sampled_from([None, 1, 2, 3, 5]))
def test_max_length_and_chunked_prefill(ties: NearTies, case: Case, limit: int, chunk: int | None) -> None:
    checker.compare(case, ties, max_new_tokens=None, max_length=limit, prefill_chunk_size=chunk)


def second_turn(sequences: torch.Tensor, mask: torch.Tensor, extra: torch.Tensor) -> dict[str, Any]:
    """The inputs of a chat's next turn: the text so far (its padding masked) and new tokens for each row."""
    ids = torch.cat([sequences, extra], 1)
    grown = (ids != models.PAD).long()
    grown[:, : mask.shape[1]] = mask
    return dict(input_ids=ids, attention_mask=grown)


def chat(case: Case, generate: Callable[..., Any]) -> list[Any]:
    """Two turns on one cache; returns both turns' outputs."""
    inputs = case.inputs()
    extra = models.prompts((4,) * len(case.lengths), case.vocab, case.prompt_seed + 1)[0]
    cache = DynamicCache()
    first = generate(**inputs, **{CACHE_KEYWORD: cache}, return_dict_in_generate=True)
    turn = {**inputs, **second_turn(first.sequences, inputs["attention_mask"], extra)}
    second = generate(**turn, **{CACHE_KEYWORD: cache_of(first)}, return_dict_in_generate=True)
    return [first, second]


@pytest.mark.parametrize("part", range(2))
@settings(max_examples=35)
@given(data=st.data())
def test_a_chat_on_one_cache(part: int, ties: NearTies, data: st.DataObject) -> None:
    """Second turn equal, and plain decoding continues from our returned cache as from its own."""
    family = st.sampled_from(["llama-gqa", "qwen2", "gpt2", "gemma", "mistral"])
    case = data.draw(cases(family=family, new_tokens=st.integers(2, 8), eos=st.sampled_from([2, (2, 5, 9), None])))
    target: Any = case.target
    plain, ours = chat(case, target.generate), chat(case, case.speculator().generate)
    ties.check(case, lambda **more: plain[1] if more else plain[1].sequences, lambda: ours[1].sequences)
    assert type(cache_of(ours[1])) is type(cache_of(plain[1]))
    if not torch.equal(plain[1].sequences, ours[1].sequences):
        return  # an allowed near-tie: the two texts go their own ways
    extra = models.prompts((2,) * len(case.lengths), case.vocab, case.prompt_seed + 2)[0]
    mask = second_turn(plain[0].sequences, case.inputs()["attention_mask"], extra[:, :0])["attention_mask"]
    ends = []
    for turn in (plain[1], ours[1]):
        inputs = {**case.inputs(), **second_turn(turn.sequences, mask, extra)}
        assert cache_of(turn).get_seq_length() == turn.sequences.shape[1] - 1
        cache = copy.deepcopy(cache_of(turn))
        ends.append(
            target.generate(**inputs, **{CACHE_KEYWORD: cache}, return_dict_in_generate=True, output_scores=True)
        )
    ties.check(case, lambda **more: ends[0] if more else ends[0].sequences, lambda: ends[1].sequences)


def test_our_cache_of_a_windowed_model_is_usable_by_plain_decoding() -> None:
    case = Case("mistral-window", "fp64", (7,), Drafting("tree", "near", widths=(2, 2)), 12)
    target: Any = case.target
    inputs = {**case.inputs(), "eos_token_id": None}
    turns = [
        generate(**inputs, return_dict_in_generate=True) for generate in (target.generate, case.speculator().generate)
    ]
    extra = torch.tensor([[5, 6, 7]])
    texts = []
    for turn in turns:
        more = {**inputs, **second_turn(turn.sequences, inputs["attention_mask"], extra)}
        texts.append(target.generate(**more, **{CACHE_KEYWORD: cache_of(turn)}))
    assert torch.equal(texts[0], texts[1])


def test_several_greedy_returns_are_refused_as_plain_refuses_them() -> None:
    case = Case("llama-gqa", "fp64", (4,), Drafting("chain", "near"), 4)
    target: Any = case.target
    for generate in (target.generate, case.speculator().generate):
        with pytest.raises(ValueError, match="num_return_sequences"):
            generate(**case.inputs(), num_return_sequences=2)


def compare_several(drafting: Drafting, **given_arguments: Any) -> None:
    """A few cases in which a broken variant has every chance to show."""
    for prompt_seed in range(6):
        case = Case("llama-gqa", "fp64", (5, 2), drafting, 20, prompt_seed=prompt_seed)
        checker.compare(case, NearTies(), **given_arguments)


def test_a_law_that_forgets_the_drafted_prefix_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(law, "_path", lambda tokens, parents, node: [])
    with pytest.raises(AssertionError, match="first difference"):
        compare_several(Drafting("chain", "near", k=6), no_repeat_ngram_size=2)


def test_a_stop_rule_that_reads_only_the_last_token_of_a_run_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = StopRules.scan

    def last_only(self: StopRules, row: int, tokens: list[int], scores: Any) -> None:
        original(self, row, tokens[-1:], None if scores is None else scores[-1:])

    monkeypatch.setattr(StopRules, "scan", last_only)
    with pytest.raises(AssertionError):
        compare_several(Drafting("chain", "self", k=6), eos_token_id=[5, 9, 17, 23, 30, 31])
