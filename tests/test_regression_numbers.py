"""Numbers worked out by hand, by enumeration and by linear programming, that every version must reproduce."""

from __future__ import annotations

from fractions import Fraction as F

import pytest
from oracle.enumerate import step_law
from oracle.instances import Instance, Spec, context_free
from oracle.lp import optimum
from oracle.production import production_law
from oracle.reference import REFERENCES

from specdec.verify.rules import make_rule

P = (F(1, 10), F(5, 10), F(4, 10))
Q = (F(5, 10), F(4, 10), F(1, 10))
TOY_P, TOY_Q = (F(1, 3), F(2, 3)), (F(2, 3), F(1, 3))
SAMPLED = Spec(draws=1)


def chain(depth: int, p: tuple[F, ...] = P, q: tuple[F, ...] = Q) -> Instance:
    return context_free(p, q, SAMPLED, depth)


def siblings(spec: Spec, depth: int = 1, replacement: bool = False) -> Instance:
    return context_free(P, Q, spec, depth, replacement)


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
]


@pytest.mark.parametrize(("rule", "instance", "accepted"), EXACT)
def test_expected_accepted_tokens(rule: str, instance: Instance, accepted: F):
    # The deeper numbers are quoted rounded to four digits.
    assert float(step_law(instance, REFERENCES[rule]).tau) == pytest.approx(float(accepted), abs=5e-5)
    measured = production_law([instance], REFERENCES[rule], make_rule(rule), instance.vocab).tau[0]
    assert measured == pytest.approx(float(step_law(instance, REFERENCES[rule]).tau), abs=1e-12)


@pytest.mark.parametrize("instance", [chain(1), chain(2), chain(3), chain(2, TOY_P, TOY_Q)])
def test_block_attains_the_optimum_of_chains(instance: Instance):
    assert float(step_law(instance, REFERENCES["block"]).tau) == pytest.approx(optimum(instance), abs=1e-7)


def test_naive_attains_the_optimum_of_fixed_trees():
    instance = siblings(Spec(fixed=(0, 1)), depth=2)
    assert float(step_law(instance, REFERENCES["naive"]).tau) == pytest.approx(optimum(instance), abs=1e-7)
