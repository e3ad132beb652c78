"""Faults in an engine: a drafter's cost speed, the target's cost the request they belong to, and nothing leaks."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from engine_cases import FAMILY, Ask, alone, asks, assert_clean, engine, submit
from engine_plants import Processor, raising
from plain_callbacks import SecondWind
from torch import Tensor
from transformers import LogitsProcessorList

from specdec import Speculator
from specdec.drafters import Budget, ModelDrafter
from specdec.engine import Engine, EngineFaultError, Handle
from specdec.engine.passes import EnginePasses
from specdec.engine.scheduler import Scheduler
from specdec.kv import TargetFaultError
from specdec.verify import DraftTree


class Unreliable(ModelDrafter):
    """Raises, forgets itself or returns nonsense, at random."""

    def __init__(self, seed: int, rate: float):
        super().__init__(models.draft("near", FAMILY), k=4)
        self.rng, self.rate = random.Random(seed), rate

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        tree = super().propose(budget, uniforms)
        if self.rng.random() > self.rate:
            return tree
        if self.rng.random() < 0.5:
            raise RuntimeError("boom")
        return DraftTree.build(tree.topology, tree.tokens + 1000)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def expected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="drafter .* failed")
        yield


def live_through(count: int, seed: int) -> Engine:
    """Requests with cancellations, faults in the drafter and too few pages; nothing may be left of them."""
    rng = random.Random(seed)
    served = Engine(
        models.target(FAMILY), Unreliable(seed, 0.2), drafters={"ngram": "ngram"}, num_pages=24, page_size=4,
        max_rows=8, max_step_tokens=96,
    )  # fmt: skip
    handles: list[Handle] = []
    asked: list[Ask] = []
    while len(handles) < count or not all(handle.done for handle in handles[-64:]):
        if len(handles) < count and len(served._stepping.scheduler.waiting) < 6:
            (ask,) = asks(1, seed=rng.randrange(2**30), longest=16)
            draft = rng.choice(["model", "model", "ngram", "none"])
            greedy = rng.random() < 0.5
            asked.append(
                Ask(ask.prompt, "chain" if draft == "model" else draft, ask.seed, ask.new_tokens, 0 if greedy else 1)
            )
            handles.append(served.submit(ask.prompt, draft=draft, **asked[-1].options))
            if rng.random() < 0.1:
                handles[-1].cancel()
            if rng.random() < 0.1:
                rng.choice(handles).cancel()
        served.step()
    served.run()
    assert all(handle.done for handle in handles)
    for ask, handle in list(zip(asked, handles, strict=True))[:40]:
        if not ask.setting and handle.result().finish_reason != "cancelled":
            assert handle.result().token_ids == alone(ask)[0]  # greedy text knows nothing of the drafter
    assert_clean(served)
    return served


def test_nothing_leaks_and_nobody_is_stuck() -> None:
    metrics = live_through(200, seed=1).metrics()
    assert metrics.num_drafter_faults > 10
    assert metrics.num_preemptions > 10
    assert metrics.num_finished["cancelled"] > 10
    assert sum(metrics.num_finished.values()) == 200


@pytest.mark.slow
def test_two_thousand_requests_leak_nothing() -> None:
    metrics = live_through(2000, seed=2).metrics()
    assert metrics.num_drafter_faults > 100
    assert metrics.num_finished["cancelled"] > 100
    assert sum(metrics.num_finished.values()) == 2000


def poisoned(token: int) -> Any:
    """A target whose embedding of one token is NaN: whoever reads it has no law any more."""

    target = copy.deepcopy(models.target(FAMILY))
    with torch.no_grad():
        target.get_input_embeddings().weight[token] = float("nan")  # type: ignore[operator]
    return target


@pytest.mark.parametrize("setting", [0, 1, None], ids=["greedy", "sampled", "in plain order"])
def test_a_request_the_target_fails_on_ends_alone(setting: int | None) -> None:
    def own() -> dict[str, Any]:
        return {"logits_processor": LogitsProcessorList([SecondWind()])} if setting is None else {}

    target = poisoned(7)
    served = Engine(target, models.draft("near", FAMILY), k=4, num_pages=64, page_size=4, max_rows=8)
    spec = Speculator(target, models.draft("near", FAMILY), k=4)
    failed = 0
    known = []
    for ask in asks(24, seed=3):
        options = Ask(ask.prompt, "chain", ask.seed, ask.new_tokens, setting or 0).options
        known.append((ask.prompt, options, served.submit(ask.prompt, **options, **own())))
    served.run()
    for prompt, options, handle in known:
        ids = torch.tensor([prompt])
        expected: TargetFaultError | None = None
        try:
            out: Any = spec.generate(ids, attention_mask=torch.ones_like(ids), **options, **own())
        except TargetFaultError as fault:
            expected = fault
        if expected is None:
            assert handle.result().token_ids == out[0, len(prompt) :].tolist()
            continue
        failed += 1
        with pytest.raises(TargetFaultError, match="failed on request") as ours:
            handle.result()
        assert ours.value.emitted == expected.emitted
        assert setting is None or ours.value.step == expected.step
    assert 0 < failed < 24
    assert served.metrics().num_finished["error"] == failed
    assert_clean(served)


@pytest.mark.parametrize("only_prompts", [False, True])
def test_a_pass_that_raises_is_repeated(only_prompts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory on everybody's trees at once, then request by request; or because of a prompt that is read besides,
    then once more without it. Nobody's text suffers, also where a tree has no shape that could be cut."""
    drafts = ["chain", "tree", "ngram", "none", "best", "dyspec", "best", "dyspec"] * 2
    crowd = [
        Ask(a.prompt, draft, a.seed, a.new_tokens + 8, 1 + i % 3)
        for i, (a, draft) in enumerate(zip(asks(16, seed=4), drafts, strict=True))
    ]
    step, failed, chunks_met = EnginePasses.step, [-1], 0

    def full(self: Any, lanes: Any, trees: Any, chunks: Any) -> Any:
        nonlocal chunks_met
        if chunks if only_prompts else served._stepping.num_steps % 2:
            failed.append(served._stepping.num_steps)
            chunks_met += len(chunks)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, lanes, trees, chunks)

    monkeypatch.setattr(EnginePasses, "step", full)
    served = engine(max_rows=4)
    handles = [submit(served, ask) for ask in crowd]
    served.run()
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in crowd]
    assert len(failed) > 5
    assert chunks_met > 2  # prompts that were to be read in such a pass are read after it
    assert_clean(served)


