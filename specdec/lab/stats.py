"""Goodness-of-fit tests with stated power, for sampling laws and for sums of martingale differences. Needs no scipy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_EXPECTED = 5.0
"""Cells with a smaller expected count are pooled: the chi-square limit does not hold for them."""
POWER = 0.99
"""Probability with which a stated effect would be seen."""


class GTest(NamedTuple):
    statistic: float
    df: int
    p_value: float


def chi2_sf(x: float, df: float | np.ndarray) -> np.ndarray:
    """Survival function of the chi-square law, in the shape of `df`."""
    half = torch.as_tensor(np.asarray(df, dtype=np.float64) / 2)
    return torch.special.gammaincc(half, torch.full_like(half, max(x, 0.0) / 2)).numpy()


@lru_cache(maxsize=1024)
def chi2_isf(alpha: float, df: int) -> float:
    """The point that a chi-square variable of `df` degrees of freedom exceeds with probability `alpha`."""
    high = df + 10.0
    while chi2_sf(high, df) > alpha:
        high *= 2
    return _root(lambda x: float(chi2_sf(x, df)) - alpha, 0.0, high)


def ncx2_sf(x: float, df: int, noncentrality: float) -> float:
    """Survival function of the noncentral chi-square law: a Poisson mixture of central ones."""
    half = noncentrality / 2
    spread = 10 * math.sqrt(half) + 20
    terms = np.arange(max(0, math.floor(half - spread)), math.ceil(half + spread) + 1, dtype=np.float64)
    log_weight = (
        terms * math.log(half) - half - torch.lgamma(torch.as_tensor(terms + 1)).numpy() if half else -1e3 * terms
    )
    return float((np.exp(log_weight) * chi2_sf(x, df + 2 * terms)).sum())


def g_test(observed: np.ndarray, law: np.ndarray) -> GTest:
    """G-test of counts `[cells]` against probabilities `[cells]`; impossible cells that occur give p = 0."""
    return g_test_strata([observed], [law])


def g_test_strata(observed: Sequence[np.ndarray], laws: Sequence[np.ndarray]) -> GTest:
    """One G-test of several independent multinomials: statistics and degrees of freedom add up.

    Strata in which fewer than two cells survive the pooling say nothing and are left out.

    Raises:
        ValueError: a law that does not sum to 1.
    """
    statistic, df = 0.0, 0
    for counts, law in zip(observed, laws, strict=True):
        counts, law = np.asarray(counts, dtype=np.float64).ravel(), np.asarray(law, dtype=np.float64).ravel()
        if abs(law.sum() - 1) > 1e-5:
            raise ValueError(f"expected probabilities that sum to 1, got {law.sum()}")
        if counts[law <= 0].any():
            return GTest(float("inf"), df, 0.0)
        have, want = pool(counts[law > 0], counts.sum() * law[law > 0] / law[law > 0].sum())
        if len(want) < 2:
            continue
        positive = have > 0
        statistic += 2 * float((have[positive] * np.log(have[positive] / want[positive])).sum())
        df += len(want) - 1
    return GTest(statistic, df, float(chi2_sf(statistic, df)) if df else 1.0)


def g_test_two_samples(first: np.ndarray, second: np.ndarray) -> GTest:
    """G-test that two count vectors `[cells]` come from one law, whatever it is.

    Cells are pooled by their joint count, which says nothing about where the samples differ.
    """
    table = np.stack([first, second]).astype(np.float64)
    share = table.sum(1) / table.sum()
    together = table.sum(0)
    rarest = MIN_EXPECTED / share.min()
    order = np.argsort(together, kind="stable")
    table, together = table[:, order], together[order]
    cut = int((together < rarest).sum())
    while 0 < cut < len(together) and together[:cut].sum() < rarest:
        cut += 1
    if cut > 1:
        table = np.add.reduceat(table, [0, *range(cut, len(together))], axis=1)
    if table.shape[1] < 2:
        return GTest(0.0, 0, 1.0)
    want = share[:, None] * table.sum(0)
    seen = table > 0
    statistic = 2 * float((table[seen] * np.log(table[seen] / want[seen])).sum())
    return GTest(statistic, table.shape[1] - 1, float(chi2_sf(statistic, table.shape[1] - 1)))


def pool(observed: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge the cells expected below MIN_EXPECTED into one, and that with the next smallest until it is above."""
    order = np.argsort(expected)
    observed, expected = observed[order], expected[order]
    cut = int((expected < MIN_EXPECTED).sum())
    while 0 < cut < len(expected) and expected[:cut].sum() < MIN_EXPECTED:
        cut += 1
    if cut <= 1:
        return observed, expected
    merged = np.add.reduceat(np.stack([observed, expected]), [0, *range(cut, len(expected))], axis=1)
    return merged[0], merged[1]


