"""Numbers worked out by hand, by enumeration and by linear programming, that every version must reproduce."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
from oracle.cases import COIN_CASES, instances
from oracle.enumerate import distance, step_law
from oracle.flow import optimal_flow, top_down_flow
from oracle.instances import Instance, Spec, context_free
from oracle.lp import optimum
from oracle.production import draft_everything, production_law
from oracle.tree_reference import REFERENCES

from specdec.verify.rules import make_rule

P = (F(1, 10), F(5, 10), F(4, 10))
Q = (F(5, 10), F(4, 10), F(1, 10))
TOY_P, TOY_Q = (F(1, 3), F(2, 3)), (F(2, 3), F(1, 3))
SAMPLED = Spec(draws=1)


def chain(depth: int, p: tuple[F, ...] = P, q: tuple[F, ...] = Q) -> Instance:
    return context_free(p, q, SAMPLED, depth)


def siblings(spec: Spec, depth: int = 1, replacement: bool = False) -> Instance:
    return context_free(P, Q, spec, depth, replacement)


def hu_tree(depth: int) -> Instance:
    """The likeliest token of q fixed, the other drawn from the rest of q."""
    return context_free(P, (F(0), F(8, 10), F(2, 10)), Spec(fixed=(0,), draws=1), depth)


EXACT = [
    ("rejection", chain(1), F(6, 10)),
    ("block", chain(1), F(6, 10)),
    ("rejection", chain(2), F("0.96")),
    ("block", chain(2), F("1.00")),
    ("rejection", chain(4), F("1.3056")),
    ("block", chain(4), F("1.5025")),
    ("rejection", chain(2, TOY_P, TOY_Q), F(10, 9)),
    ("block", chain(2, TOY_P, TOY_Q), F(11, 9)),
    ("naive", siblings(Spec(draws=2), replacement=True), F("0.471")),
    ("naive", siblings(Spec(fixed=(0, 1))), F("0.600")),
    ("recursive_rejection", siblings(Spec(draws=2), replacement=True), F("0.740")),
    ("recursive_rejection", siblings(Spec(draws=2)), F("0.780")),
    ("budget_flow", hu_tree(1), F("0.800")),
    ("recursive_rejection", siblings(Spec(draws=2), depth=2), F("1.3884")),
    ("traversal", siblings(Spec(draws=2), depth=2), F("1.4324")),
    ("budget_flow", hu_tree(2), F("1.50")),
]


@pytest.mark.parametrize(("rule", "instance", "accepted"), EXACT)
def test_expected_accepted_tokens(rule: str, instance: Instance, accepted: F):
    # The deeper numbers are quoted rounded to four digits.
    assert float(step_law(instance, REFERENCES[rule]).tau) == pytest.approx(float(accepted), abs=5e-5)
    measured = production_law(draft_everything([instance], instance.vocab), REFERENCES[rule], make_rule(rule)).tau[0]
    assert measured == pytest.approx(float(step_law(instance, REFERENCES[rule]).tau), abs=1e-12)


@pytest.mark.parametrize("instance", [chain(1), chain(2), chain(3), chain(2, TOY_P, TOY_Q)])
def test_block_attains_the_optimum_of_chains(instance: Instance):
    assert float(step_law(instance, REFERENCES["block"]).tau) == pytest.approx(optimum(instance), abs=1e-7)


OPTIMA = [
    (siblings(Spec(draws=2), replacement=True), 0.790),
    (siblings(Spec(draws=2)), 0.8667),
    (hu_tree(1), 0.800),
    (siblings(Spec(draws=2), depth=2), 1.69333),
    (hu_tree(2), 1.52),
]


@pytest.mark.parametrize(("instance", "accepted"), OPTIMA)
def test_optimum_of_the_linear_program(instance: Instance, accepted: float):
    assert optimum(instance) == pytest.approx(accepted, abs=5e-5)


@pytest.mark.parametrize("kind", ["sampled", "one_sampled", "without_replacement", "fixed", "mixed"])
def test_no_rule_beats_the_optimum_and_the_known_orderings_hold(kind: str):
    small = [instance for instance in instances(kind) if instance.depth <= 2 and instance.vocab <= 3][:25]
    assert len(small) == 25
    for instance in small:
        rules = [rule for rule, taken in COIN_CASES if taken == kind and rule != "greedy"]
        tau = {rule: float(step_law(instance, REFERENCES[rule]).tau) for rule in rules}
        assert max(tau.values()) <= optimum(instance) + 1e-7
        assert tau["traversal"] >= tau["recursive_rejection"] - 1e-12
        if "block" in tau:
            assert tau["traversal"] == pytest.approx(tau["block"], abs=1e-12)
        if "budget_flow" in tau:
            assert tau["budget_flow"] >= max(tau["traversal"], tau["naive"]) - 1e-12


def test_budget_flow_from_the_root_down_is_exact_and_worth_less():
    instance = hu_tree(2)
    law = step_law(instance, top_down_flow)
    assert distance(instance, law.emitted) == 0
    assert law.tau == F("1.44")


@pytest.mark.parametrize(("depth", "least"), [(1, 0.86666), (2, 1.64444)])
def test_budget_flow_with_optimal_weights_over_drawn_siblings(depth: int, least: float):
    # Several weights are optimal at a node and differ below it: 1.64444 is what one choice of them reaches.
    instance = siblings(Spec(draws=2), depth).as_float()
    law = step_law(instance, optimal_flow)
    assert distance(instance, law.emitted) <= 1e-12
    assert least <= law.tau <= optimum(instance) + 1e-7


def test_naive_attains_the_optimum_of_fixed_trees():
    instance = siblings(Spec(fixed=(0, 1)), depth=2)
    assert float(step_law(instance, REFERENCES["naive"]).tau) == pytest.approx(optimum(instance), abs=1e-7)
