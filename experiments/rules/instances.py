"""Every rule on the same random problems, small enough to enumerate all drafts and to know the optimum.

Needs the repository: problems, enumeration and linear program live with the tests, in `tests/oracle`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from specdec.shown_errors import ExperimentError
from specdec.verify.rules import make_rule

TESTS = Path(__file__).resolve().parents[2] / "tests"
SIZES = ((3, 2, 2), (4, 2, 2))
"""Vocabulary, children per node, depth."""
TAKES = {
    "chain": ("rejection", "block", "naive"),
    "fixed": ("naive",),
    "sampled": ("naive", "recursive_rejection", "traversal"),
    "mixed": ("naive", "recursive_rejection", "traversal", "budget_flow"),
    "race chain": ("coupled",),
    "race tree": ("coupled",),
}
"""Draft laws: a sampled chain; the best tokens; tokens drawn without replacement; the best but one, and one drawn off
them; and for rule coupled the first to arrive in the race, for which no optimum is worked out."""


def table(
    num: int = 60, seed: int = 0, sizes: tuple[tuple[int, int, int], ...] = SIZES, races: int = 4000,
    advance: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Mean E[accepted tokens] over `num` instances per size, draft law and rule, and the optimum of each draft law.

    Laws are independent Dirichlet(1) rows after every prefix, the same for all draft laws. Values are exact but for
    rule coupled, whose race is sampled `races` times per instance.

    Raises:
        ExperimentError: the repository's tests are not there.
    """
    if not (TESTS / "oracle").is_dir():
        raise ExperimentError("rules on enumerable instances: needs a checkout of the repository (tests/oracle)")
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from oracle.lp import optimum
    from oracle.problems import dirichlet_instance, race_accepted
    from oracle.production import draft_everything

    found = []
    for vocab, width, depth in sizes:
        for draft, rules in TAKES.items():
            advance(f"vocabulary {vocab}, {width} children, depth {depth}: {draft}")
            rng = np.random.default_rng(seed)
            instances = [dirichlet_instance(rng, draft, vocab, width, depth) for _ in range(num)]
            children = 1 if "chain" in draft else width
            size = {"vocab": vocab, "children": children, "depth": depth, "draft": draft}
            if draft.startswith("race"):
                tau = [race_accepted(instance, children, races, at) for at, instance in enumerate(instances)]
                found.append({**size, "rule": "coupled", **_figures(tau)})
                continue
            every = draft_everything(instances, vocab)
            weights = np.array([weight for _, weight, _ in every.trees])
            owner = np.array([at for _, _, at in every.trees])
            best = [optimum(instance) for instance in instances]
            for rule in rules:
                expected = make_rule(rule).expected_accepted(every.rows.tree, every.rows.p)
                assert expected is not None
                tau = np.bincount(owner, weights * expected.mean.numpy(), minlength=num).tolist()
                found.append({**size, "rule": rule, **_figures(tau, best)})
    return found


def _figures(tau: list[float], best: list[float] | None = None) -> dict[str, Any]:
    """Means over instances; the worst share of its own optimum that any instance reached."""
    found: dict[str, Any] = {"num": len(tau), "accepted": float(np.mean(tau)), "spread": float(np.std(tau))}
    if best is None:
        return {**found, "optimum": None, "worst_share": None}
    shares = [mine / most for mine, most in zip(tau, best, strict=True)]
    return {**found, "optimum": float(np.mean(best)), "worst_share": float(min(shares))}
