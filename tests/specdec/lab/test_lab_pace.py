"""A check keeps its budget on slow and busy machines: it draws less, says so, and still fails what it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama

import specdec
from specdec import CheckReport
from specdec.kv.shared import SharedKVCache
from specdec.lab import pace
from specdec.lab.pace import Pace, one_thread_if_faster

BUDGET = 20.0
TARGET = tiny_llama(3, vocab=6)
DRAFT = noisy_copy(TARGET, 4, 0.3)
CPU = torch.device("cpu")


class Clock:
    """A clock that only models move: every forward pass takes `cost` seconds."""

    def __init__(self, cost: float):
        self.now, self.cost = 0.0, cost

    def __call__(self) -> float:
        return self.now

    def tick(self, *given: Any) -> None:
        self.now += self.cost


@contextmanager
def machine(cost: float) -> Iterator[Clock]:
    clock = Clock(cost)
    hooks = [model.register_forward_pre_hook(clock.tick) for model in (TARGET, DRAFT)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specdec.lab.pace.perf_counter", clock)
        patch.setattr("specdec.lab.acceptance.perf_counter", clock)
        yield clock
    for hook in hooks:
        hook.remove()


def check(cost: float, **options: Any) -> tuple[CheckReport, float]:
    with machine(cost) as clock:
        report = specdec.check(
            TARGET, DRAFT, k=3, prompts=[[3, 1, 2, 5], [1, 4]], budget_s=BUDGET, **{"max_rows": 3000, **options}
        )
        return report, clock.now


def test_a_slow_machine_keeps_the_budget_and_says_what_it_lost() -> None:
    quick, _ = check(0.001)
    slow, spent = check(0.08)
    assert spent <= 1.1 * BUDGET
    assert slow.passed, slow.summary()
    assert slow.settings["seconds"] <= 1.1 * BUDGET
    assert slow.settings["num_rows"] < quick.settings["num_rows"] == 3000
    lost, had = (report["law of every token"].figures["detectable_tv"] for report in (slow, quick))
    assert lost > had
    assert 0 < slow["greedy text"].figures["compared_tokens"] < quick["greedy text"].figures["compared_tokens"]


def test_the_budget_is_used_where_there_is_more_to_draw() -> None:
    _, spent = check(0.04, max_rows=10**9)
    assert 0.75 * BUDGET <= spent <= 1.1 * BUDGET


def test_a_slow_machine_still_sees_a_broken_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SharedKVCache.commit
    monkeypatch.setattr(
        SharedKVCache, "commit", lambda self, paths: original(self, [list(range(len(path))) for path in paths])
    )
    report, _ = check(0.08)
    assert not report.passed
    assert report["K/V cache"].status == report["verification logits"].status == "FAIL"


def test_as_much_fits_as_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(1.0)
    monkeypatch.setattr(pace, "perf_counter", clock)
    own = Pace(10.0)
    clock.tick()
    assert own.spent == 1.0
    assert own.fit(0.5, 0.5, least=1, most=100) == 8
    assert own.fit(0.5, 0.5, least=1, most=3) == 3
    assert own.fit(0.05, 0.5, least=2, most=100) == 2
    assert own.left(0.05) == -0.5


@pytest.fixture
def two_threads() -> Iterator[None]:
    had = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(had)


def busy(cost: dict[int, float], clock: Clock) -> Callable[[], None]:
    def run() -> None:
        clock.now += cost[torch.get_num_threads()]

    return run


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("cost", "best"), [({2: 5.0, 1: 1.0}, 1), ({2: 1.0, 1: 1.5}, 2)])
def test_one_thread_is_used_where_it_is_faster(
    cost: dict[int, float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(0.0)
    monkeypatch.setattr(pace, "perf_counter", clock)
    with one_thread_if_faster(busy(cost, clock), CPU) as count:
        assert count == torch.get_num_threads() == best
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_threads_that_were_asked_for_are_not_tried() -> None:
    def never() -> None:
        raise AssertionError("nothing to try")

    with one_thread_if_faster(never, CPU, threads=1):
        assert torch.get_num_threads() == 1
    with one_thread_if_faster(never, CPU, threads=2):
        assert torch.get_num_threads() == 2
    with one_thread_if_faster(never, torch.device("cuda")) as count:
        assert count == 2
    assert torch.get_num_threads() == 2
