"""Processors and criteria that may keep state are called as plain `generate` calls them: same calls, same text."""

from __future__ import annotations

import random
from typing import Any

import models
import plain_callbacks as callbacks
import pytest
import torch
from exact_law import tiny_llama
from plain_callbacks import SecondWind
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import specdec
from specdec import SpecReport, Speculator, UnsupportedArgumentError
from specdec.engine import Engine
from specdec.engine.lane import Lane
from specdec.plain_order import PlainBatch
from specdec.verify import purity

FAMILIES = ("llama-gqa", "mistral-window", "gpt2")
DRAFTS: tuple[dict[str, Any], ...] = (
    {"draft": "self", "k": 5},
    {"draft": "near", "k": 4},
    {"draft": "near", "tree": (3, 2, 1)},
    {"draft": "ngram", "k": 4},
    {"draft": None},
)


def drafting(family: str, chosen: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    options = dict(chosen)
    draft = options.pop("draft")
    return (models.draft(draft, family) if draft in models.DRAFTS else draft), options


def random_call(rng: random.Random) -> dict[str, Any]:
    """One call's settings: everything but the user's objects, which each side makes anew."""
    rows = rng.choice((1, 1, 2, 3))
    return {
        "lengths": tuple(rng.randint(2, 7) for _ in range(rows)),
        "processors": rng.sample(callbacks.PROCESSORS, rng.choice((0, 1, 1, 2))),
        "criteria": rng.sample(callbacks.CRITERIA, rng.choice((0, 0, 1))),
        "prefix_fn": rng.random() < 0.3,
        "arguments": {
            "max_new_tokens": rng.randint(1, 14),
            "eos_token_id": rng.choice((None, [2, 13], [5, 9, 17, 23])),
            "repetition_penalty": rng.choice((None, 1.3)),
            "return_dict_in_generate": True,
            "output_scores": rng.random() < 0.5,
        },
    }


def run(generate: Any, call: dict[str, Any], ids: Tensor, mask: Tensor) -> tuple[Any, callbacks.Log]:
    """What came, or the type of what was raised, and the log of all calls of the user's objects."""
    log: callbacks.Log = []
    own: list[callbacks.Log] = [[] for _ in call["processors"]]
    arguments = dict(call["arguments"])
    arguments["logits_processor"] = LogitsProcessorList(
        [_Both(kind(part), log) for kind, part in zip(call["processors"], own, strict=True)]
    )
    arguments["stopping_criteria"] = StoppingCriteriaList([kind(log) for kind in call["criteria"]])
    if call["prefix_fn"]:
        arguments["prefix_allowed_tokens_fn"] = callbacks.prefix_fn(log)
    try:
        out = generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **arguments)
    except (RuntimeError, ValueError) as fault:
        return type(fault), log
    return out, log


class _Both(LogitsProcessor):
    """Calls a processor and writes its call into the log of all."""

    def __init__(self, inner: Any, log: callbacks.Log):
        self.inner, self.log = inner, log

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        out: Tensor = self.inner(input_ids, scores)
        self.log.append((type(self.inner).__name__, input_ids.tolist()))
        return out


def compare(seed: int) -> SpecReport:
    rng = random.Random(seed)
    call, family = random_call(rng), rng.choice(FAMILIES)
    if not (call["processors"] or call["criteria"] or call["prefix_fn"]):
        call["processors"] = [callbacks.Counting]
    target: Any = models.target(family)
    ids, mask = models.prompts(call["lengths"], target.config.vocab_size, seed, period=3)
    draft, options = drafting(family, rng.choice(DRAFTS))
    spec = Speculator(target, draft, **options)
    wanted, calls = run(target.generate, call, ids, mask)
    out, log = run(spec.generate, call, ids, mask)
    assert calls, "nothing of the user's was called"
    if isinstance(wanted, type):
        assert out is wanted
    else:
        assert torch.equal(out.sequences, wanted.sequences)
        for ours, plains in zip(out.scores or (), wanted.scores or (), strict=True):
            row = 0 if len(call["lengths"]) > 1 else slice(None)  # a row that has ended has no scores of its own
            if call["arguments"]["eos_token_id"] is None or row != 0:
                torch.testing.assert_close(ours, plains, equal_nan=True)
    assert log == calls
    return spec.report or SpecReport()


