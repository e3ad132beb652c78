"""The planner's promises in a world where acceptance and costs are known: never slower, close to the best fixed draft,
back again when drafts pay again, and blind to the clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from planner_world import DEPTH, World

from specdec.planner import backoff, risk_budget
from specdec.planner.acceptance import AcceptanceHistory, Known
from specdec.planner.backoff import ProbeBackoff
from specdec.planner.risk_budget import Debt

COSTS = {"dear": (0.3, 0.15), "middling": (0.17, 0.1), "cheap": (0.05, 0.05), "nearly free": (0.02, 0.01)}
SLOWEST = 0.98
"""What is left of plain decoding's speed when every draft is in vain."""


def world(costs: str, **fields: object) -> World:
    draft, verify = COSTS[costs]
    return replace(World(draft=draft, verify=verify), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("acceptance", [0.0, 0.1])
def test_useless_drafters_cost_next_to_nothing(costs: str, rows: int, acceptance: float) -> None:
    useless = world(costs, rows=rows, acceptance=lambda row, position: acceptance)
    assert useless.mean() <= useless.plain / SLOWEST


def test_a_planner_that_risks_more_fails_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk_budget, "RISK", 0.5)
    monkeypatch.setattr(backoff, "LAST_WAIT", 16)
    monkeypatch.setattr(risk_budget, "PROBE_SHARE", 1.0)
    useless = world("dear")
    assert useless.mean() > useless.plain / SLOWEST


@pytest.mark.parametrize("costs", COSTS)
def test_no_call_loses_more_than_was_risked(costs: str) -> None:
    useless = world(costs, tokens=200)
    for seed in range(20):
        lost = useless.run(seed).spent - useless.plain
        assert lost <= max(risk_budget.RISK * useless.plain, risk_budget.RISK_STEPS) + 1e-9


def test_a_short_call_risks_a_step_or_so() -> None:
    short = world("middling", tokens=24, prompt=16)
    assert short.run(0).spent - short.plain <= risk_budget.RISK_STEPS
    assert short.run(0).report.steps["plain"] < 24, "it was never tried"


def test_a_prompt_too_long_to_draft_for_is_left_alone() -> None:
    outcome = world("middling", prompt=4000, tokens=64, prefill=0.05, catch_up=0.02).run(0)
    assert max(outcome.depths) == 0
    assert outcome.report.why_plain is not None
    assert "would risk more than" in outcome.report.why_plain


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("acceptance", [0.4, 0.6, 0.75, 0.9])
def test_within_five_percent_of_the_best_fixed_chain(costs: str, rows: int, acceptance: float) -> None:
    here = world(costs, rows=rows, tokens=400, acceptance=lambda row, position: acceptance)
    best = min(here.mean(fixed, calls=6) for fixed in (0, 1, 2, 3, 4, 6, 8, 12))
    assert here.mean(calls=6) <= best / 0.95


def test_a_planner_that_believes_its_prior_fails_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "specdec.planner.acceptance.AcceptanceHistory.chances", lambda self, width, row=-1: [0.7] * DEPTH
    )
    here = world("middling", tokens=400, acceptance=lambda row, position: 0.95)
    best = min(here.mean(fixed, calls=6) for fixed in (6, 8, 12))
    assert here.mean(calls=6) > best / 0.95


def test_drafting_stops_when_acceptance_collapses_and_comes_back() -> None:
    here = world("cheap", tokens=1024, acceptance=lambda row, position: 0.0 if 256 <= position < 640 else 0.9)
    outcome = here.run(1)
    assert outcome.report.num_stops >= 1
    assert outcome.report.num_probes >= 1
    assert sum(depth > 2 for depth in outcome.depths[-20:]) > 10, "it did not come back"
    assert here.mean(calls=6) < min(here.mean(fixed, calls=6) for fixed in (0, 2, 4, 6, 8))


def test_rows_that_gain_nothing_do_not_wait_for_those_that_do() -> None:
    """Seven rows draft well, one not at all, and a step costs the same for one row as for eight."""
    here = world("middling", rows=8, acceptance=lambda row, position: 0.05 if row == 7 else 0.9)
    assert here.mean(calls=6) <= here.plain / 0.93
    assert here.mean(3, calls=6) > here.plain / 0.8, "the case is not a hard one"


def test_plans_do_not_depend_on_the_clock() -> None:
    here = world("cheap", acceptance=lambda row, position: 0.7)
    moody = random.Random(3)
    slow = here.run(5, clock=lambda: moody.uniform(0.2, 8.0))
    assert slow.depths == here.run(5).depths
    assert slow.report.predicted_ms != here.run(5).report.predicted_ms, "the forecast should follow it"


def test_forecasts_are_close_where_the_table_is_right() -> None:
    here = world("cheap", tokens=512, acceptance=lambda row, position: 0.8)
    close = 0
    for seed in range(20):
        report = here.run(seed, clock=lambda: 2.0).report
        close += abs(report.predicted_tokens_per_second / report.realised_tokens_per_second - 1) < 0.15
    assert close >= 18


