"""An engine in a storm: what is healthy is exact, what fails fails alone, and nothing is left behind.

The whole storm, and others:
    STORM_REQUESTS=1000 STORM_SEED=7 python -m pytest -q -s tests/specdec/engine/test_engine_storm.py -k no_trace
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from storm import GROUP, Storm, Weather

from specdec.engine import EngineFaultError
from specdec.engine.scheduler import Scheduler
from specdec.kv.pool import KVPool

REQUESTS = int(os.environ.get("STORM_REQUESTS", "150"))
SEED = int(os.environ.get("STORM_SEED", "1"))

pytestmark = pytest.mark.filterwarnings("ignore:drafter .* failed:UserWarning")


def weathered(storm: Storm, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], int]:
    """What became of the requests, and how many passes were lost."""
    weather = Weather(storm.rng.randrange(2**30))
    weather.patch(monkeypatch)
    storm.run()
    return storm.check(), weather.num_lost


def test_a_storm_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, num_lost = weathered(Storm(SEED, REQUESTS), monkeypatch)
    print(f"\n{REQUESTS} requests: {ends}, {num_lost} passes lost")
    assert ends["error"] == REQUESTS // GROUP
    assert min(ends.get(name, 0) for name in ("stop", "length")) > REQUESTS // 10
    assert ends.get("cancelled", 0) + ends.get("timeout", 0) > 0
    assert min(ends["preemptions"], ends["drafter faults"], num_lost) > 0


@pytest.mark.parametrize("place", ["engine.law", "plain_order", "batch"])
def test_a_storm_finds_faults_that_are_not_kept_apart(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: what one request's processors and stop rules raise is let through."""
    monkeypatch.setattr(f"specdec.{place}.from_outside", lambda fault: True)
    with pytest.raises(EngineFaultError):
        weathered(Storm(3, 200), monkeypatch)


def test_a_storm_finds_pages_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    close, times = KVPool.close, 0

    def forgetful(pool: KVPool, sequence: int, tokens: Any = ()) -> None:
        nonlocal times
        times += 1
        if times not in (11, 23):
            close(pool, sequence, tokens)

    monkeypatch.setattr(KVPool, "close", forgetful)
    with pytest.raises(AssertionError, match="num_held_pages"):
        weathered(Storm(4, 60), monkeypatch)


def test_a_storm_finds_requests_that_come_back_as_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gave way goes on with another step's noise."""
    preempt = Scheduler.preempt

    def lost_count(scheduler: Scheduler, task: Any) -> None:
        task.steps += 3
        preempt(scheduler, task)

    monkeypatch.setattr(Scheduler, "preempt", lost_count)

    def storms() -> None:
        for seed in range(1, 13):  # the clock says who gives way: in some storms only greedy requests do
            weathered(Storm(seed, 90), monkeypatch)

    with pytest.raises(AssertionError, match="Planned"):
        storms()