def test_what_a_prefill_has_read_before_it_raises_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of uneven lengths are read in passes of their own; the second one fails once."""
    text, lengths = EnginePasses._text, []

    def full_once(self: Any, group: Any) -> Any:
        lengths.append([chunk.num_tokens for chunk in group])
        if len(lengths) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return text(self, group)

    monkeypatch.setattr(EnginePasses, "_text", full_once)
    served = engine()
    prompts = [tuple(range(3, 34)), tuple(range(34, 39)), tuple(range(38, 33, -1))]
    crowd = [Ask(prompt, "chain", 1, 8, 1) for prompt in prompts]
    handles = [submit(served, ask) for ask in crowd]
    for _ in range(40):
        served.step()
    assert lengths[:3] == [[30, 4], [4], [4]]
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in crowd]
    assert_clean(served)


def test_what_a_failed_request_wrote_is_found_by_nobody() -> None:
    """Its prompt was complete before; what its text was when it failed is not to be relied on."""
    served, prompt = engine(), list(range(3, 12))
    options: dict[str, Any] = {"max_new_tokens": 13, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for after in (20, 99):
        failing = LogitsProcessorList([Processor(raising(KeyError("no such state")), after)])
        handle = served.submit(prompt, logits_processor=failing, **options)
        served.run()
        assert (handle.num_tokens < 13) == (after == 20)
        again = served.submit([*prompt, *handle.token_ids], **options)
        served.run()
        found.append(again.result().num_cached_tokens)
    assert found[0] == 8
    assert found[1] > 16
    assert_clean(served)


def test_a_prompt_the_target_cannot_read_ends_alone() -> None:
    """GPT-2 has 128 positions; the pool has room for more."""
    family = "gpt2"
    served = engine(family, num_pages=200, max_step_tokens=64)
    good = [Ask(a.prompt, "chain", a.seed, a.new_tokens, 1, family) for a in asks(6, seed=8)]
    handles = [submit(served, ask) for ask in good[:3]]
    long = served.submit([5, 6, 7] * 60, max_new_tokens=4)
    handles += [submit(served, ask) for ask in good[3:]]
    served.run()
    with pytest.raises(TargetFaultError, match="128 positions"):
        long.result()
    assert [handle.result().token_ids for handle in handles] == [alone(ask)[0] for ask in good]
    assert_clean(served)


@pytest.mark.parametrize("threaded", [False, True])
def test_a_step_that_fails_as_a_whole_tells_everybody(monkeypatch: pytest.MonkeyPatch, threaded: bool) -> None:
    served = engine()
    (good,) = asks(1, seed=5)
    chunks = Scheduler.chunks

    def lost(self: Any, tokens: int) -> Any:
        raise ValueError("device lost")

    monkeypatch.setattr(Scheduler, "chunks", lost)
    handles = [submit(served, ask) for ask in asks(5, seed=6)]
    if threaded:
        served.start()
    else:
        with pytest.raises(ValueError, match="device lost"):
            served.run()
    for handle in handles:
        with pytest.raises(EngineFaultError, match="device lost"):
            handle.result(timeout=60)
    monkeypatch.setattr(Scheduler, "chunks", chunks)
    assert submit(served, good).result(timeout=60).token_ids == alone(good)[0]
    assert served.threaded is threaded
    served.close()
    assert_clean(served)
