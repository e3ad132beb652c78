"""Figures with honest intervals: quartiles of what was timed, errors over a handful of independent prompts.

A ratio of sums over n prompts is judged with Student's law of n - 1 degrees of freedom. With 8 to 12 prompts, twice the
standard error covers the truth in about 90 % of runs, Student's interval in 93 to 95 % (a test simulates both).
A median of ratios, whose law nobody knows, has the interval of its bootstrap.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95
"""Share of runs whose interval is to cover the truth."""


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Of at least one value."""
        low, middle, high = np.quantile(list(values), (0.25, 0.5, 0.75)).tolist()
        return Spread(middle, low, high)

    def text(self, form: str) -> str:
        """As in tables, each figure in `form`."""
        return f"{form} [{form}-{form}]".format(*self)


class Mean(NamedTuple):
    """A figure, its standard error over prompts, and the number of prompts (0 or 1: no error is known)."""

    value: float
    error: float
    num: int = 0

    @property
    def half_width(self) -> float:
        """Of the interval at LEVEL, `value - half_width` to `value + half_width`; NaN for fewer than two prompts."""
        return student_quantile(LEVEL, self.num - 1) * self.error if self.num > 1 else math.nan

    @property
    def excludes_zero(self) -> bool:
        return abs(self.value) > self.half_width

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        values = {"value": self.value, "error": self.error, "half_width": self.half_width}
        return {name: None if math.isnan(value) else value for name, value in values.items()} | {"num": self.num}

    def text(self, sign: str = "") -> str:
        """As in tables; sign "+": also of positive figures."""
        return f"{self.value:{sign}.2f}" + ("" if math.isnan(self.half_width) else f" ±{self.half_width:.2f}")


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Mean:
    """sum(a) / sum(b) over prompts, with the delta method's standard error (NaN for fewer than two prompts)."""
    pulls = _pulls(numerators, denominators)
    total = float(np.sum(denominators))
    return Mean(float(np.sum(numerators)) / total if total else math.nan, _error(pulls), len(pulls))


def ratio_difference(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]]
) -> Mean:
    """The first ratio less the second, each `(numerators, denominators)` over the same prompts in the same order.

    What makes a prompt easy for both falls out of the error, and nothing is assumed of how alike they are.
    """
    pulls = _pulls(*first) - _pulls(*second)
    values = [float(np.sum(a)) / total if (total := float(np.sum(b))) else math.nan for a, b in (first, second)]
    return Mean(values[0] - values[1], _error(pulls), len(pulls))


def _pulls(numerators: Sequence[float], denominators: Sequence[float]) -> np.ndarray:
    """How much each prompt pulls the ratio its way, to first order: (a - value b) / sum(b)."""
    a, b = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    total = b.sum()
    return (a - a.sum() / total * b) / total if total else np.full(len(a), math.nan)


def _error(pulls: np.ndarray) -> float:
    n = len(pulls)
    return float(np.sqrt(n / (n - 1) * (pulls**2).sum())) if n > 1 else math.nan


def bootstrap_median(values: Sequence[float], level: float = 0.9, draws: int = 1000) -> Spread:
    """The median and its interval, by drawing the values again."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    tail = round((1 - level) / 2 * draws)
    return Spread(statistics.median(values), medians[tail], medians[-tail - 1])


def share_interval(share: float, num: int) -> tuple[float, float]:
    """Wilson's interval at LEVEL of a share of `num` >= 1 independent trials; it never leaves [0, 1]."""
    z = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)
    middle, width = share + z * z / (2 * num), z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, (middle - width) / (1 + z * z / num)), min(1.0, (middle + width) / (1 + z * z / num))


@lru_cache(maxsize=256)
def student_quantile(level: float, df: int) -> float:
    """t such that |T| <= t with probability `level`, T of Student's law with `df` >= 1 degrees of freedom."""
    low, high = 0.0, 1.0
    while student_within(high, df) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, df) < level else (low, middle)
    return (low + high) / 2


def student_within(t: float, df: int) -> float:
    """P(|T| <= t): a finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    cosine = math.cos(angle)
    odd = df % 2
    term = total = cosine if odd else 1.0
    for i in range(3 if odd else 2, df - 1, 2):
        term *= cosine**2 * (i - 1) / i
        total += term
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * (total if df > 1 else 0.0))
    return math.sin(angle) * total
