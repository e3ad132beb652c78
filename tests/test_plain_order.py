"""Processors and criteria that may keep state are called as plain `generate` calls them: same calls, same text."""

from __future__ import annotations

import random
from typing import Any

import models
import numpy as np
import plain_callbacks as callbacks
import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from law_checks import must_be_caught
from stats import g_test, g_test_strata, judge
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import specdec
from specdec import SpecReport, Speculator, UnsupportedArgumentError
from specdec.deciding import read_verdict
from specdec.engine import Engine
from specdec.plain_order import PlainBatch, PlainOrder
from specdec.stopping import StopRules
from specdec.verify import DraftTree, NoiseStream, Rows, Topology, make_rule, purity

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


class SecondWind(LogitsProcessor):
    """Turns the law of every second call upside down; state that plain order alone keeps right."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return -scores if self.calls % 2 == 0 else scores


def law_of_two() -> Tensor:
    """The joint law of two tokens under SecondWind, by enumeration: float64 `[vocab, vocab]`."""
    vocab = TINY.config.vocab_size
    with torch.no_grad():
        first = TINY(PROMPT).logits[0, -1].double().softmax(-1)
        tails = torch.arange(vocab)[:, None]
        second = (-TINY(torch.cat([PROMPT.expand(vocab, -1), tails], 1)).logits[:, -1]).double().softmax(-1)
    return first[:, None] * second


def judged(tokens: Tensor) -> None:
    vocab = TINY.config.vocab_size
    counts = torch.bincount(tokens[:, 0] * vocab + tokens[:, 1], minlength=vocab**2).numpy()
    judge(g_test(counts, law_of_two().numpy().ravel()), "law of two tokens under a processor with state")


def test_sampled_law_of_a_processor_with_state() -> None:
    """Rows of a call keep step, so one processor serves thousands; a run is cut at the first row that leaves it."""
    spec = Speculator(TINY, noisy_copy(TINY, 1), k=2)
    out: Any = spec.generate(
        PROMPT, do_sample=True, top_k=0, max_new_tokens=2, num_return_sequences=12_000, seed=1,
        attention_mask=torch.ones_like(PROMPT), logits_processor=[SecondWind()],
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.rule == "rejection"
    assert spec.report.num_accepted_tokens > 3_000
    judged(out[:, PROMPT.shape[1] :])


ROWS, IDS = 4_000, 6


def one_step(rule: str, bug: bool = False) -> tuple[list[np.ndarray], list[Tensor], int]:
    """Walks one drafted step of many rows, each a batch of its own: counts and laws of the first token, then of the
    second one after each kept first one; and how many runs had three tokens.

    Rows read logits from a table by their last token; SecondWind turns the second law upside down.
    """
    generator = torch.Generator().manual_seed(3)
    table = torch.randn(IDS, IDS, generator=generator)
    q = torch.softmax(0.8 * table + 0.3 * torch.randn(IDS, IDS, generator=generator), -1)
    roots = torch.zeros(ROWS, 1, dtype=torch.int64)
    if rule == "recursive_rejection":
        pair = torch.multinomial(q[0].expand(ROWS, -1), 2, generator=generator)
        tree = DraftTree.build(Topology((-1, 0, 0)), torch.cat([roots, pair], 1), q[roots])
    else:
        first = torch.multinomial(q[0].expand(ROWS, -1), 1, generator=generator)
        second = torch.multinomial(q[first[:, 0]], 1, generator=generator)
        law = None if rule == "naive" else torch.stack([q[0].expand(ROWS, -1), q[first[:, 0]]], 1)
        tree = DraftTree.build(Topology.chain(2), torch.cat([roots, first, second], 1), law)
    rows = Rows(roots, None, 8)
    order = PlainOrder(rows, True, isolates=True)
    stop = StopRules(StoppingCriteriaList(), rows)
    for row in range(ROWS):
        order.join(PlainBatch([LogitsProcessor() if bug else SecondWind()], stop, [row], rows.ids[row : row + 1, :1]))
    noise = NoiseStream(list(range(ROWS)), [0] * ROWS, rows.device).accept(range(ROWS), 0, tree.tokens.shape[1])
    judge_tree = make_rule(rule)
    walk = order.walk(
        tree, table[tree.tokens], torch.zeros_like(tree.sampled), lambda law: judge_tree(tree, law, noise)
    )
    decision = read_verdict(tree, torch.zeros_like(tree.sampled), walk.verdict, walk.kept_end)
    laws = [table.double().softmax(-1)[0], *(-table).double().softmax(-1)]
    counts = [np.zeros(IDS, dtype=np.int64) for _ in laws]
    for run in decision.runs:
        counts[0][run[0]] += 1
        if len(run) > 1:
            counts[1 + run[0]][run[1]] += 1
    return counts, laws, sum(len(run) > 2 for run in decision.runs)


@pytest.mark.parametrize("rule", ["rejection", "naive", "recursive_rejection"])
def test_laws_within_a_step_are_those_of_the_state_at_each_token(rule: str) -> None:
    counts, laws, long = one_step(rule)
    assert sum(counts[1:]).sum() > ROWS / 8, "second tokens were judged"
    assert rule == "recursive_rejection" or long > 20
    judge(g_test_strata(counts, [law.numpy() for law in laws]), f"laws within a step under {rule}")


def test_a_step_that_forgets_the_state_is_caught() -> None:
    counts, laws, _ = one_step("rejection", bug=True)
    with must_be_caught():
        judge(g_test_strata(counts, [law.numpy() for law in laws]), "a processor without state")


def test_drafts_of_single_rows_are_kept_when_sampling() -> None:
    """Coupled texts do not depend on the draft: plain order with drafts gives the text of plain order without."""
    texts = []
    accepted = 0
    for draft in (None, TINY, noisy_copy(TINY, 1)):
        spec = Speculator(TINY, draft, rule="coupled", **({} if draft is None else {"k": 4}))
        for seed in range(12):
            counting = SecondWind()
            out: Any = spec.generate(
                PROMPT, do_sample=True, top_k=0, max_new_tokens=12, seed=seed, attention_mask=torch.ones_like(PROMPT),
                logits_processor=[counting],
            )  # fmt: skip
            assert counting.calls == 12
            texts.append((seed, out.tolist()))
            accepted += spec.report.num_accepted_tokens if spec.report else 0
    assert accepted > 40
    assert len({str(text) for text in texts}) == len({seed for seed, _ in texts})


@pytest.mark.parametrize("rule", ["block", "traversal", "budget_flow"])
def test_rules_that_need_whole_drafts_are_refused_by_name(rule: str) -> None:
    arguments: dict[str, Any] = {"do_sample": True, "max_new_tokens": 3, "logits_processor": [SecondWind()]}
    tree = {"block": {"k": 3}, "traversal": {"tree": (2, 2)}, "budget_flow": {"tree": (2, 2)}}[rule]
    spec = Speculator(TINY, TINY, rule=rule, **tree)
    with pytest.raises(UnsupportedArgumentError, match=f"{rule}.*SecondWind.*specdec.pure"):
        spec.generate(PROMPT, **arguments)
    with Engine(TINY, TINY, k=3) as engine, pytest.raises(UnsupportedArgumentError, match="SecondWind"):
        engine.submit(PROMPT[0], rule=rule, **arguments)
    arguments["do_sample"] = False  # greedy matching judges token by token, whatever the rule's name
    assert spec.generate(PROMPT, **arguments) is not None


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
    spec = Speculator(target, target, k=3)
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
        for draft, options in ((target, {"k": 4}), ("ngram", {"k": 3}), (models.draft("near", "llama-gqa"), {})):
            out: Any = Speculator(target, draft, **options).generate(ids, do_sample=False, **arguments)
            assert torch.equal(out, target.generate(ids, do_sample=False, **arguments))


def test_scores_that_are_none_are_refused_by_name() -> None:
    class Careless(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
            return self.answer

    for answer in (None, "scores", torch.zeros(1, 3), torch.zeros(1, TINY.config.vocab_size, dtype=torch.int64)):
        processor = Careless()
        processor.answer = answer
        with pytest.raises(UnsupportedArgumentError, match="Careless: expected it to return scores"):
            Speculator(TINY, TINY, k=2).generate(PROMPT, max_new_tokens=3, logits_processor=[processor])


def test_the_report_names_what_was_called_in_plain_order() -> None:
    spec = Speculator(TINY, TINY, k=2)
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

    spec = Speculator(TINY, TINY, k=2)
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
