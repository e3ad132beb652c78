"""The table of rules: known orderings hold on enumerable problems, and what is timed is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle.instances import Spec, context_free
from oracle.problems import race_accepted
from test_bench import make_pair

from specdec.experiments.accept.setting import Setting
from specdec.experiments.pair import Models
from specdec.experiments.rules import instances, overhead, pair
from specdec.experiments.rules.__main__ import main
from specdec.verify.draft_kind import DraftKind
from specdec.verify.rules import RULES, make_rule


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], dict[str, float]]:
    entries = instances.table(num=12, sizes=((3, 2, 2),), races=4000)
    return {(entry["draft"], entry["rule"]): entry for entry in entries}


def test_orderings_on_enumerable_instances(found: dict[tuple[str, str], dict[str, float]]) -> None:
    tau = {key: entry["accepted"] for key, entry in found.items()}
    for key, entry in found.items():
        assert entry["optimum"] is None or tau[key] <= entry["optimum"] + 1e-7
    assert tau["chain", "block"] == pytest.approx(found["chain", "block"]["optimum"], abs=1e-6)
    assert tau["fixed", "naive"] == pytest.approx(found["fixed", "naive"]["optimum"], abs=1e-6)
    assert tau["chain", "block"] > tau["chain", "rejection"] > tau["chain", "naive"]
    assert tau["mixed", "budget_flow"] > tau["mixed", "traversal"] > tau["mixed", "naive"]
    assert tau["sampled", "traversal"] > tau["sampled", "recursive_rejection"] > tau["sampled", "naive"]
    assert tau["race chain", "coupled"] < tau["chain", "rejection"]
    assert tau["race tree", "coupled"] > tau["race chain", "coupled"] + 0.1


def test_the_race_accepts_what_the_formula_says() -> None:
    p, q = np.array([0.1, 0.5, 0.4]), np.array([0.5, 0.4, 0.1])
    exact = sum(1 / sum(max(p[y] / p[x], q[y] / q[x]) for y in range(3)) for x in range(3))
    instance = context_free(tuple(p), tuple(q), Spec(draws=1), 1)
    assert race_accepted(instance, 1, 200_000, seed=0) == pytest.approx(exact, abs=5 * 0.5 / 200_000**0.5)
    assert race_accepted(instance, 3, 1000, seed=0) == 1.0


@pytest.mark.parametrize("kind", overhead.DRAFTS)
def test_timed_drafts_are_what_they_are_called(kind: str) -> None:
    tree, p = overhead.make_draft(kind, 500, torch.Generator().manual_seed(0))
    assert p.shape == (1, 64, 500)
    tree.validate(500, tree.tokens[:, 0])
    found = DraftKind.of(tree)
    assert str(found) == {"chain": "sampled chains", "fixed": "deterministic trees", "mixed": "mixed trees",
                          "sampled": "sampled trees"}[kind]  # fmt: skip
    assert all(make_rule(rule).refusal(found) is None for rule in overhead.DRAFTS[kind])


def test_every_rule_is_timed(tmp_path: Path) -> None:
    assert main(["--overhead", "--vocab", "300", "--repeats", "3", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("rules-overhead-*.json")
    written = json.loads(path.read_text())
    assert {entry["rule"] for entry in written["overhead"]} == set(RULES)
    assert all(entry["ms"] > 0 and entry["cpu_ms"] > 0 for entry in written["overhead"])
    assert written["provenance"]["threads"] == 1


def test_rules_on_a_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured and expected tokens per step agree for a chain and a tree on a pair of random models."""
    models = Models.load(make_pair(tmp_path), "float64")
    few = [("model:k=3", "rejection"), ("model:tree=2,2:children=mixed", "budget_flow"), ("model:k=3", "coupled")]
    monkeypatch.setattr(pair, "rivals", lambda: [(Setting.parse(setting), rule) for setting, rule in few])
    entries = pair.table(models, 1.0, pair.Size(prompts=40, prompt_tokens=12, tokens=16, timed=1))
    for entry in entries:
        assert abs(entry["z"]) < 4.5, entry
        assert entry["measured"]["value"] > 1.2
        assert entry["vs_plain"] > 0
    assert entries[1]["nodes"] == 6
