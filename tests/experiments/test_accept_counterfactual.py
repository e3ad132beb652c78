"""Scores of a written text equal what rules really do: against enumeration, against simulation, and with a control."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from oracle.instances import Instance, Spec
from oracle.problems import race_accepted
from oracle.production import draft_everything

from specdec.experiments.accept.counterfactual import reach_law, refusal
from specdec.experiments.accept.lookup import lookup_law
from specdec.experiments.accept.setting import COMPARED, Setting
from specdec.experiments.accept.steps import expected_steps
from specdec.experiments.accept.summary import Summary, summarise
from specdec.verify.rules import make_rule

VOCAB, WIDTH, DEPTH = 4, 2, 2
REPEATS = 60
Prefix = tuple[int, ...]


class World(NamedTuple):
    """p and q (before anything is fixed) after every prefix."""

    p: dict[Prefix, list[float]]
    q: dict[Prefix, list[float]]

    @staticmethod
    def of(seed: int) -> World:
        rng = np.random.default_rng(seed)
        every = [prefix for n in range(DEPTH + 1) for prefix in itertools.product(range(VOCAB), repeat=n)]
        return World(*({prefix: rng.dirichlet(np.ones(VOCAB)).tolist() for prefix in every} for _ in range(2)))

    def instance(self, mode: str) -> Instance:
        """What the oracle enumerates: the same laws, drafted the way a setting of this mode drafts."""
        specs, laws = {}, dict(self.q)
        for prefix, law in self.q.items():
            order = np.argsort(-np.array(law), kind="stable").tolist()
            fixed = {"top": WIDTH, "mixed": WIDTH - 1}.get(mode, 0)
            draws = {"chain": 1, "top": 0, "mixed": 1, "sampled": WIDTH}[mode]
            if len(prefix) < DEPTH:
                specs[prefix] = Spec(fixed=tuple(order[:fixed]), draws=draws)
            if mode == "mixed":
                rest = [0.0 if token in order[:fixed] else mass for token, mass in enumerate(law)]
                laws[prefix] = [mass / sum(rest) for mass in rest]
        return Instance(
            VOCAB, DEPTH, {k: tuple(v) for k, v in self.p.items()}, {k: tuple(v) for k, v in laws.items()}, specs
        )

    def texts(self, repeats: int, lie: bool = False) -> tuple[Summary, np.ndarray]:
        """Every text of DEPTH tokens `repeats` times, one after the other, and the probability of each.

        lie: give every position its draft law backwards.
        """
        words = [word for word in itertools.product(range(VOCAB), repeat=DEPTH) for _ in range(repeats)]
        prefixes = [word[:depth] for word in words for depth in range(DEPTH)]
        p = torch.tensor([self.p[prefix] for prefix in prefixes])
        q = torch.tensor([self.q[prefix][::-1] if lie else self.q[prefix] for prefix in prefixes])
        token = torch.tensor([token for word in words for token in word])
        weight = [np.prod([self.p[word[:i]][word[i]] for i in range(DEPTH)]) / repeats for word in words]
        return summarise(p, q, token, torch.tensor([0]), seed=3), np.array(weight)


def setting_of(mode: str) -> Setting:
    return Setting.parse(f"model:k={DEPTH}" if mode == "chain" else f"model:tree=2,2:children={mode}")


def scored(world: World, mode: str, rule: str, lie: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """P(at least i accepted), i = 1 .. DEPTH, from summaries, and its standard error over the repeats."""
    summary, weight = world.texts(REPEATS, lie)
    reach = reach_law(summary, setting_of(mode), rule, temperature=1.0)[::DEPTH, 1:]
    each = (reach * weight[:, None] * REPEATS).reshape(-1, REPEATS, DEPTH).sum(0)
    return each.mean(0), each.std(0) / REPEATS**0.5


def enumerated(world: World, mode: str, rule: str) -> np.ndarray:
    every = draft_everything([world.instance(mode)], VOCAB)
    end = make_rule(rule).end_law(every.rows.tree, every.rows.p)
    assert end is not None
    weights = torch.tensor([weight for _, weight, _ in every.trees], dtype=torch.float64)
    depths = every.rows.tree.depths
    return np.array([float((weights[:, None] * end * (depths >= i)).sum()) for i in range(1, DEPTH + 1)])


KINDS = {"chain": ("chain", "sampled"), "top": ("tree", "deterministic"), "mixed": ("tree", "mixed"),
         "sampled": ("tree", "sampled")}  # fmt: skip
CASES = [(mode, rule) for mode, kind in KINDS.items() for rule in COMPARED[kind] if rule != "coupled"]


@pytest.mark.parametrize(("mode", "rule"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_equal_enumeration(mode: str, rule: str, seed: int) -> None:
    world = World.of(seed)
    value, error = scored(world, mode, rule)
    exact = enumerated(world, mode, rule)
    assert np.all(np.abs(value - exact) <= 5 * error + 2e-6), (value, error, exact)
    assert np.all(error < 0.02)


@pytest.mark.parametrize("mode", ["chain", "mixed", "sampled"])
def test_a_wrong_draft_law_shows(mode: str) -> None:
    """The control: told a false draft law, the scores miss the truth by far more than their error."""
    world, rule = World.of(0), COMPARED[KINDS[mode]][0]
    value, error = scored(world, mode, rule, lie=True)
    assert np.max(np.abs(value - enumerated(world, mode, rule)) / error) > 15


@pytest.mark.parametrize(("mode", "width"), [("chain", 1), ("top", WIDTH)])
def test_scores_of_coupled_equal_a_sampled_race(mode: str, width: int) -> None:
    world = World.of(2)
    value, error = scored(world, mode, "coupled")
    simulated = race_accepted(world.instance("chain"), width, races=40_000, seed=1)
    assert abs(value.sum() - simulated) <= 5 * (error.sum() + 0.8 / 40_000**0.5)


def test_production_rules_on_forced_drafts_reproduce_the_formulas_of_chains() -> None:
    """A chain given as a tree of widths 1 goes the long way: forced drafts, small vocabulary, production rules."""
    generator = torch.Generator().manual_seed(5)
    p, q = (torch.randn(40, 300, generator=generator).mul(2).softmax(-1) for _ in range(2))
    token = p.multinomial(1, generator=generator)[:, 0]
    summary = summarise(p, 0.5 * p + 0.5 * q, token, token[:1], seed=0)
    for rule in ("block", "rejection", "naive"):
        direct = reach_law(summary, Setting.parse("model:k=3"), rule, 1.0)
        forced = reach_law(summary, Setting.parse("model:tree=1,1,1:children=sampled"), rule, 1.0)
        np.testing.assert_allclose(forced, direct, rtol=0, atol=2e-4)


def test_greedy_texts_are_scored_by_rank() -> None:
    p = torch.eye(6)[[1, 2, 3]]
    q = torch.tensor([[0.1, 0.6, 0.3, 0, 0, 0], [0, 0.5, 0.3, 0.2, 0, 0], [0.5, 0.3, 0.2, 0, 0, 0]])
    summary = summarise(p, q, torch.tensor([1, 2, 3]), torch.tensor([0]), seed=0)
    assert reach_law(summary, Setting.parse("model:k=2"), "greedy", 0.0).tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert reach_law(summary, Setting.parse("model:tree=2,2"), "greedy", 0.0)[0].tolist() == [1, 1, 1]


def simulate(p: np.ndarray, q: np.ndarray, k: int, limit: int, calls: int) -> float:
    """Mean steps of calls of `limit` tokens under rejection with the same p and q everywhere."""
    rng = np.random.default_rng(0)
    chance = np.minimum(1, p / q)
    steps = 0
    for _ in range(calls):
        at = 0
        while at < limit:
            drafted = rng.choice(len(q), size=min(k, limit - at - 1), p=q)
            kept = rng.random(len(drafted)) < chance[drafted]
            at += 1 + int(np.argmin(np.append(kept, False)))
            steps += 1
    return steps / calls


def test_expected_steps_equal_simulated_calls() -> None:
    p, q, k, limit, calls = np.array([0.1, 0.5, 0.4]), np.array([0.5, 0.4, 0.1]), 3, 10, 6000
    rng = np.random.default_rng(1)
    texts = rng.choice(3, size=(3000, limit), p=p)
    found, other = [], []
    for text in texts:
        rejection, block = np.zeros((limit, k + 1)), np.zeros((limit, k + 1))
        for t in range(limit):
            r = (q / p)[text[t : t + k]]
            rejection[t, : len(r) + 1] = np.concatenate([[1.0], np.cumprod(np.minimum(1, r))])
            block[t, : len(r) + 1] = np.minimum.accumulate(np.concatenate([[1.0], np.cumprod(r)]))
        found.append(expected_steps(rejection, limit).steps)
        other.append(expected_steps(block, limit).steps)
    truth = simulate(p, q, k, limit, calls)
    error = (np.var(found) / len(found) + 2.0 / calls) ** 0.5
    assert abs(np.mean(found) - truth) < 4 * error
    assert abs(np.mean(other) - truth) > 4 * error  # the control: block verification would take fewer steps


def test_lookup_is_asked_at_every_position() -> None:
    p = torch.full((4, 20), 0.05)
    summary = summarise(p, p, torch.tensor([7, 8, 9, 7]), torch.tensor([5, 7, 8, 9, 5]), seed=0)
    reach = lookup_law(summary, Setting.parse("ngram:k=3"))
    assert reach.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]


def test_what_summaries_do_not_hold_is_refused() -> None:
    assert refusal(Setting.parse("model:tree=8:children=top")) is None
    assert "4 drawn siblings, it has 5" in str(refusal(Setting.parse("model:tree=5,1")))
    assert "8 best tokens, it has 9" in str(refusal(Setting.parse("model:tree=9:children=top")))
    assert refusal(Setting.parse("best-first")) is not None
