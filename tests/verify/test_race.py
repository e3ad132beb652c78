"""The exponential race: noise by position, winners that follow the law, and meetings as frequent as theory says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from law_checks import must_be_caught
from stats import g_test, judge, judge_mean
from test_noise import MASK, philox
from torch import Tensor

from specdec.verify import race as race_module
from specdec.verify.noise import Role, uniform, uniform_pairs
from specdec.verify.race import RaceStream, arrivals, gumbel

CPU = torch.device("cpu")
SAMPLES = 60_000
LAWS = {
    "peaked": ([0.6, 0.2, 0.1, 0.05, 0.05], [0.5, 0.25, 0.1, 0.1, 0.05]),
    "flat": ([0.2, 0.2, 0.2, 0.2, 0.2], [0.24, 0.16, 0.2, 0.22, 0.18]),
    "far apart": ([0.1, 0.5, 0.4, 0.0, 0.0], [0.5, 0.4, 0.1, 0.0, 0.0]),
    "with zeros": ([0.0, 0.3, 0.3, 0.4, 0.0], [0.5, 0.0, 0.3, 0.1, 0.1]),
}
"""Pairs (p, q). On all of them sum(p q) lies below (1 - TV)/(1 + TV), so that independent races would show."""
every_pair = pytest.mark.parametrize("name", list(LAWS))


def scalar_race(seed: int, request: int, position: int, token: int) -> float:
    words = philox((token // 2, position, request, Role.COUPLED), (seed & MASK, (seed >> 32) & MASK))
    high, low = words[2:] if token % 2 else words[:2]
    return -math.log1p(-((high >> 6) * 2**26 + (low >> 6)) * 2.0**-52)


def noise(rows: int, vocab: int, position: int = 3, seed: int = 5) -> Tensor:
    """One position of many requests, `[rows, vocab]`."""
    return RaceStream([seed] * rows, range(rows), vocab, CPU)(range(rows), [position] * rows, 1)[:, 0]


def laws(name: str) -> tuple[Tensor, Tensor]:
    p, q = (torch.tensor(law, dtype=torch.float64) for law in LAWS[name])
    return p, q


@pytest.mark.parametrize("vocab", [1, 2, 7, 8])
def test_equals_the_scalar_reference_whatever_was_asked_before(vocab: int) -> None:
    """Rows of any order, positions far apart and back again, depths beyond the table, odd vocabularies."""
    seeds, requests = [3, 2**63 + 5, -1], [0, 7, 2]
    stream = RaceStream(seeds, requests, vocab, CPU)
    for rows, positions, depths in (
        ([0, 1, 2], [4, 9, 900], 3),
        ([0, 1, 2], [6, 10, 901], 5),
        ([2, 0], [901, 8], 2),
        ([2, 0], [970, 60], 80),
        ([1], [0], 1),
        ([1, 2], [12, 4], 4),
        ([1], [2**31], 2),
    ):
        found = stream(rows, positions, depths)
        assert found.shape == (len(rows), depths, vocab)
        assert found.dtype == torch.float64
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            for depth in range(depths):
                key = (seeds[row] % 2**64, requests[row], position + depth)
                wanted = [scalar_race(*key, token) for token in range(vocab)]
                assert found[i, depth].tolist() == pytest.approx(wanted, rel=1e-14)


def test_a_pair_holds_two_numbers_of_which_the_first_is_uniforms() -> None:
    index = torch.arange(1000)
    first, second = uniform_pairs(9, 1, 2, Role.COUPLED, index)
    assert torch.equal(first, uniform(9, 1, 2, Role.COUPLED, index))
    assert torch.cat([first, second]).unique().numel() == 2000


def test_drafter_and_rule_share_one_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a step the drafter asks for its levels and the rule for one more; rows move at paces of their own."""
    evaluated: list[int] = []

    def counting(seed: Any, request: Any, step: Tensor, role: int, index: Tensor) -> tuple[Tensor, Tensor]:
        evaluated.append(seed.shape[0] * step.shape[1] * index.shape[0] * 2)
        return uniform_pairs(seed, request, step, role, index)

    monkeypatch.setattr(race_module, "uniform_pairs", counting)
    vocab = 200_000  # too wide to be tabulated ahead
    stream = RaceStream([1, 2], [0, 0], vocab, CPU)
    for start in (10, 15):
        evaluated.clear()
        stream([0, 1], [start, start + 2], 4)
        stream([0, 1], [start, start + 2], 5)
        assert sum(evaluated) == 2 * 5 * vocab
    evaluated.clear()
    stream([0, 1], [18, 19], 4)  # rows have moved by 3 and 2: what is left of both is not evaluated again
    stream([0, 1], [18, 19], 5)
    assert sum(evaluated) == 2 * 3 * vocab
    small = RaceStream([1], [0], 8, CPU)
    evaluated.clear()
    for step in range(20):
        small([0], [3 * step], 4)
        small([0], [3 * step], 5)
    assert sum(evaluated) <= 64 * 8