@pytest.mark.parametrize("part", range(3))
def test_the_users_objects_are_called_as_plain_generate_calls_them(part: int) -> None:
    reports = [compare(1000 * part + number) for number in range(20)]
    assert sum(report.num_accepted_tokens for report in reports) > 20, "drafts were not made, or never kept"


@pytest.mark.parametrize("bug", ["asked about whole drafts", "stop rules asked late", "rows out of step"])
def test_calls_out_of_order_are_caught(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec import loop, plain_order

    if bug == "asked about whole drafts":
        monkeypatch.setattr(loop, "in_plain_order", lambda *_: [])
        monkeypatch.setattr("specdec.verify.law.is_pure", lambda processor: True)
    elif bug == "stop rules asked late":
        monkeypatch.setattr(plain_order.PlainBatch, "append", _asked_late)
    else:
        monkeypatch.setattr(plain_order, "all", lambda *_: True, raising=False)
    with pytest.raises((AssertionError, RuntimeError, IndexError)):
        compare_many(range(40))


def compare_many(seeds: range) -> None:
    for seed in seeds:
        compare(seed)


_APPEND = PlainBatch.append


def _asked_late(self: Any, tokens: Any) -> None:
    """Every second token is not shown to the stop rules."""
    if self.ids.shape[1] % 2:
        column = [tokens.get(place, 0) for place in range(len(self.rows))]
        self.ids = torch.cat([self.ids, self.ids.new_tensor(column)[:, None]], dim=1)
    else:
        _APPEND(self, tokens)


TINY = tiny_llama(0)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])


def test_pure_processors_are_asked_about_whole_drafts() -> None:
    target: Any = models.target("llama-gqa")
    ids, mask = models.prompts((5, 3), models.VOCAB, 0)
    asked: list[int] = []

    class Shy(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            asked.append(len(input_ids))
            return scores.masked_fill(torch.arange(scores.shape[1]) % 4 == input_ids[:, -1:] % 4, -9.0)

    class Heir(Shy):
        pass

    arguments: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
    spec: Any = Speculator(target, target, k=3)
    calls = {}
    for name, processor in (("unknown", Shy()), ("heir", Heir()), ("object", specdec.pure(Shy())), ("class", Shy())):
        if name == "class":
            specdec.pure(Shy)
            assert purity.is_pure(Shy())
            assert not purity.is_pure(Heir()), "a subclass may be anything"
        asked.clear()
        out: Any = spec.generate(ids, logits_processor=[processor], **arguments)
        calls[name] = len(asked)
        assert torch.equal(out, target.generate(ids, logits_processor=[processor], **arguments))
        assert spec.report is not None
        assert bool(spec.report.processor_calls) == (name in ("unknown", "heir"))
    assert calls["unknown"] == calls["heir"] == 12
    assert calls["object"] == calls["class"] > 12, "nodes that were never emitted are asked about as well"


def test_a_pure_prefix_function_and_the_unsatisfiable_branch() -> None:
    target: Any = models.target("llama-gqa")
    ids, mask = models.prompts((5, 3), models.VOCAB, 0)

    @specdec.pure
    def allowed(row: int, prefix: Tensor) -> list[int]:
        return [7 + row, 9 + int(prefix[-1]) % 3]

    for extra in ({}, {"no_repeat_ngram_size": 1}, {"bad_words_ids": [[7], [8], [9], [10], [11]]}):
        arguments: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 9, **extra}
        out: Any = Speculator(target, target, k=3).generate(ids, prefix_allowed_tokens_fn=allowed, **arguments)
        assert torch.equal(out, target.generate(ids, prefix_allowed_tokens_fn=allowed, **arguments))


def test_rows_in_which_nothing_is_possible_go_on_as_in_plain_generate() -> None:
    target: Any = models.target("llama-gqa")
    ids, mask = torch.arange(3, 41)[None], torch.ones(1, 38, dtype=torch.int64)
    for extra in ({"no_repeat_ngram_size": 1}, {"suppress_tokens": list(range(41)), "repetition_penalty": 1.3}):
        arguments: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "eos_token_id": None, **extra}
        for draft, k in ((target, 4), ("ngram", 3), (models.draft("near", "llama-gqa"), None)):
            out: Any = Speculator(target, draft, k=k).generate(ids, do_sample=False, **arguments)
            assert torch.equal(out, target.generate(ids, do_sample=False, **arguments))


