"""The random problems every rule is enumerated on hold every hard case: zeros, p = q, disjoint supports, duplicates,
ties, ends inside the tree, draws that run out, every size."""

from __future__ import annotations

from collections import Counter

import pytest
from oracle.cases import NUM_INSTANCES, instances
from oracle.instances import CHAINS, TREES, Instance, Prefix

SAMPLED = {"sampled", "mixed", "independent", "without_replacement", "one_sampled"}


def features(instance: Instance) -> set[str]:
    found = {f"V{instance.vocab}", f"L{instance.depth}"}
    widest = 0
    for prefix, spec in instance.specs.items():
        width = spec.draws + len(spec.fixed)
        widest = max(widest, width)
        if width:
            found |= at(instance, prefix)
    return found | {f"K{widest}", f"K{widest} L{instance.depth}"}


def at(instance: Instance, prefix: Prefix) -> set[str]:
    p, q, spec = instance.p[prefix], instance.q[prefix], instance.specs[prefix]
    support = sum(mass > 0 for mass in q)
    drawn = spec.draws > 0
    tests = {
        "zero in p": 0 in p,
        "zero in q": drawn and 0 in q,
        "p = q": drawn and p == q,
        "disjoint": drawn and all(min(pair) == 0 for pair in zip(p, q, strict=True)),
        "tie in p": len({mass for mass in p if mass}) < sum(mass > 0 for mass in p),
        "tie of p and q": drawn and p != q and any(a == b > 0 for a, b in zip(p, q, strict=True)),
        "end inside": any(p[token] == 1 for token in prefix),
        "equal fixed siblings": len(set(spec.fixed)) < len(spec.fixed),
        "equal drawn siblings": instance.replacement and spec.draws > 1,
        "draw repeats a fixed sibling": drawn and any(q[token] > 0 for token in spec.fixed),
        "draws run out": not instance.replacement and spec.draws > support,
        "ragged": spec.draws + len(spec.fixed) == 0,
    }
    return {name for name, true in tests.items() if true}


EVERYWHERE = ("V2", "V3", "V4", "L1", "L2", "L3", "zero in p", "tie in p", "end inside")
OF_DRAWS = ("zero in q", "p = q", "disjoint", "tie of p and q")
OWN = {
    "fixed": ("equal fixed siblings",),
    "independent": ("equal drawn siblings",),
    "without_replacement": ("draws run out",),
    "one_sampled": ("draw repeats a fixed sibling",),
}


@pytest.mark.parametrize("kind", CHAINS + TREES)
def test_every_hard_case_occurs_often(kind: str) -> None:
    every = instances(kind)
    assert len(every) == NUM_INSTANCES >= 300
    seen = Counter(feature for instance in every for feature in features(instance))
    wanted = EVERYWHERE + (OF_DRAWS if kind in SAMPLED else ()) + OWN.get(kind, ())
    rare = {feature: seen[feature] for feature in wanted if seen[feature] < 20}
    assert not rare
    if kind in TREES:
        assert all(seen[size] >= 5 for size in ("K1", "K2", "K3", "K2 L3", "K3 L2", "K3 L3")), seen
    else:
        assert seen["K1 L3"] >= 20