@every_pair
def test_the_winner_is_a_draw_from_the_law(name: str) -> None:
    p, _ = laws(name)
    winners = arrivals(p, noise(SAMPLES, len(p))).argmin(-1)
    judge(g_test(np.bincount(winners, minlength=len(p)), p.numpy()), f"winners over requests, {name}")
    one_row = RaceStream([11], [0], len(p), CPU)([0], [0], SAMPLES)[0]
    winners = arrivals(p, one_row).argmin(-1)
    judge(g_test(np.bincount(winners, minlength=len(p)), p.numpy()), f"winners over positions, {name}")
    pairs = np.bincount(winners[0::2] * len(p) + winners[1::2], minlength=len(p) ** 2)
    judge(g_test(pairs, torch.outer(p, p).flatten().numpy()), f"neighbouring positions are independent, {name}")


def test_uniform_times_in_place_of_exponential_ones_are_caught() -> None:
    p, _ = laws("far apart")
    times = uniform(5, torch.arange(SAMPLES)[:, None], 3, Role.COUPLED, torch.arange(len(p)))
    with must_be_caught():
        judge(g_test(np.bincount(arrivals(p, times).argmin(-1), minlength=len(p)), p.numpy()), "uniform race")


def test_a_pair_that_repeats_its_first_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeating(*key: Any) -> tuple[Tensor, Tensor]:
        first, _ = uniform_pairs(*key)
        return first, first

    monkeypatch.setattr(race_module, "uniform_pairs", repeating)
    p, _ = laws("far apart")
    with must_be_caught():
        winners = arrivals(p, noise(SAMPLES, len(p))).argmin(-1)
        judge(g_test(np.bincount(winners, minlength=len(p)), p.numpy()), "pairs")


def meeting(p: Tensor, q: Tensor) -> float:
    """P(both races have the same winner) = sum_x 1 / sum_y max(p_y / p_x, q_y / q_x): the minimum of all
    E(y) max(p_y / p_x, q_y / q_x) is x's own exactly when x wins both."""
    total = 0.0
    for x in range(len(p)):
        if p[x] > 0 and q[x] > 0:
            total += 1.0 / float(torch.maximum(p / p[x], q / q[x]).sum())
    return total


@every_pair
def test_one_coupled_draft_meets_the_target_as_often_as_theory_says(name: str) -> None:
    p, q = laws(name)
    race = noise(SAMPLES, len(p))
    met = (arrivals(p, race).argmin(-1) == arrivals(q, race).argmin(-1)).double().numpy()
    judge_mean(met - meeting(p, q), f"meetings, {name}")
    tv = float((p - q).abs().sum() / 2)
    margin = 5 * met.std() / len(met) ** 0.5
    assert (1 - tv) / (1 + tv) - margin <= met.mean() <= 1 - tv + margin
    # Negative control: two races of their own meet too rarely.
    apart = (arrivals(p, race).argmin(-1) == arrivals(q, noise(SAMPLES, len(p), seed=6)).argmin(-1)).double().numpy()
    assert apart.mean() < (1 - tv) / (1 + tv) - margin
    with must_be_caught():
        judge_mean(apart - meeting(p, q), "independent races")


@every_pair
def test_more_children_meet_the_target_more_often(name: str) -> None:
    p, q = laws(name)
    race = noise(20_000, len(p))
    target = arrivals(p, race).argmin(-1)
    ranked = (q.log() + gumbel(race)).topk(3, dim=-1).indices
    rates = [float((ranked[:, :count] == target[:, None]).any(1).double().mean()) for count in (1, 2, 3)]
    assert rates[0] < rates[1] < rates[2]


def test_arrivals_and_gumbel_tell_the_same_order() -> None:
    generator = torch.Generator().manual_seed(1)
    scores = 3 * torch.randn(2000, 9, generator=generator, dtype=torch.float64)
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -torch.inf
    scores[:, 0] = 0.0
    race = noise(2000, 9)
    first = arrivals(scores.softmax(-1), race)
    assert torch.equal(first.argsort(-1)[:, :1], (scores + gumbel(race)).argsort(-1, descending=True)[:, :1])
    order = (scores + gumbel(race)).argsort(-1, descending=True)
    assert bool((first.gather(1, order).diff(dim=1).nan_to_num() >= -1e-12).all())


def test_what_is_impossible_never_arrives_and_rounding_never_makes_a_nan() -> None:
    law = torch.tensor([0.0, 5e-324, 1.0, 0.0], dtype=torch.float64)
    for times in ([0.0, 1.0, 40.0, 0.0], [0.0, 0.0, 40.0, 0.0], [0.0, 40.0, 0.0, 0.0]):
        found = arrivals(law, torch.tensor(times, dtype=torch.float64))
        assert not bool(found.isnan().any())
        assert int(found.argmin()) in (1, 2)
        assert found[0] == found[3] == torch.inf
        assert bool(gumbel(torch.tensor(times, dtype=torch.float64)).isfinite().all())
