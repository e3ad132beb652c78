"""Goodness-of-fit tests for sampling laws, with the sample size they need to mean anything."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, ncx2, norm

ALPHA = 1e-6
"""Chance of a false alarm per judged law. Seeds are fixed, so it can only strike when code changes."""
POWER = 0.99
TV = 0.02
"""Total variation every judged law must be able to reveal with probability POWER."""
MIN_EXPECTED = 5.0
"""Cells with a smaller expected count are pooled: the chi-square limit does not hold for them."""


class LawMismatch(AssertionError):
    """The observed counts do not follow the law. Negative controls must end here, not in any other failure."""


class GTest(NamedTuple):
    statistic: float
    df: int
    p_value: float


def g_test(observed: np.ndarray, law: np.ndarray) -> GTest:
    """G-test of counts `[cells]` against probabilities `[cells]`; impossible cells that occur give p = 0."""
    return g_test_strata([observed], [law])


def g_test_strata(observed: list[np.ndarray], laws: list[np.ndarray]) -> GTest:
    """One G-test of several independent multinomials: statistics and degrees of freedom add up.

    Strata in which fewer than two cells survive the pooling say nothing and are left out.
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
    return GTest(statistic, df, float(chi2.sf(statistic, df)) if df else 1.0)


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
def required_samples(df: int, tv: float = TV, alpha: float = ALPHA, power: float = POWER) -> int:
    """Samples with which a G-test of `df` degrees of freedom sees *any* law at total variation `tv`.

    By Cauchy-Schwarz sum((p' - p)^2 / p) >= (sum |p' - p|)^2 = 4 tv^2, so the noncentrality of the statistic is at
    least 4 n tv^2, whatever the direction of the error.
    """
    critical = chi2.isf(alpha, df)
    noncentrality = brentq(lambda value: ncx2.sf(critical, df, value) - power, 1e-3, 20 * critical + 200)
    return int(np.ceil(noncentrality / (4 * tv * tv)))


def samples_for(law: np.ndarray) -> int:
    """Samples with which `g_test` keeps the promise of POWER at TV for this law, given the cells it will not pool."""
    samples = 0
    while True:
        cells = max(2, int((samples * law >= MIN_EXPECTED).sum()))
        if required_samples(cells - 1) <= samples:
            return samples
        samples = required_samples(cells - 1)


def judge(result: GTest, what: str) -> None:
    """Raises LawMismatch when the observed counts are too unlikely."""
    if result.p_value < ALPHA:
        raise LawMismatch(
            f"{what}: G = {result.statistic:.1f} with {result.df} degrees of freedom, p = {result.p_value:.2g}"
        )


def judge_mean(differences: np.ndarray, what: str) -> None:
    """`differences` are independent with mean 0; raises LawMismatch when their average is too far from it."""
    spread = differences.std(ddof=1)
    z = (
        differences.mean() / (spread / np.sqrt(len(differences)))
        if spread > 0
        else np.inf * np.sign(differences.mean())
    )
    if not abs(z) < norm.isf(ALPHA / 2):
        raise LawMismatch(f"{what}: mean difference {differences.mean():+.4f}, z = {z:.1f}")
