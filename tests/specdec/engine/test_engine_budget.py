"""Drafts are shared by what they bring: near the best depth, nothing where nothing pays, never beyond the budget."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from specdec.engine.budget import DraftBudget, Seat
from specdec.engine.costs import StepCosts
from specdec.engine.task import Acceptance

Clock = Callable[[int, int], float]
CLOCKS: dict[str, Clock] = {
    "wide and free": lambda tokens, levels: 10 + 0.01 * tokens + 0.3 * levels,
    "by the token": lambda tokens, levels: 2 + 1.0 * tokens + 0.2 * levels,
    "dear drafts": lambda tokens, levels: 10 + 0.1 * tokens + 6 * levels,
    "a knee at 16": lambda tokens, levels: 10 + max(0, tokens - 16) * 0.8 + 0.5 * levels,
}
DEPTH = 6


def row(rate: float, fixed: bool = False, limit: int = DEPTH) -> tuple[Seat, float]:
    """A row whose drafted tokens are each kept with this chance."""
    return Seat(limit, list(range(limit + 1)), Acceptance(DEPTH), fixed), rate


def together(*rates: float) -> list[tuple[Seat, float]]:
    """Rows of one lane, which borrow from each other's history."""
    common = Acceptance(DEPTH)
    return [(Seat(DEPTH, list(range(DEPTH + 1)), Acceptance(DEPTH, common)), rate) for rate in rates]


def expected(rate: float, depth: int) -> float:
    return 1 + sum(rate ** (d + 1) for d in range(depth))


def play(
    clock: Clock, rows: list[tuple[Seat, float]], steps: int, seed: int = 0, most: int = 10**6, noise: float = 0.0
) -> list[list[int]]:
    """Depths chosen at every step by a budget that sees simulated drafts and times."""
    rng = random.Random(seed)
    budget = DraftBudget(StepCosts())
    chosen = []
    for _ in range(steps):
        depths = budget.depths([seat for seat, _ in rows], most)
        for (seat, rate), depth in zip(rows, depths, strict=True):
            kept = next((d for d in range(depth) if rng.random() > rate), depth)
            if depth:
                seat.acceptance.observe(depth, kept)
        tokens = len(rows) * (1 + max(depths))
        seconds = clock(tokens, max(depths)) * 1e-3
        budget.costs.observe(tokens, max(depths), seconds * rng.uniform(1, 1 + noise))
        chosen.append(depths)
    return chosen


def speed(clock: Clock, rows: list[tuple[Seat, float]], depths: list[int]) -> float:
    gain = sum(expected(rate, depth) for (_, rate), depth in zip(rows, depths, strict=True))
    return gain / clock(len(rows) * (1 + max(depths)), max(depths))


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("rates", [(0.8,), (0.3,), (0.8,) * 4, (0.9, 0.9, 0.2, 0.2), (0.02,) * 4], ids=str)
def test_close_to_the_best_depths_there_are(clock: str, rates: tuple[float, ...]) -> None:
    """Tokens per second after learning, probes included, against every assignment of depths to rows."""
    rows = together(*rates)
    chosen = play(CLOCKS[clock], rows, 600, noise=0.02)[200:]
    best = max(speed(CLOCKS[clock], rows, list(d)) for d in itertools.product(range(0, DEPTH + 1, 2), repeat=len(rows)))
    plain = speed(CLOCKS[clock], rows, [0] * len(rows))
    reached = len(chosen) / sum(1 / speed(CLOCKS[clock], rows, depths) for depths in chosen)
    assert reached > 0.85 * best
    assert reached > 0.97 * plain


def concave(tokens: int, levels: int) -> float:
    """Milliseconds of a small model on a CPU: a token costs less the more there are."""
    return 3 + 1.3 * tokens**0.6 + levels * 0.9


@pytest.mark.parametrize("clock", [concave, CLOCKS["wide and free"], CLOCKS["a knee at 16"]])
@pytest.mark.parametrize("sizes", [(1, 4, 16), (16, 4, 1), (1, 16), (2, 11, 5, 7)])
def test_what_was_learned_of_few_rows_does_not_mislead_for_many(clock: Clock, sizes: tuple[int, ...]) -> None:
    rng, seen = random.Random(3), set()
    budget, common = DraftBudget(StepCosts()), Acceptance(4)
    for size in sizes:
        rows = [(Seat(4, list(range(5)), Acceptance(4, common)), 0.88) for _ in range(size)]
        spent = gained = 0.0
        for step in range(150):
            depths = budget.depths([seat for seat, _ in rows], 10**6)
            for (seat, rate), depth in zip(rows, depths, strict=True):
                if depth:
                    seat.acceptance.observe(depth, next((d for d in range(depth) if rng.random() > rate), depth))
            tokens, levels = size * (1 + max(depths)), max(depths)
            kind = (tokens, levels)
            budget.costs.observe(*kind, clock(*kind) * rng.uniform(1, 1.1) * (1 if kind in seen else 30))
            seen.add(kind)
            if step >= 30:
                spent += clock(*kind)
                gained += sum(expected(rate, depth) for (_, rate), depth in zip(rows, depths, strict=True))
        best = max(speed(clock, rows, [depth] * size) for depth in range(5))
        assert gained / spent > 0.93 * best


