"""A request's text in a crowded engine is the one it has alone, and so is its acceptance."""

from __future__ import annotations

from typing import Any

import pytest
from engine_cases import Ask, alone, asks, assert_as_alone, assert_clean, check_life, engine, random_life, submit

from specdec.engine.scheduler import Scheduler
from specdec.engine.task import Task

CROWD = 36


@pytest.mark.parametrize(
    "settings",
    [
        {"page_size": 1, "num_pages": 200},
        {"page_size": 7, "max_rows": 3, "num_pages": 40},
        {"page_size": 16, "num_pages": 64, "max_rows": 12, "max_step_tokens": 400},
        {"page_size": 4, "num_pages": 18, "max_step_tokens": 48},
        {"max_rows": 1, "adaptive": False},
    ],
    ids=["tokenwise", "page 7", "roomy", "crowded", "one at a time"],
)
def test_the_text_alone(settings: dict[str, Any]) -> None:
    """Every drafter, rule and kind of processor at once; pages of any size, few or many, companions or none."""
    crowd = asks(CROWD, seed=1, shared=6)
    served = engine(**settings)
    handles = [submit(served, ask) for ask in crowd]
    served.run()
    for ask, handle in zip(crowd, handles, strict=True):
        assert_as_alone(ask, handle)
    preemptions = served.metrics().num_preemptions
    assert preemptions > 0 if settings.get("num_pages") == 18 else preemptions == 0
    assert_clean(served)


@pytest.mark.parametrize("family", ["mistral-window", "gpt2", "qwen2-mixed-window", "gemma2", "llama-rope-yarn"])
def test_other_families(family: str) -> None:
    """Windows, learned positions, eager attention: the passes of a crowd compute what passes of one row compute."""
    picked = [
        Ask(a.prompt, draft, a.seed, a.new_tokens, a.setting, family)
        for a, draft in zip(asks(8, seed=2), ["chain", "ngram", "none", "tree"] * 2, strict=True)
    ]
    served = engine(family)
    handles = [submit(served, ask) for ask in picked]
    served.run()
    for ask, handle in zip(picked, handles, strict=True):
        assert_as_alone(ask, handle)


def test_random_arrivals_cancellations_and_preemptions() -> None:
    served = engine(num_pages=20, page_size=4)
    check_life(served, random_life(served, asks(60, seed=3, shared=9), seed=4, cancel=0.1))
    assert served.metrics().num_preemptions > 0
    assert served.metrics().num_prefix_hit_tokens > 0


def test_noise_that_starts_anew_after_a_preemption_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: keyed by anything but the request's own steps, the noise of a preempted request repeats."""
    preempt = Scheduler.preempt

    def forgetful(self: Scheduler, task: Task) -> None:
        preempt(self, task)
        task.steps = 0

    crowd = [Ask(a.prompt, "chain", a.seed, 19, 1) for a in asks(24, seed=7)]
    for broken in (False, True):
        if broken:
            monkeypatch.setattr(Scheduler, "preempt", forgetful)
        served = engine(num_pages=14)
        handles = [submit(served, ask) for ask in crowd]
        served.run()
        assert served.metrics().num_preemptions > 0
        same = all(handle.result().token_ids == alone(ask)[0] for ask, handle in zip(crowd, handles, strict=True))
        assert same is not broken
