"""Negative controls of shared randomness, enumerated exactly: noise that is used twice biases the output."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import pytest
from oracle.enumerate import BranchingCoins, Chooser, Draw, branches, distance
from oracle.instances import Instance, Law, Number, Prefix, Spec, prefixes
from oracle.production import invert
from oracle.reference import Rule, Tree, block, norm, positive, rejection
from oracle.tree_reference import traversal

P = (Fraction(1, 10), Fraction(1, 2), Fraction(2, 5))
Q = (Fraction(1, 2), Fraction(2, 5), Fraction(1, 10))


def emitted_law(p: Law, q: Law, shared: bool) -> list[Number]:
    """One draft token, drawn by inverting a uniform; the recovered token inverts the same one, or a fresh one."""
    recovered = norm(positive([a - b for a, b in zip(p, q, strict=True)]))
    edges = sorted({Fraction(0), *accumulate(q), *accumulate(recovered)})
    law: list[Number] = [Fraction(0)] * len(p)
    for low, high in pairwise(edges):
        middle = (low + high) / 2
        token = invert(q, middle)  # type: ignore[arg-type]
        accept = min(Fraction(1), p[token] / q[token])
        law[token] += (high - low) * accept
        for other, mass in enumerate(recovered):
            again = Fraction(other == invert(recovered, middle)) if shared else mass  # type: ignore[arg-type]
            law[other] += (high - low) * (1 - accept) * again
    return law


def test_recovery_that_reuses_the_draft_noise_gives_a_wrong_law() -> None:
    assert emitted_law(P, Q, shared=False) == list(P)
    wrong = emitted_law(P, Q, shared=True)
    assert sum(wrong) == 1
    assert sum(positive([a - b for a, b in zip(wrong, P, strict=True)])) > Fraction(1, 20)


class CoinsByPosition(BranchingCoins):
    """One coin per absolute position of the text: what a later step learns of it is what an earlier one left open.

    left: per position, the interval its coin is known to lie in.
    """

    def __init__(self, chooser: Chooser, left: dict[int, tuple[Number, Number]], start: int, tree: Tree):
        super().__init__(chooser)
        self.left, self.start, self.tree = left, start, tree

    def choose(self, node: int, masses: Sequence[Number]) -> int | None:
        (bound,) = masses
        position = self.start + len(self.tree.prefixes[node])
        low, high = self.left.get(position, (Fraction(0), Fraction(1)))
        inside = min(max((bound - low) / (high - low), Fraction(0)), Fraction(1))
        accepted = self.chooser([inside, 1 - inside]) == 0
        self.left[position] = (low, min(high, bound)) if accepted else (max(low, bound), high)
        return 0 if accepted else None


def two_steps(instance: Instance, rule: Rule, shared: bool) -> dict[Prefix, Number]:
    """The law of what two steps emit, drafts of both from the root of `instance` (whose laws know no context)."""

    def run(chooser: Chooser) -> Prefix:
        left: dict[int, tuple[Number, Number]] = {}
        text: Prefix = ()
        for _ in range(2):
            tree = Tree(instance, Draw(instance, chooser))
            coins = CoinsByPosition(chooser, left if shared else {}, len(text), tree)
            node, residual = rule(tree, coins)
            text = (*text, *tree.prefixes[node], chooser(norm(residual)))
        return text

    law: dict[Prefix, Number] = {}
    for text, weight in branches(run):
        law[text] = law.get(text, 0) + weight
    return law


@pytest.mark.parametrize(("rule", "biased"), [(block, True), (traversal, True), (rejection, False)])
def test_coins_keyed_by_absolute_position_bias_rules_that_look_ahead(rule: Rule, biased: bool) -> None:
    """Block verification turns coins down beyond the token it then emits; token-wise rejection never looks there."""
    p = (Fraction(1, 5), Fraction(1, 5), Fraction(3, 5))
    q = (Fraction(2, 5), Fraction(1, 2), Fraction(1, 10))
    every = list(prefixes(3, 5))
    drafted = {prefix: Spec(draws=1) for prefix in every if len(prefix) < 2}
    instance = Instance(3, 5, dict.fromkeys(every, p), dict.fromkeys(every, q), drafted)
    assert distance(instance, two_steps(instance, rule, shared=False)) == 0
    wrong = distance(instance, two_steps(instance, rule, shared=True))
    assert wrong > Fraction(1, 20) if biased else wrong == 0
