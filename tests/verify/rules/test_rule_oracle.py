"""Every rule against the oracle: its step law is the target's, and it decides as the scalar reference does."""

from __future__ import annotations

import random
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from oracle.cases import CASES, COIN_CASES, TAKES, VOCAB, drafted, instances, random_trees
from oracle.enumerate import distance, step_law
from oracle.instances import Instance
from oracle.production import GivenCoins, batch, invert, production_law
from oracle.tree_reference import REFERENCES, coupled

from specdec.verify.noise import Noise
from specdec.verify.rules import RULES, make_rule


def target_of(rule: str, instance: Instance) -> Instance:
    """The instance whose target is what the rule must emit: greedy's is the argmax of p."""
    if rule != "greedy":
        return instance
    one_hot = {s: tuple(Fraction(int(y == p.index(max(p)))) for y in range(len(p))) for s, p in instance.p.items()}
    return replace(instance, p=one_hot)


def test_every_rule_has_a_reference_and_cases():
    assert set(TAKES) == set(RULES)
    assert set(REFERENCES) == set(RULES) - {"coupled"}
    assert {rule for rule, _ in COIN_CASES} == {name for name, rule in RULES.items() if rule.lossless} - {"coupled"}


@pytest.mark.parametrize(("rule", "kind"), COIN_CASES)
def test_reference_law_is_exactly_the_target(rule: str, kind: str):
    for number, instance in enumerate(instances(kind)):
        emitted = step_law(instance, REFERENCES[rule]).emitted
        assert distance(target_of(rule, instance), emitted) == 0, f"instance {number}: {instance}"


@pytest.mark.parametrize(("rule", "kind"), COIN_CASES)
def test_production_law_is_the_target(rule: str, kind: str):
    problems = instances(kind)
    found = production_law(drafted(kind), REFERENCES[rule], make_rule(rule))
    assert found.num_probes >= 2 * len(problems)
    for instance, law in zip(problems, found.laws, strict=True):
        assert distance(target_of(rule, instance).as_float(), law) <= 1e-12
    assert found.wrong == 0


@pytest.mark.parametrize(("rule", "kind"), [case for case in CASES if case[0] in REFERENCES])
def test_production_decides_as_the_reference_on_the_same_uniforms(rule: str, kind: str):
    rng = random.Random(f"uniforms {rule} {kind}")
    trees = random_trees(kind, seed=1, repeat=2)
    coins = [[rng.random() for _ in tree.prefixes] for tree in trees]
    residuals = [rng.random() for _ in trees]
    wanted = []
    for tree, uniforms, u in zip(trees, coins, residuals, strict=True):
        node, residual = REFERENCES[rule](tree, GivenCoins(uniforms))
        wanted.append((node, invert(residual, u)))
    rows = batch(trees, VOCAB, extra=2)
    accept = torch.zeros(rows.tree.tokens.shape, dtype=torch.float64)  # coins of padding would accept anything
    for row, uniforms in enumerate(coins):
        accept[row, : len(uniforms)] = torch.tensor(uniforms, dtype=torch.float64)
    verdict = make_rule(rule)(rows.tree, rows.p, Noise(accept, torch.tensor(residuals, dtype=torch.float64)))
    nodes = verdict.path.gather(1, verdict.num_accepted[:, None])[:, 0].tolist()
    assert list(zip(nodes, verdict.next_token.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("kind", TAKES["coupled"])
def test_coupled_decides_as_the_reference_on_the_same_race(kind: str):
    rng = random.Random(f"race {kind}")
    trees = random_trees(kind, seed=1, repeat=2)
    rows = batch(trees, VOCAB, extra=2)
    depths = rows.tree.tokens.shape[1]
    race = [[[rng.expovariate(1.0) for _ in range(VOCAB)] for _ in range(depths)] for _ in trees]
    wanted = [coupled(tree, [e[: tree.instance.vocab] for e in noise]) for tree, noise in zip(trees, race, strict=True)]
    nothing = torch.full(rows.tree.tokens.shape, torch.nan, dtype=torch.float64)  # no coin may be looked at
    noise = Noise(nothing, nothing[:, 0], torch.tensor(race, dtype=torch.float64))
    verdict = make_rule("coupled")(rows.tree, rows.p, noise)
    nodes = verdict.path.gather(1, verdict.num_accepted[:, None])[:, 0].tolist()
    assert list(zip(nodes, verdict.next_token.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("kind", TAKES["typical"])
def test_typical_acceptance_follows_its_own_law_and_not_the_target(kind: str):
    """Lossy as it says: the step law is the scalar reference's, and the judgement of exact rules refuses it."""
    problems = instances(kind)
    found = production_law(drafted(kind), REFERENCES["typical"], make_rule("typical"))
    assert found.wrong == 0
    off = []
    for instance, law in zip(problems, found.laws, strict=True):
        wanted = step_law(instance, REFERENCES["typical"]).emitted
        assert set(law) <= set(wanted)
        assert max(abs(law.get(tokens, 0.0) - float(mass)) for tokens, mass in wanted.items()) <= 1e-12
        off.append(float(distance(instance.as_float(), law)))
    assert sum(off) / len(off) > 0.05
