"""Intervals over a handful of prompts: Student's law as scipy has it, and as often right as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest, norm, t

from specdec.experiments.intervals import LEVEL, Mean, ratio, ratio_difference, share_interval, student_quantile

TRIALS = 6000
HONEST = (0.935, 0.965)
"""Coverage asked of intervals at LEVEL: the simulation's own standard error is 0.003."""
TOKENS, K = 48, 6


def calls(alpha: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and steps of one call per entry of `alpha`, its chance of keeping a drafted token, chains of K."""
    tokens, steps = np.zeros_like(alpha), np.zeros_like(alpha)
    while (short := tokens < TOKENS).any():
        kept = np.minimum(rng.geometric(1 - alpha) - 1, K)
        steps += short
        tokens = np.where(short, np.minimum(tokens + kept + 1, TOKENS), tokens)
    return tokens, steps


def prompts(rng: np.random.Generator, num: int, spread: str) -> np.ndarray:
    """Chances of acceptance of `num` prompts: alike, or some of them easy copies."""
    alpha = rng.beta(6, 4, (TRIALS, num))
    return np.where(rng.random(alpha.shape) < 0.25, rng.beta(30, 3, alpha.shape), alpha) if spread == "two" else alpha


def covered(means: list[Mean], truth: float, factor: float | None = None) -> float:
    """Share of intervals that hold the truth; factor: of the standard error, instead of Student's."""
    widths = [mean.half_width if factor is None else factor * mean.error for mean in means]
    return float(np.mean([abs(mean.value - truth) <= width for mean, width in zip(means, widths, strict=True)]))


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 11, 30, 200])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_quantiles_are_scipys(level: float, df: int) -> None:
    assert student_quantile(level, df) == pytest.approx(t.ppf(0.5 + level / 2, df), rel=1e-8)


@pytest.mark.parametrize("num", [8, 12])
@pytest.mark.parametrize("spread", ["one", "two"])
def test_intervals_of_a_dozen_prompts_cover_the_truth(num: int, spread: str) -> None:
    """The control: twice the standard error, which such tables usually show, covers it too seldom."""
    rng = np.random.default_rng(num)
    tokens, steps = calls(prompts(rng, 100, spread), rng)
    truth = float(tokens.sum() / steps.sum())
    found = [ratio(*pair) for pair in zip(*calls(prompts(rng, num, spread), rng), strict=True)]
    assert HONEST[0] < covered(found, truth) < HONEST[1]
    assert covered(found, truth, norm.ppf(0.5 + LEVEL / 2)) < HONEST[0]


@pytest.mark.parametrize("spread", ["one", "two"])
def test_differences_over_the_same_prompts_cover_zero(spread: str) -> None:
    """Controls: the same without Student's law, and prompts of a drafter that is better by a quarter."""
    rng = np.random.default_rng(5)
    alpha = prompts(rng, 8, spread)
    sides = [list(zip(*calls(chance, rng), strict=True)) for chance in (alpha, alpha, 0.8 * alpha)]
    found = [ratio_difference(*pair) for pair in zip(sides[0], sides[1], strict=True)]
    assert HONEST[0] < covered(found, 0.0) < HONEST[1]
    assert covered(found, 0.0, norm.ppf(0.5 + LEVEL / 2)) < HONEST[0]
    other = [ratio_difference(*pair) for pair in zip(sides[0], sides[2], strict=True)]
    assert covered(other, 0.0) < 0.5


def test_pairing_takes_out_what_prompts_have_in_common() -> None:
    """Four prompts of very different ease, each a tenth harder for the second: alone, neither says anything."""
    steps = np.array([10.0, 20.0, 30.0, 40.0])
    first, second = ([40.0] * 4, (1.1 * steps).tolist()), ([40.0] * 4, steps.tolist())
    difference = ratio_difference(first, second)
    assert difference.value == pytest.approx(160 / 110 - 160 / 100)
    assert difference.error < 0.1 * math.hypot(ratio(*first).error, ratio(*second).error)


def test_hand_made_figures() -> None:
    """2 and 4 tokens in 1 step each: mean 3, error 1 (two values 2 apart), interval 12.7 times that."""
    mean = ratio([2, 4], [1, 1])
    assert (mean.value, mean.error, mean.num) == pytest.approx((3.0, 1.0, 2))
    assert mean.half_width == pytest.approx(12.706, abs=1e-3)
    assert mean.text("+") == "+3.00 ±12.71"
    assert not mean.excludes_zero
    assert Mean(1.0, 0.05, 12).excludes_zero
    one = ratio([3], [2])
    assert one.text() == "1.50"
    assert one.to_dict() == {"value": 1.5, "error": None, "half_width": None, "num": 1}
    assert math.isnan(ratio([0], [0]).value)


@pytest.mark.parametrize(("kept", "num"), [(0, 1), (1, 1), (3, 4), (0, 30), (27, 30), (180, 400)])
def test_intervals_of_shares_are_wilsons(kept: int, num: int) -> None:
    wanted = binomtest(kept, num).proportion_ci(LEVEL, method="wilson")
    assert share_interval(kept / num, num) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