def test_nothing_is_drafted_where_nothing_is_kept() -> None:
    rows = [row(0.9), row(0.0)]
    chosen = play(CLOCKS["by the token"], [row(0.0)] * 2, 400)[100:]
    assert sum(sum(depths) > 0 for depths in chosen) <= 0.05 * len(chosen)
    chosen = play(lambda tokens, levels: 4 + 1.0 * tokens + 0.1 * levels, rows, 600)[300:]
    drafted = [sum(depths[i] > 0 for depths in chosen) / len(chosen) for i in (0, 1)]
    assert drafted[0] > 0.9
    assert drafted[1] < 0.2


@pytest.mark.parametrize("most", [0, 1, 5, 11])
def test_never_beyond_the_nodes_there_are(most: int) -> None:
    rows = [row(0.9), row(0.7), row(0.5, limit=2), row(0.8, limit=0)]
    for depths in play(CLOCKS["wide and free"], rows, 120, most=most):
        assert sum(depths) <= most
        assert depths[2] <= 2
        assert depths[3] == 0


def test_promised_drafts_are_left_alone() -> None:
    rows = [row(0.0, fixed=True), row(0.9), row(0.0, fixed=True, limit=3)]
    for depths in play(CLOCKS["dear drafts"], rows, 100):
        assert (depths[0], depths[2]) == (DEPTH, 3)


def test_likelier_rows_get_the_nodes() -> None:
    rows = [row(0.9), row(0.3)]
    chosen = play(CLOCKS["wide and free"], rows, 400, most=5)[200:]
    sums = [sum(depths[i] for depths in chosen) for i in (0, 1)]
    assert sums[0] > 3 * sums[1]


def test_a_slower_machine_does_not_change_the_choice() -> None:
    """Other work on the machine slows every kind of step down alike."""
    costs, rng = StepCosts(), random.Random(1)
    for step in range(400):
        speed = 1.0 if step < 200 else 8.0
        levels = rng.choice([0, 2, 4])
        costs.observe(8 * (1 + levels), levels, speed * CLOCKS["a knee at 16"](8 * (1 + levels), levels))
    want = CLOCKS["a knee at 16"](40, 4) / CLOCKS["a knee at 16"](8, 0)
    assert costs.cost(40, 4) / costs.cost(8, 0) == pytest.approx(want, rel=0.15)
    assert costs.scale * costs.cost(8, 0) == pytest.approx(80, rel=0.3)


def test_slow_first_steps_are_forgotten() -> None:
    """The first pass of every size measures how to run it, at a hundred times its cost."""
    costs, first = StepCosts(), set()
    for step in range(30):
        levels = (0, 4, 2)[step % 3]
        true = CLOCKS["a knee at 16"](8 * (1 + levels), levels)
        costs.observe(8 * (1 + levels), levels, true * (1 if levels in first else 100))
        first.add(levels)
    want = CLOCKS["a knee at 16"](40, 4) / CLOCKS["a knee at 16"](8, 0)
    assert costs.cost(40, 4) / costs.cost(8, 0) == pytest.approx(want, rel=0.1)


def test_one_interrupted_step_is_not_believed() -> None:
    costs = StepCosts()
    for step in range(60):
        costs.observe(8, 0, 10.0 if step != 50 else 4000.0)
        costs.observe(40, 4, 20.0)
    assert costs.cost(40, 4) / costs.cost(8, 0) == pytest.approx(2.0, rel=0.15)


def test_survival_never_rises_with_depth_and_follows_the_drafts() -> None:
    common = Acceptance(4)
    one, other = Acceptance(4, common), Acceptance(4, common)
    for _ in range(60):
        one.observe(4, 4)
        other.observe(2, 0)
    for acceptance in (common, one, other):
        survival = acceptance.survival()
        assert survival == sorted(survival, reverse=True)
    assert one.survival()[3] > 0.7
    assert other.survival()[0] < 0.2
    assert common.survival()[0] == pytest.approx(0.5, abs=0.05)


def test_a_fit_that_leaves_nothing_for_plain_steps_breaks_nothing() -> None:
    costs = StepCosts()
    costs._line = (0.0, 0.0, 0.0, 1.0)  # all of the cost is in drafted levels
    for seconds in (0.0, 0.0, 1e-3, 1e-3):
        costs.observe(1, 0, seconds)
    assert costs.scale > 0
    assert costs.cost(1, 0) > 0
