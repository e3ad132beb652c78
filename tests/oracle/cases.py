"""Which draft laws each rule is tested on, and the instances all its tests share."""

from __future__ import annotations

import random
from functools import cache

from oracle.enumerate import Draw, RandomChooser
from oracle.instances import CHAINS, TREES, Instance, random_instance
from oracle.production import Drafted, draft_everything
from oracle.reference import Tree

NUM_INSTANCES = 300
VOCAB = 4
"""Smaller vocabularies are padded to this one with tokens of probability zero."""

TAKES: dict[str, tuple[str, ...]] = {
    "greedy": CHAINS + TREES,
    "naive": CHAINS + TREES,
    "rejection": CHAINS,
    "block": CHAINS,
    "recursive_rejection": CHAINS + TREES,
    "traversal": CHAINS + TREES,
    "budget_flow": (*CHAINS, "fixed", "one_sampled"),
    "coupled": CHAINS + TREES,
    "typical": CHAINS + TREES,
}
"""Draft laws by rule: everything a rule's `check` lets through."""

CASES = [(rule, kind) for rule, kinds in TAKES.items() for kind in kinds]
COIN_CASES = [(rule, kind) for rule, kind in CASES if rule not in ("coupled", "typical")]
"""Rules that follow the target's law by coins of their own, over which they can be integrated."""


@cache
def instances(kind: str) -> list[Instance]:
    rng = random.Random(f"oracle {kind}")
    small = 64 if kind in CHAINS else 24
    sizes = [200 if number % 30 == 0 else small for number in range(NUM_INSTANCES)]  # a few large ones, for time's sake
    return [random_instance(rng, kind, max_trees=size) for size in sizes]


@cache
def drafted(kind: str) -> Drafted:
    return draft_everything(instances(kind), VOCAB)


@cache
def random_trees(kind: str, seed: int, repeat: int = 1) -> list[Tree]:
    """One random full tree per instance: ragged shapes and vocabularies side by side."""
    rng = random.Random(seed)
    return [Tree(instance, Draw(instance, RandomChooser(rng))).complete() for instance in instances(kind) * repeat]