def test_no_depth_beyond_what_a_row_may_still_emit() -> None:
    here = world("nearly free", rows=3, acceptance=lambda row, position: 0.97)
    planner, _ = here.planner()
    planner.budget([0, 1, 2], [50, 50, 50])
    assert planner.budget([0, 2], [1, 3]).depths[0] == 0
    assert max(planner.budget([0, 2], [1, 3]).depths) <= 2
    assert planner.budget([0, 2], [1, 1]).max_depth == 0


def test_options_that_find_nothing_are_asked_ever_less() -> None:
    outcome = world("cheap", tokens=400, found=0.0, acceptance=lambda row, position: 0.9).run(0)
    assert max(outcome.depths) == 0
    often = world("cheap", tokens=400, found=0.8, acceptance=lambda row, position: 0.9).run(0)
    assert sum(map(bool, often.depths)) > 0.6 * len(often.depths)


def test_history_by_hand() -> None:
    history = AcceptanceHistory(DEPTH, rows=1)
    before = history.chances(1)
    assert before == pytest.approx([0.7] * DEPTH)
    history.add((1,) * DEPTH, [0], [3], [2])
    level = (2.5 * 0.7 + 2) / (2.5 + 3)
    assert history.chances(1)[:4] == pytest.approx(
        [(6 * level + 1) / 7, (6 * level + 1) / 7, (6 * level) / 7, level], rel=1e-9
    )
    assert history.chances(2)[0] == pytest.approx(1 - (1 - history.chances(1)[0]) * 0.65)
    gains = history.gains((1,) * DEPTH, [(0, 2)])
    first, second = history.chances(1)[:2]
    assert gains[:4] == pytest.approx([0, first, first + first * second, first + first * second])


def test_a_bad_row_is_told_from_a_good_batch() -> None:
    history = AcceptanceHistory(4, rows=3)
    for _ in range(12):
        history.add((1,) * 4, [0, 1, 2], [4, 4, 1], [4, 4, 0])
    good, bad = (history.gains((1,) * 4, [(row, 4)])[4] for row in (0, 2))
    assert good > 2.5
    assert bad < 1.2


def test_waits_double_and_begin_anew_after_a_long_run() -> None:
    waiting, waits = ProbeBackoff(), []
    for _ in range(4):
        assert waiting.stop()
        plain = 1
        while waiting.waits():
            plain += 1
        waits.append(plain)
        assert waiting.probing
        waiting.go()
        assert not waiting.waits()
    assert waits == [16, 32, 64, 128]
    for _ in range(20):
        waiting.go()
    waiting.stop()
    assert sum(waiting.waits() for _ in range(100)) == 15


def test_a_probe_is_not_begun_for_fewer_tokens_than_it_waited() -> None:
    waiting = ProbeBackoff()
    assert not waiting.too_late(1)  # no probe
    waiting.stop()
    assert sum(waiting.waits() for _ in range(100)) == 15
    assert not waiting.stop()  # it was put off
    assert sum(waiting.waits() for _ in range(100)) == 15
    assert waiting.waited == 32
    assert not waiting.too_late(32)
    assert not waiting.too_late(None)
    assert waiting.too_late(31)
    assert sum(waiting.waits() for _ in range(100)) == 31  # and that was the last time it was thought of


KNOWN_USELESS = Known({"model": {1: ((64.0, *[0.0] * (DEPTH - 1)), (10.0, *[0.0] * (DEPTH - 1)))}})
"""One token in six was accepted before this call."""


def test_known_useless_drafts_are_not_asked_for_before_that_is_cheap() -> None:
    """However long it takes: the first probes would cost more than they can be expected to find out."""
    here = world("dear", tokens=100)
    assert not any(any(here.run(seed, known=KNOWN_USELESS).depths) for seed in range(4))
    assert sum(depth > 0 for depth in replace(here, tokens=1000).run(0, known=KNOWN_USELESS).depths) > 0


def test_probes_that_nobody_counts_fail_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(risk_budget, "PROBE_SHARE", 1.0)
    assert sum(depth > 0 for depth in world("dear", tokens=100).run(0, known=KNOWN_USELESS).depths) > 0


def test_a_useless_drafter_is_asked_once_in_a_short_call() -> None:
    here = world("cheap", tokens=96, acceptance=lambda row, position: 0.02)
    depths = here.run(1).depths
    assert sum(depth > 0 for depth in depths[48:]) == 0
    assert sum(depth > 0 for depth in depths) > 0


def test_the_debt_is_bounded_by_the_call() -> None:
    debt = Debt(horizon=200, prefill_ms=100.0)
    assert debt.affords(risk_budget.RISK * (100 + 10 * 200), 10.0)
    assert not debt.affords(risk_budget.RISK * (100 + 10 * 200) + 0.1, 10.0)
    debt.step(30.0)
    assert not debt.affords(10.0, 10.0)
    debt.step(-40.0)
    assert debt.affords(40.0, 10.0)