def test_scores_that_are_none_are_refused_by_name() -> None:
    class Careless(LogitsProcessor):
        def __call__(self: Any, input_ids: Tensor, scores: Tensor) -> Any:
            return self.answer

    for answer in (None, "scores", torch.zeros(1, 3), torch.zeros(1, TINY.config.vocab_size, dtype=torch.int64)):
        given: Any = [Careless()]
        given[0].answer = answer
        with pytest.raises(UnsupportedArgumentError, match="Careless: expected it to return scores"):
            Speculator(TINY, TINY, k=2).generate(PROMPT, max_new_tokens=3, logits_processor=given)


def test_the_report_names_what_was_called_in_plain_order() -> None:
    spec: Any = Speculator(TINY, TINY, k=2)
    spec.generate(PROMPT, max_new_tokens=5, do_sample=False, logits_processor=[SecondWind()], repetition_penalty=1.2)
    assert spec.report is not None
    assert spec.report.processor_calls == {"RepetitionPenaltyLogitsProcessor": 5, "SecondWind": 5}
    assert "SecondWind 5 calls" in spec.report.summary()


def test_what_a_processor_raises_reaches_the_caller_and_leaves_nothing_behind() -> None:
    class Moody(SecondWind):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if super().__call__(input_ids, scores) is not None and self.calls == 4:
                raise KeyError("not today")
            return scores

    spec: Any = Speculator(TINY, TINY, k=2)
    wanted = spec.generate(PROMPT, max_new_tokens=6, do_sample=False)
    with pytest.raises(KeyError, match="not today"):
        spec.generate(PROMPT, max_new_tokens=6, do_sample=False, logits_processor=[Moody()])
    again = spec.generate(PROMPT, max_new_tokens=6, do_sample=False)
    assert isinstance(wanted, Tensor)
    assert isinstance(again, Tensor)
    assert torch.equal(wanted, again)


def test_requests_of_an_engine_call_their_processors_as_plain_generate_does() -> None:
    target: Any = models.target("llama-gqa")
    ids, _ = models.prompts((6,), models.VOCAB, 1, period=3)
    kinds = [*callbacks.PROCESSORS, *callbacks.PROCESSORS]
    with Engine(target, target, k=3) as engine:
        logs: list[callbacks.Log] = [[] for _ in kinds]
        handles = [
            engine.submit(
                ids[0], max_new_tokens=9 + i % 3, do_sample=False, pad_token_id=0, logits_processor=[kind(log)]
            )
            for i, (kind, log) in enumerate(zip(kinds, logs, strict=True))
        ]
        for i, (kind, log, handle) in enumerate(zip(kinds, logs, handles, strict=True)):
            calls: callbacks.Log = []
            wanted = target.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=9 + i % 3, do_sample=False, pad_token_id=0,
                logits_processor=[kind(calls)],
            )  # fmt: skip
            result = handle.result(60)
            assert result.token_ids == wanted[0, ids.shape[1] :].tolist()
            assert log == calls
        assert sum(handle.result().num_accepted_tokens for handle in handles) > 2, (
            "the processors hardly let drafts through, but some"
        )


def test_an_interrupted_step_asks_nobody_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C behind the decision: the step is taken again, its processors and criteria answer from memory."""
    target: Any = models.target("llama-gqa")
    ids, _ = models.prompts((6,), models.VOCAB, 1, period=3)
    arguments: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    calls: callbacks.Log = []
    wanted = target.generate(
        ids, attention_mask=torch.ones_like(ids), logits_processor=[callbacks.InOrder(calls)], **arguments
    )
    advance, left = Lane.advance, [2, 5, 6]

    def interrupted(self: Lane, *given: Any) -> Any:
        left[:] = [count - 1 for count in left]
        if 0 in left:
            raise KeyboardInterrupt
        return advance(self, *given)

    monkeypatch.setattr(Lane, "advance", interrupted)
    log: callbacks.Log = []
    engine = Engine(target, target, k=3)
    handle = engine.submit(ids[0], logits_processor=[callbacks.InOrder(log)], **arguments)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            engine.run()
    engine.run()
    assert handle.result(0).token_ids == wanted[0, 6:].tolist()
    assert log == calls
    engine.close()
