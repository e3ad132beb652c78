"""Enumeration of everything random in one step: the draft tree and the coins, with exact weights (A.0)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from oracle.instances import Instance, Law, Number, Prefix
from oracle.reference import Rule, Tree

Result = TypeVar("Result")


class Chooser:
    """Makes choices by script, then takes the first option of each further one and remembers the others."""

    def __init__(self, script: tuple[int, ...], floor: float):
        self.taken: list[int] = list(script)
        self.widths: list[int] = []
        self.weight: Number = 1
        self.floor = floor

    def __call__(self, weights: Sequence[Number]) -> int:
        """The index of an option whose weight is positive (above `floor` in float arithmetic)."""
        options = [index for index, weight in enumerate(weights) if weight > self.floor]
        at = len(self.widths)
        if at == len(self.taken):
            self.taken.append(0)
        self.widths.append(len(options))
        pick = options[self.taken[at]]
        self.weight = self.weight * weights[pick]
        return pick


class RandomChooser(Chooser):
    """Draws its choices instead of enumerating them."""

    def __init__(self, rng: random.Random):
        super().__init__((), 0.0)
        self.rng = rng

    def __call__(self, weights: Sequence[Number]) -> int:
        return self.rng.choices(range(len(weights)), [float(weight) for weight in weights])[0]


def branches(run: Callable[[Chooser], Result], floor: float = 0.0) -> Iterator[tuple[Result, Number]]:
    """Every outcome of a program that draws its randomness from a Chooser, with its probability."""
    scripts: list[tuple[int, ...]] = [()]
    while scripts:
        script = scripts.pop()
        chooser = Chooser(script, floor)
        result = run(chooser)
        for at in range(len(script), len(chooser.widths)):
            scripts += [(*chooser.taken[:at], other) for other in range(1, chooser.widths[at])]
        yield result, chooser.weight


class BranchingCoins:
    """Coins whose every outcome is enumerated; `boxes` are the intervals `(node, low, high)` chosen so far."""

    def __init__(self, chooser: Chooser):
        self.chooser = chooser
        self.boxes: list[tuple[int, Number, Number]] = []

    def choose(self, node: int, masses: Sequence[Number]) -> int | None:
        assert all(node != used for used, _, _ in self.boxes), f"the coin of node {node} is used twice"
        assert all(mass >= 0 for mass in masses), f"the reference asks for a negative probability: {masses}"
        rest = 1 - sum(masses)
        assert rest >= -1e-12, f"the reference asks for more than probability 1: {masses}"
        pick = self.chooser([*masses, rest])
        low = sum(masses[:pick])
        high = 1 if pick == len(masses) else low + masses[pick]
        self.boxes.append((node, low, high))
        return None if pick == len(masses) else pick

    def accept(self, node: int, probability: Number) -> bool:
        return self.choose(node, [probability]) == 0


class Draw:
    """Reveals a node's children by choosing among the drafter's proposals."""

    def __init__(self, instance: Instance, chooser: Chooser):
        self.instance, self.chooser = instance, chooser

    def __call__(self, prefix: Prefix) -> list[tuple[int, bool]]:
        proposals = self.instance.proposals(prefix)
        return proposals[self.chooser([weight for _, weight in proposals])][0]


class StepLaw(NamedTuple):
    """emitted: probability that a step emits exactly these tokens; tau: E[accepted draft tokens]."""

    emitted: dict[Prefix, Number]
    tau: Number


def step_law(instance: Instance, rule: Rule, shown: Instance | None = None) -> StepLaw:
    """The whole law of one step of a scalar rule, in the instance's arithmetic.

    Children are revealed only when the rule asks for them, which leaves the law unchanged (what is never looked at
    integrates to one) and the enumeration small. `shown` is what the rule is told when that is not the truth.
    """

    def run(chooser: Chooser) -> tuple[Prefix, Law]:
        tree = Tree(shown or instance, Draw(instance, chooser))
        node, residual = rule(tree, BranchingCoins(chooser))
        return tree.prefixes[node], residual

    emitted: dict[Prefix, Number] = {}
    tau: Number = 0
    for (prefix, residual), weight in branches(run):
        tau += weight * len(prefix)
        total = sum(residual)
        for token, mass in enumerate(residual):
            if mass:
                key = (*prefix, token)
                emitted[key] = emitted.get(key, 0) + weight * mass / total
    return StepLaw(emitted, tau)


def full_trees(instance: Instance) -> Iterator[tuple[Tree, Number]]:
    """Every draft tree, nodes in level order, with its probability."""
    return branches(lambda chooser: Tree(instance, Draw(instance, chooser)).complete())


def completed(instance: Instance, emitted: Mapping[Prefix, Number]) -> dict[Prefix, tuple[Number, Number]]:
    """For every sequence of `depth + 1` tokens: its probability when the step's output is continued by the target,
    and its probability under the target (the two sides of (VALID))."""
    law: dict[Prefix, tuple[Number, Number]] = {(): (0, 1)}
    for _ in range(instance.depth + 1):
        longer: dict[Prefix, tuple[Number, Number]] = {}
        for prefix, (have, want) in law.items():
            for y, mass in enumerate(instance.p[prefix]):
                longer[*prefix, y] = (have * mass + emitted.get((*prefix, y), 0), want * mass)
        law = longer
    return law


def distance(instance: Instance, emitted: Mapping[Prefix, Number]) -> Number:
    """Total variation distance between the step's law and the target's, over `depth + 1` tokens."""
    total: Number = 0
    for have, want in completed(instance, emitted).values():
        total += max(have - want, want - have) / 2
    return total
