"""The lab's statistics: scipy's values without scipy, p-values that are honest under the null, the power they state."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import chi2, kstest, ncx2

from specdec.lab.optimal import optimal_acceptance
from specdec.lab.stats import (
    chi2_isf,
    chi2_sf,
    detectable_tv,
    g_test,
    g_test_strata,
    g_test_two_samples,
    ncx2_sf,
    sum_test,
    uniform_bins,
)

NULLS = 400
LAW = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.015, 0.004, 0.001])


@pytest.mark.parametrize("df", [1, 5, 50, 500])
@pytest.mark.parametrize("alpha", [1e-3, 1e-7, 1e-9])
def test_chi_square_functions_are_scipys(df: int, alpha: float) -> None:
    point = chi2.isf(alpha, df)
    assert float(chi2_sf(point, df)) == pytest.approx(alpha, rel=1e-6)
    assert chi2_isf(alpha, df) == pytest.approx(point, rel=1e-6)
    assert ncx2_sf(point, df, 60.0) == pytest.approx(ncx2.sf(point, df, 60.0), rel=1e-6)


def g_null(rng: np.random.Generator) -> float:
    return g_test(rng.multinomial(2000, LAW), LAW).p_value


def strata_null(rng: np.random.Generator) -> float:
    laws = [LAW, LAW[::-1], np.full(9, 1 / 9)]
    return g_test_strata([rng.multinomial(n, law) for n, law in zip((900, 400, 60), laws, strict=True)], laws).p_value


def two_sample_null(rng: np.random.Generator) -> float:
    return g_test_two_samples(rng.multinomial(1500, LAW), rng.multinomial(700, LAW)).p_value


def places_null(rng: np.random.Generator) -> float:
    return g_test(*uniform_bins(rng.random(3000))).p_value


def sum_null(rng: np.random.Generator) -> float:
    """Acceptance with probabilities near 1, where a normal approximation would cry wolf."""
    chance = rng.choice([0.5, 0.9, 0.995, 0.9995], size=800)
    difference = (rng.random(800) < chance) - chance
    return sum_test(difference.sum(), (chance * (1 - chance)).sum(), 800, 1.0, 1e-7).p_value


@pytest.mark.parametrize("null", [g_null, strata_null, two_sample_null, places_null, sum_null])
def test_p_values_under_the_null_are_not_too_small(null: Callable[[np.random.Generator], float]) -> None:
    rng = np.random.default_rng(7)
    values = np.array([null(rng) for _ in range(NULLS)])
    for level in (0.5, 0.1, 0.02):  # a p-value may be conservative, never optimistic
        assert (values < level).mean() < level + 3.5 * np.sqrt(level * (1 - level) / NULLS)
    assert kstest(values, "uniform", alternative="greater").pvalue > 1e-4
    if null is not sum_null:
        assert kstest(values, "uniform").pvalue > 1e-4, "exact up to discreteness"


def g_optimistic(rng: np.random.Generator) -> float:
    return g_null(rng) ** 3


def sum_optimistic(rng: np.random.Generator) -> float:
    """A variance that is a ninth of the truth."""
    difference = (rng.random(800) < 0.5) - 0.5
    return sum_test(difference.sum(), 800 / 36, 800, 1.0, 1e-7).p_value


@pytest.mark.parametrize("null", [g_optimistic, sum_optimistic])
def test_optimistic_p_values_are_noticed(null: Callable[[np.random.Generator], float]) -> None:
    rng = np.random.default_rng(7)
    values = np.array([null(rng) for _ in range(NULLS)])
    assert (values < 0.1).mean() > 0.1 + 3.5 * np.sqrt(0.09 / NULLS)
    assert kstest(values, "uniform", alternative="greater").pvalue < 1e-4


def test_two_different_samples_are_told_apart() -> None:
    rng = np.random.default_rng(3)
    other = LAW + np.array([-0.1, 0.1, 0, 0, 0, 0, 0, 0, 0])
    assert g_test_two_samples(rng.multinomial(1500, LAW), rng.multinomial(1500, other)).p_value < 1e-6


def test_the_stated_power_of_a_g_test_is_real() -> None:
    """A law at the stated distance, in the direction hardest to see, is refused as often as promised."""
    alpha, samples = 1e-6, 20_000
    law = np.array([0.3, 0.3, 0.2, 0.2])
    tv = detectable_tv(3, samples, alpha)
    wrong = law + tv * np.array([law[0] / 0.5, -law[1] / 0.5, law[2] / 0.5, -law[3] / 0.5])
    assert abs(wrong - law).sum() / 2 == pytest.approx(tv)
    rng = np.random.default_rng(5)
    refused = [g_test(rng.multinomial(samples, wrong), law).p_value < alpha for _ in range(300)]
    assert np.mean(refused) >= 0.97


def test_the_stated_power_of_a_sum_test_is_real() -> None:
    alpha, count, chance = 1e-7, 5000, 0.6
    rng = np.random.default_rng(6)
    variance = count * chance * (1 - chance)
    shift = sum_test(0.0, variance, count, 1.0, alpha).detectable
    kept = rng.random((300, count)) < chance + shift
    refused = [sum_test(row.sum() - count * chance, variance, count, 1.0, alpha).p_value < alpha for row in kept]
    assert np.mean(refused) >= 0.97


def test_impossible_cells_and_bad_laws() -> None:
    assert g_test(np.array([5, 1]), np.array([1.0, 0.0])).p_value == 0.0
    with pytest.raises(ValueError, match="sum to 1"):
        g_test(np.array([5, 1]), np.array([0.5, 0.6]))
    assert g_test_two_samples(np.array([2, 0]), np.array([1, 1])).df == 0


VECTOR = (torch.tensor([0.1, 0.5, 0.4], dtype=torch.float64), torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("count", "replacement", "wanted"),
    [(1, False, 0.6), (1, True, 0.6), (2, True, 0.79), (2, False, 0.866666666667), (3, False, 1.0)],
)
def test_optimal_acceptance_of_the_worked_example(count: int, replacement: bool, wanted: float) -> None:
    assert optimal_acceptance(*VECTOR, count, replacement) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("replacement", [True, False])
def test_the_prefix_scan_is_the_minimum_over_all_sets(replacement: bool) -> None:
    """Against every subset, with Pr[all drafts in H] summed over all ordered draws."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        p, q = (torch.rand(5, generator=generator, dtype=torch.float64) ** 3 for _ in range(2))
        p, q = p / p.sum(), q / q.sum()
        for count in (2, 3):
            best = 1.0
            for size in range(6):
                for subset in itertools.combinations(range(5), size):
                    best = min(best, 1 + float(p[list(subset)].sum()) - _all_inside(q, subset, count, replacement))
            assert optimal_acceptance(p, q, count, replacement) == pytest.approx(best, abs=1e-9)


def _all_inside(q: torch.Tensor, subset: tuple[int, ...], count: int, replacement: bool) -> float:
    total = 0.0
    for drawn in itertools.product(subset, repeat=count):
        if not replacement and len(set(drawn)) < count:
            continue
        chance, rest = 1.0, 1.0
        for token in drawn:
            chance *= float(q[token]) / rest
            rest -= 0.0 if replacement else float(q[token])
        total += chance
    return total


def test_more_drafts_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="1 <= count <= 3"):
        optimal_acceptance(*VECTOR, 4)