@lru_cache(maxsize=256)
def required_samples(df: int, tv: float, alpha: float, power: float = POWER) -> int:
    """Samples with which a G-test of `df` degrees of freedom sees *any* law at total variation `tv`.

    By Cauchy-Schwarz sum((p' - p)^2 / p) >= (sum |p' - p|)^2 = 4 tv^2, so the noncentrality of the statistic is at
    least 4 n tv^2, whatever the direction of the error.
    """
    return math.ceil(_noncentrality(df, alpha, power) / (4 * tv * tv))


def detectable_tv(df: int, samples: int, alpha: float, power: float = POWER) -> float:
    """Total variation (of the pooled cells) that `samples` reveal with probability `power`; see `required_samples`."""
    return min(1.0, math.sqrt(_noncentrality(df, alpha, power) / (4 * samples))) if df and samples else 1.0


@lru_cache(maxsize=256)
def _noncentrality(df: int, alpha: float, power: float) -> float:
    critical = chi2_isf(alpha, df)
    return _root(lambda value: power - ncx2_sf(critical, df, value), 1e-3, 20 * critical + 200)


class SumTest(NamedTuple):
    """A sum of `num` martingale differences against 0. z: in standard errors.

    detectable: mean difference that would be seen with probability POWER.
    """

    num: int
    mean: float
    z: float
    p_value: float
    detectable: float


def sum_test(total: float, variance: float, count: int, bound: float, alpha: float) -> SumTest:
    """Is a sum of `count` martingale differences compatible with 0? By Freedman's inequality, valid at any count.

    P(|sum| >= t) <= 2 exp(-t^2 / (2 (variance + bound t / 3))): rare large differences (an acceptance probability of
    0.999) make the normal approximation useless at the levels needed here.

    Args:
        variance: sum of the differences' conditional variances.
        bound: no difference is larger in absolute value.
        alpha: level at which the test will be judged (for `detectable`).
    """
    away = abs(total)
    scale = variance + bound * away / 3
    p_value = 1.0 if away == 0 else min(1.0, 2 * math.exp(-away * away / (2 * scale))) if scale > 0 else 0.0
    z = total / math.sqrt(variance) if variance > 0 else 0.0 if total == 0 else math.copysign(math.inf, total)
    log_term = math.log(2 / alpha)
    slack = bound * log_term / 3
    critical = slack + math.sqrt(slack * slack + 2 * variance * log_term)
    beyond = -float(torch.special.ndtri(torch.tensor(1 - POWER, dtype=torch.float64))) * math.sqrt(variance)
    return SumTest(
        count, total / count if count else 0.0, z, p_value, (critical + beyond) / count if count else math.inf
    )


def uniform_bins(values: Tensor | np.ndarray, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Counts and law of values that should be uniform on [0, 1): both `[bins]`."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    counts = np.bincount(np.minimum((flat * bins).astype(np.int64), bins - 1), minlength=bins)
    return counts, np.full(bins, 1.0 / bins)


def _root(function: object, low: float, high: float) -> float:
    """Where a decreasing function crosses 0, by bisection."""
    assert callable(function)
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return (low + high) / 2
