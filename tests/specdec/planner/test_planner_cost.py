"""What planning itself costs, in function calls of recorded steps: the same on every machine, unlike microseconds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from planner_world import Seen, World

HERE = World(step=2.0, verify=0.05, draft=0.2, tokens=250, catch_up=0.01)
"""Cheap passes: what planning costs matters most."""


def calls_per_step(world: World, seen: Sequence[Seen]) -> list[int]:
    """Functions called, built-in ones included, to plan every step and to learn from it."""
    planner, options = world.planner()
    count, out = 0, []

    def counting(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    for step in seen:
        count = 0
        sys.setprofile(counting)
        planner.budget(step.live, step.left)
        sys.setprofile(None)
        options.used, options.asked, options.heard = step.used, step.asked, step.heard
        sys.setprofile(counting)
        planner.learn(step.trace, step.reached)
        sys.setprofile(None)
        out.append(count)
    return out


def mean(world: World) -> float:
    counts = [one for seed in range(2) for one in calls_per_step(world, world.run(seed).seen)]
    return sum(counts) / len(counts)


@pytest.mark.parametrize("model", [0.7, 0.9])
@pytest.mark.parametrize("ngram", [None, 0.05, 0.6])
def test_a_drafting_step_is_planned_with_few_calls(model: float, ngram: float | None) -> None:
    here = replace(HERE, acceptance=lambda row, at: model, ngram=None if ngram is None else lambda row, at: ngram)
    alone = mean(here)
    assert alone < 140
    assert mean(replace(here, rows=8)) < 4 * alone, "planning should grow more slowly than the batch"


@pytest.mark.parametrize("rows", [1, 8])
def test_a_waiting_step_is_planned_with_next_to_none(rows: int) -> None:
    here = replace(HERE, rows=rows)
    seen = here.run(0).seen
    waiting = sorted(calls_per_step(here, seen))[: len(seen) // 2]
    assert max(waiting) <= 30


def test_looking_at_everything_at_every_step_fails_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.planner.batch_planner.LONGEST_HOLD", 1)
    assert mean(replace(HERE, acceptance=lambda row, at: 0.9, ngram=lambda row, at: 0.6)) > 140
