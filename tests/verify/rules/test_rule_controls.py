"""Negative controls: the mistakes real engines shipped, each of which the enumeration must see as a wrong law."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from statistics import mean

import pytest
import torch
from oracle.enumerate import distance, step_law
from oracle.instances import Instance, Law, Number, Prefix, Spec, context_free, prefixes
from oracle.production import draft_everything, production_law
from oracle.reference import Coins, Rule, Tree, block_laws, block_residual, norm, one_hot, positive, without
from oracle.tree_reference import REFERENCES, Emitted, flow_shares

from specdec.verify.rules import make_rule
from specdec.verify.tree import DraftTree

SAMPLED, SIBLINGS, MIXED = Spec(draws=1), Spec(draws=2), Spec(fixed=(0,), draws=1)


def dense(spec: Spec, seed: int, count: int = 12, vocab: int = 3, depth: int = 2) -> list[Instance]:
    """Instances whose laws have no zeros, so that a mistake never hides behind a division by zero."""
    rng = random.Random(seed)

    def law(off: tuple[int, ...] = ()) -> Law:
        counts = [0 if y in off else rng.randint(1, 9) for y in range(vocab)]
        return tuple(Fraction(count, sum(counts)) for count in counts)

    made = []
    for _ in range(count):
        every = list(prefixes(vocab, depth))
        q = {s: law(spec.fixed) for s in every}
        made.append(Instance(vocab, depth, {s: law() for s in every}, q, {s: spec for s in every if len(s) < depth}))
    return made


def wrongness(instances: list[Instance], rule: Rule, shown: Callable[[Instance], Instance] = lambda i: i) -> float:
    return mean(float(distance(i, step_law(i, rule, shown(i)).emitted)) for i in instances)


def block_stopping_at_the_first_reject(tree: Tree, coins: Coins) -> tuple[int, Law]:
    nodes, weights, accepts = block_laws(tree)
    kept = 0
    while kept + 1 < len(nodes) and coins.accept(nodes[kept + 1], accepts[kept]):
        kept += 1
    return nodes[kept], block_residual(tree, nodes, weights, kept)


def recursive_rejection_unnormalised(tree: Tree, coins: Coins) -> tuple[int, Law]:
    node = 0
    while True:
        r, q = tree.p(node), tree.q(node)
        for child in tree.children(node):
            if coins.accept(child, min(1, r[tree.token(child)] / q[tree.token(child)])):
                node = child
                break
            r = norm(positive([a - b for a, b in zip(r, q, strict=True)]))
            q = without(q, tree.token(child))  # not divided by what is left
        else:
            return node, r


def traversal_unnormalised(tree: Tree, coins: Coins) -> tuple[int, Law]:
    found = _traverse_unnormalised(tree, coins, 0, Fraction(1))
    assert found is not None
    return found


def _traverse_unnormalised(tree: Tree, coins: Coins, node: int, w: Number) -> Emitted:
    p, q = tree.p(node), tree.q(node)
    for child in tree.children(node):
        token = tree.token(child)
        found = _traverse_unnormalised(tree, coins, child, min(1, w * p[token] / q[token]))
        if found is not None:
            return found
        residual = positive([w * a - b for a, b in zip(p, q, strict=True)])
        surplus = sum(residual)
        w = surplus / (surplus + 1 - w) if surplus else 0 * surplus
        p, q = norm(residual), without(q, token)
    return (node, p) if coins.accept(node, w) else None


def budget_flow_realised(tree: Tree, coins: Coins) -> tuple[int, Law]:
    found, _ = _flow_realised(tree, coins, 0, Fraction(1))
    assert found is not None
    return found


def _chance(tree: Tree, node: int, w: Number) -> Number:
    """The probability that something at or below `node` is kept, given the whole drawn subtree."""
    shares, flow = flow_shares(tree, node, w)
    none: Number = Fraction(1)
    remaining: Number = Fraction(1)
    for child, share in shares:
        chance = _chance(tree, child, min(1, share / remaining) if share else share)
        none, remaining = none * (1 - chance), remaining * (1 - chance)
        if not remaining:
            return Fraction(1)
    total = sum(flow)
    return 1 - none * (1 - ((w - total) / (1 - total) if w > total else 0))


def _flow_realised(tree: Tree, coins: Coins, node: int, w: Number) -> tuple[Emitted, Number]:
    shares, flow = flow_shares(tree, node, w)
    remaining: Number = Fraction(1)
    for child, share in shares:
        budget = min(1, share / remaining) if share and remaining else 0 * w
        found, _ = _flow_realised(tree, coins, child, budget)
        if found is not None:
            return found, remaining
        remaining *= 1 - _chance(tree, child, budget)  # what this subtree really left, not 1 - share
    total = sum(flow)
    if node == 0 or coins.accept(node, (w - total) / (1 - total) if w > total else 0 * w):
        return (node, positive([w * mass - a for mass, a in zip(tree.p(node), flow, strict=True)])), remaining
    return None, remaining


def draft_noise_ignored(tree: Tree, coins: Coins) -> tuple[int, Law]:
    """Treats drawn tokens as deterministic ones: q forgotten at the residual only."""
    node = 0
    while children := tree.children(node):
        p, q = tree.p(node), tree.q(node)
        token = tree.token(children[0])
        if not coins.accept(children[0], min(1, p[token] / q[token])):
            return node, positive([a - b for a, b in zip(p, one_hot(token, p), strict=True)])
        node = children[0]
    return node, tree.p(node)


MUTANTS: list[tuple[Rule, str, Spec]] = [
    (block_stopping_at_the_first_reject, "block", SAMPLED),
    (draft_noise_ignored, "rejection", SAMPLED),
    (recursive_rejection_unnormalised, "recursive_rejection", SIBLINGS),
    (traversal_unnormalised, "traversal", SIBLINGS),
    (budget_flow_realised, "budget_flow", MIXED),
]


@pytest.mark.parametrize(("mutant", "rule", "spec"), MUTANTS)
def test_a_wrong_formula_gives_a_wrong_law(mutant: Rule, rule: str, spec: Spec):
    instances = dense(spec, seed=1, count=12 if spec != SIBLINGS else 2)
    assert wrongness(instances, REFERENCES[rule]) == 0
    assert wrongness(instances, mutant) > 0.004


def top_two(q: Law) -> Law:
    least = min(range(len(q)), key=q.__getitem__)
    return norm(without(q, least))


def parents_row(instance: Instance) -> Instance:
    """Every q row is the one of the position before."""
    return replace(instance, q={s: instance.q[s[:-1]] for s in instance.q})


CHAIN_RULES = ["rejection", "block"]
SIBLING_RULES = ["recursive_rejection", "traversal"]


@pytest.mark.parametrize(
    ("rule", "spec"),
    [(r, SAMPLED) for r in CHAIN_RULES] + [(r, SIBLINGS) for r in SIBLING_RULES] + [("budget_flow", MIXED)],
)
def test_a_q_of_another_position_gives_a_wrong_law(rule: str, spec: Spec):
    assert wrongness(dense(spec, seed=2, count=12 if spec != SIBLINGS else 2), REFERENCES[rule], parents_row) > 0.01


@pytest.mark.parametrize("rule", [*CHAIN_RULES, "traversal", "budget_flow"])
def test_raw_q_instead_of_the_sampled_one_gives_a_wrong_law(rule: str):
    raw = dense(SAMPLED, seed=3)
    filtered = [replace(i, q={s: top_two(q) for s, q in i.q.items()}) for i in raw]
    assert wrongness(filtered, REFERENCES[rule]) == 0
    told = dict(zip(map(id, filtered), raw, strict=True))
    assert wrongness(filtered, REFERENCES[rule], lambda i: told[id(i)]) > 0.01


class DropsUnlikely(Instance):
    """Draws a token, then does not propose it if q says it is unlikely: a decision that depends on the draw."""

    def proposals(self, prefix: Prefix) -> list[tuple[list[tuple[int, bool]], Number]]:
        kept = super().proposals(prefix)
        q = self.q[prefix]
        return [([c for c in children if 4 * q[c[0]] >= 1], weight) for children, weight in kept]


class KeepsBestOfTwo(Instance):
    """Draws two tokens and proposes the likelier: siblings reranked after sampling."""

    def proposals(self, prefix: Prefix) -> list[tuple[list[tuple[int, bool]], Number]]:
        q = self.q[prefix]
        if prefix not in self.specs:
            return [([], 1)]
        pairs = [((a, b), q[a] * q[b]) for a in range(self.vocab) for b in range(self.vocab)]
        return [([(max(pair, key=q.__getitem__), True)], weight) for pair, weight in pairs]


class WithdrawsFixed(Instance):
    """Proposes token 0 and one drawn token, and withdraws token 0 where the drawn one is token 1."""

    def proposals(self, prefix: Prefix) -> list[tuple[list[tuple[int, bool]], Number]]:
        return [
            ([(token, sampled) for token, sampled in children if sampled or (1, True) not in children], weight)
            for children, weight in super().proposals(prefix)
        ]


def test_a_fixed_token_withdrawn_for_what_was_drawn_after_it_biases_the_text() -> None:
    """The example of algorithms B.5."""
    half, p = Fraction(1, 2), (Fraction(5, 10), Fraction(4, 10), Fraction(1, 10))
    honest = context_free(p, (0 * half, half, half), MIXED, 1)
    drafter = WithdrawsFixed(honest.vocab, honest.depth, honest.p, honest.q, honest.specs)
    laws = [step_law(instance, REFERENCES["traversal"]).emitted for instance in (honest, drafter)]
    assert [sum(m for text, m in law.items() if text[0] == 0) for law in laws] == [half, Fraction(35, 100)]


@pytest.mark.parametrize("rule", [*CHAIN_RULES, "budget_flow"])
@pytest.mark.parametrize(("drafter", "least", "most"), [(DropsUnlikely, 0.02, 0.2), (KeepsBestOfTwo, 0.05, 0.25)])
def test_a_drafter_that_anticipates_biases_every_rule(rule: str, drafter: type[Instance], least: float, most: float):
    # Over random laws the mean distance is about .095 for dropping and .15 for reranking.
    honest = dense(SAMPLED, seed=4)
    assert wrongness(honest, REFERENCES[rule]) == 0
    biased = [drafter(i.vocab, i.depth, i.p, i.q, i.specs) for i in honest]
    assert least < wrongness(biased, REFERENCES[rule]) < most


class RanksByValue(Instance):
    """Draws siblings without replacement and proposes them with the likeliest first."""

    def proposals(self, prefix: Prefix) -> list[tuple[list[tuple[int, bool]], Number]]:
        q = self.q[prefix]
        drawn = super().proposals(prefix)
        return [(sorted(children, key=lambda child: q[child[0]], reverse=True), weight) for children, weight in drawn]


@pytest.mark.parametrize("rule", SIBLING_RULES)
def test_sampled_siblings_that_are_reranked_bias_every_rule(rule: str):
    honest = dense(SIBLINGS, seed=6, count=2)
    assert wrongness(honest, REFERENCES[rule]) == 0
    assert wrongness([RanksByValue(i.vocab, i.depth, i.p, i.q, i.specs) for i in honest], REFERENCES[rule]) > 0.02


def another_row(tree: DraftTree) -> DraftTree:
    """q rows of another request of the batch."""
    assert tree.q is not None
    return replace(tree, q=tree.q.roll(tree.q.shape[0] // 2, 0))


def previous_node(tree: DraftTree) -> DraftTree:
    """q rows of the node before the parent."""
    assert tree.q_row is not None
    return replace(tree, q_row=(tree.q_row - 1).clamp(min=0))


def never_sampled(tree: DraftTree) -> DraftTree:
    """Drawn tokens passed off as deterministic."""
    return replace(tree, sampled=torch.zeros_like(tree.sampled))


@pytest.mark.parametrize("mistake", [another_row, previous_node, never_sampled])
@pytest.mark.parametrize(
    ("rule", "spec"),
    [(r, SAMPLED) for r in CHAIN_RULES] + [(r, SIBLINGS) for r in SIBLING_RULES] + [("budget_flow", MIXED)],
)
def test_production_rules_fail_when_their_q_is_wrong(rule: str, spec: Spec, mistake: Callable[[DraftTree], DraftTree]):
    instances = dense(spec, seed=5, count=2)
    verify = make_rule(rule)
    every = draft_everything(instances, vocab=3)
    good = production_law(every, REFERENCES[rule], verify)
    bad = production_law(every, REFERENCES[rule], lambda tree, p, noise: verify(mistake(tree), p, noise))
    assert good.wrong == 0
    assert bad.wrong > 0
    assert mean(float(distance(i, law)) for i, law in zip(instances, bad.laws, strict=True)) > 0.004
