"""How planned calls are timed: every way on every prompt, in turns, and the median of several calls counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.experiments.planner import clock
from specdec.experiments.planner.__main__ import close


def test_every_way_meets_every_prompt_as_often() -> None:
    met: list[tuple[str, int, int]] = []

    def way(name: str) -> Any:
        return lambda ids, number, on_step: met.append((name, int(ids), number))

    prompts = [torch.tensor(10), torch.tensor(11)]
    sizes = [len(calls) for calls in clock.time_calls({"a": way("a"), "b": way("b")}, prompts, "", repeats=3)]
    assert sizes == [6, 12]
    assert sorted(met[:2]) == [("a", 10, 0), ("b", 10, 0)]  # for what is done once per process
    for number in (1, 2):
        assert sorted(one for one in met[2:] if one[2] == number) == [
            (name, 9 + number, number) for name in ("a", "b") for _ in range(3)
        ]


def test_the_median_call_counts_and_ratios_pair_the_prompts() -> None:
    spent = {("a", 1): [9.0, 1.0, 0.5], ("a", 2): [4.0], ("b", 1): [2.0], ("b", 2): [6.0, 5.0, 1.0]}
    calls = [clock.Call(way, prompt, s, s, 1.0, None) for (way, prompt), times in spent.items() for s in times]
    assert clock.seconds(calls, "a") == [1.0, 4.0]
    found = clock.ratio(calls, "a", "b")
    assert found["median"] == pytest.approx((2 / 1 + 5 / 4) / 2, abs=1e-3)
    assert found["total"] == pytest.approx(7 / 5)


def test_ratios_by_steps_ignore_bad_moments() -> None:
    """Ten tokens each: one way in ten steps of 2 ms, the other with a draft that takes 3 ms and saves a step."""
    plain, bad = (2.0, False), (90.0, False)
    none = clock.Call("none", 1, 0, 0, 1.0, None, (plain,) * 9 + (bad,))
    planned = clock.Call("planned", 1, 0, 0, 1.0, None, (plain, bad) + (plain,) * 6 + ((3.0, True),))
    assert clock.ratio_by_steps([none, planned, none], "planned", "none") == pytest.approx(20 / (8 * 2 + 3), abs=1e-4)


def test_a_forecast_is_right_within_15_percent_either_way() -> None:
    assert close(1.15)
    assert close(1 / 1.15)
    assert not close(1.16)
    assert not close(1 / 1.16)
