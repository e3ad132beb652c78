"""What each rule says about its own acceptance is what it does: end laws and means against the enumerated oracle."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from oracle.cases import COIN_CASES, VOCAB, drafted, instances, random_trees
from oracle.enumerate import BranchingCoins, branches, step_law
from oracle.instances import Spec, context_free
from oracle.production import batch, draft_everything
from oracle.reference import Rule, Tree
from oracle.tree_reference import REFERENCES

from specdec.verify.noise import Noise
from specdec.verify.rules import make_rule


def reference_end_law(tree: Tree, rule: Rule) -> list[float]:
    """Where a scalar rule ends on this very tree, integrated over its coins."""
    law = [0.0] * len(tree.prefixes)
    for node, mass in branches(lambda chooser: rule(tree, BranchingCoins(chooser))[0]):
        law[node] += float(mass)
    return law


@pytest.mark.parametrize(("rule", "kind"), COIN_CASES)
def test_end_law_of_a_given_tree(rule: str, kind: str) -> None:
    trees = random_trees(kind, seed=7)
    rows = batch(trees, VOCAB, extra=2)
    found = make_rule(rule).end_law(rows.tree, rows.p)
    assert found is not None
    assert found.dtype == torch.float64
    wanted = torch.zeros_like(found)
    for row, tree in enumerate(trees):
        law = reference_end_law(tree, REFERENCES[rule])
        wanted[row, : len(law)] = torch.tensor(law, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rule", "kind"), COIN_CASES)
def test_expected_accepted_averages_to_the_step_law(rule: str, kind: str) -> None:
    """Averaged over every draft tree, the mean given the tree is E[tau] of the exact step law."""
    every = drafted(kind)
    expected = make_rule(rule).expected_accepted(every.rows.tree, every.rows.p)
    assert expected is not None
    found = [0.0] * len(every.instances)
    for (_, weight, owner), mean in zip(every.trees, expected.mean.tolist(), strict=True):
        found[owner] += weight * mean
    wanted = [float(step_law(instance, REFERENCES[rule]).tau) for instance in instances(kind)]
    assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(("rule", "gamma", "tokens"), [
    ("rejection", 2, 1.96), ("rejection", 4, 2.3056), ("block", 2, 2.00), ("block", 4, 2.5025),
])  # fmt: skip
def test_published_figures(rule: str, gamma: int, tokens: float) -> None:
    p, q = ([Fraction(n, 10) for n in law] for law in ((1, 5, 4), (5, 4, 1)))
    every = draft_everything([context_free(tuple(p), tuple(q), Spec(draws=1), gamma)], vocab=3)
    expected = make_rule(rule).expected_accepted(every.rows.tree, every.rows.p)
    assert expected is not None
    total = sum(weight * mean for (_, weight, _), mean in zip(every.trees, expected.mean.tolist(), strict=True))
    assert 1 + total == pytest.approx(tokens, abs=5e-5)


@pytest.mark.parametrize("rule", ["rejection", "block", "naive", "traversal", "budget_flow", "recursive_rejection"])
@pytest.mark.parametrize("lie", [False, True], ids=["true q", "false q"])
def test_excess_is_zero_on_average_and_shows_a_false_q(rule: str, lie: bool) -> None:
    """Rejection and block average over the draft: told another q than was sampled from, their excess moves away."""
    p, q = ([Fraction(n, 10) for n in law] for law in ((1, 5, 4), (5, 4, 1)))
    every = draft_everything([context_free(tuple(p), tuple(q), Spec(draws=1), 2)], vocab=3)
    weights = torch.tensor([weight for _, weight, _ in every.trees], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    picked = torch.multinomial(weights, 40_000, replacement=True, generator=generator)
    rows = every.rows.take(picked)
    if lie and rows.tree.q is not None:
        rows.tree.q.mul_(rows.tree.q).div_(rows.tree.q.sum(-1, keepdim=True))
    uniforms = torch.rand(len(picked), rows.tree.tokens.shape[1] + 1, dtype=torch.float64, generator=generator)
    noise = Noise(uniforms[:, :-1], uniforms[:, -1])
    judged = make_rule(rule)
    excess = judged.excess(rows.tree, rows.p, judged(rows.tree, rows.p, noise))
    assert excess is not None
    z = float(excess.mean.sum() / excess.variance.sum().sqrt())
    if lie and rule in ("rejection", "block"):
        assert abs(z) > 10
    else:
        assert abs(z) < 4.5


def test_variance_is_that_of_the_end_law() -> None:
    trees = random_trees("sampled", seed=9)
    rows = batch(trees, VOCAB)
    for name in ("rejection", "block", "naive"):
        rule = make_rule(name)
        law, expected = rule.end_law(rows.tree, rows.p), rule.expected_accepted(rows.tree, rows.p)
        assert law is not None
        assert expected is not None
        depths = rows.tree.depths.double()
        centred = depths - expected.mean[:, None]
        torch.testing.assert_close(expected.variance, (law * centred * centred).sum(1), rtol=0, atol=1e-12)
