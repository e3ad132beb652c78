"""Judgements of sampling laws in tests: the lab's goodness-of-fit tests at one level, with sample sizes to match."""

from __future__ import annotations

import numpy as np
import torch

from specdec.lab import stats as lab
from specdec.lab.stats import MIN_EXPECTED, POWER, GTest, g_test, g_test_strata

__all__ = [
    "ALPHA", "POWER", "TV", "GTest", "LawMismatch", "g_test", "g_test_strata", "judge", "judge_mean",
    "required_samples", "samples_for",
]  # fmt: skip

ALPHA = 1e-6
"""Chance of a false alarm per judged law. Seeds are fixed, so it can only strike when code changes."""
TV = 0.02
"""Total variation every judged law must be able to reveal with probability POWER."""


class LawMismatch(AssertionError):
    """The observed counts do not follow the law. Negative controls must end here, not in any other failure."""


def required_samples(df: int) -> int:
    """Samples with which a G-test of `df` degrees of freedom keeps the promise of POWER at TV."""
    return lab.required_samples(df, TV, ALPHA, POWER)


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
    if not abs(z) < -float(torch.special.ndtri(torch.tensor(ALPHA / 2, dtype=torch.float64))):
        raise LawMismatch(f"{what}: mean difference {differences.mean():+.4f}, z = {z:.1f}")
