"""Which rule decides a call: what was asked for, what fits the drafts; refused before a model runs where it cannot."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from torch import Tensor

import specdec
from specdec import ModelDrafter, NgramDrafter, Speculator, UnsupportedArgumentError
from specdec.drafters import BestFirst, Budget, Drafter, DySpec, Session
from specdec.verify import DraftTree, Topology
from specdec.verify.draft_kind import DraftKind
from specdec.verify.rules import RULES, UnsupportedTreeError, make_rule

TARGET = tiny_llama(0)
DRAFT = noisy_copy(TARGET, 1)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])
SAMPLING: dict[str, Any] = {
    "attention_mask": torch.ones_like(PROMPT),
    "max_new_tokens": 12,
    "do_sample": True,
    "seed": 1,
}


@pytest.mark.parametrize("rule", sorted(RULES))
def test_greedy_output_does_not_depend_on_the_rule(rule: str) -> None:
    settings: dict[str, Any] = {**SAMPLING, "do_sample": False}
    spec = Speculator(TARGET, DRAFT, k=3, rule=rule, lossy=not RULES[rule].lossless)
    ours: Any = spec.generate(PROMPT, **settings)
    settings.pop("seed")
    target: Any = TARGET
    plain = target.generate(PROMPT, **settings)
    assert torch.equal(ours, plain)
    assert spec.report is not None
    assert (spec.report.rule, spec.report.lossless) == ("greedy", True)


class Undeclared(Drafter):
    """Somebody else's drafter: says nothing about its trees, which have siblings."""

    max_depth, max_nodes = 2, 3

    def start(self, session: Session) -> None:
        self.session = session

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        roots = self.session.rows.roots()
        return DraftTree.build(Topology.widths((2,)), torch.stack([roots, roots, (roots + 1) % 8], 1))


DRAFTERS: dict[str, tuple[Any, DraftKind | None, str]] = {
    "none": (lambda: None, None, "naive"),
    "chain": (lambda: ModelDrafter(DRAFT, k=2), DraftKind("chain", "sampled"), "block"),
    "widths of one": (lambda: ModelDrafter(DRAFT, tree=(1, 1)), DraftKind("chain", "sampled"), "block"),
    "argmax chain": (
        lambda: ModelDrafter(DRAFT, k=2, children="top"), DraftKind("chain", "deterministic"), "naive",
    ),
    "mixed": (lambda: ModelDrafter(DRAFT, tree=(2, 1)), DraftKind("tree", "mixed"), "budget_flow"),
    "top": (lambda: ModelDrafter(DRAFT, tree=(2, 1), children="top"), DraftKind("tree", "deterministic"), "naive"),
    "sampled": (
        lambda: ModelDrafter(DRAFT, tree=(2, 1), children="sampled"), DraftKind("tree", "sampled"), "traversal",
    ),
    "best first": (lambda: ModelDrafter(DRAFT, tree=BestFirst(2, 2, 3)), DraftKind("tree", "deterministic"), "naive"),
    "dyspec": (lambda: ModelDrafter(DRAFT, tree=DySpec(2, 4, 2, 0.1)), DraftKind("tree", "sampled"), "traversal"),
    "n-gram": (lambda: NgramDrafter(k=3), DraftKind("chain", "deterministic"), "naive"),
    "n-gram branches": (lambda: NgramDrafter(k=3, branches=2), DraftKind("tree", "deterministic"), "naive"),
    "undeclared": (Undeclared, None, "naive"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DRAFTERS))
def test_what_a_drafter_says_is_what_it_does_and_the_report_names_the_rule(name: str) -> None:
    build, kind, rule = DRAFTERS[name]
    drafter = build()
    spec = Speculator(TARGET, drafter)
    if drafter is not None:
        assert drafter.kind == kind
        propose, kinds = drafter.propose, []

        def watched(budget: Budget, uniforms: Tensor) -> DraftTree:
            tree: DraftTree = propose(budget, uniforms)
            kinds.append(DraftKind.of(tree))
            return tree

        drafter.propose = watched
    spec.generate(PROMPT, **SAMPLING)
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0
    assert (spec.report.rule, spec.report.lossless) == (rule, True)
    if drafter is None or kind is None:
        return
    widest = ("deterministic", "mixed", "sampled")
    assert all(kind.shape == "tree" or seen.shape == "chain" for seen in kinds)
    # A single drawn token after the root is a chain of one, "sampled" like any chain that is drawn.
    assert all(seen.shape == "chain" or widest.index(seen.nodes) <= widest.index(kind.nodes) for seen in kinds)
    assert any(seen.nodes != "deterministic" for seen in kinds) == (kind.nodes != "deterministic")


REFUSED = {
    "block": ("mixed", "top", "sampled", "best first", "dyspec", "n-gram branches"),
    "rejection": ("mixed", "top", "sampled", "best first", "dyspec", "n-gram branches"),
    "budget_flow": ("sampled", "dyspec"),
}


@pytest.mark.parametrize("rule", [name for name in RULES if name != "greedy"])
@pytest.mark.parametrize("name", list(DRAFTERS))
def test_a_rule_refuses_drafters_when_the_speculator_is_built_or_takes_all_they_propose(name: str, rule: str) -> None:
    build, lossy = DRAFTERS[name][0], not RULES[rule].lossless
    if name in REFUSED.get(rule, ()):
        with pytest.raises(UnsupportedArgumentError, match=rf"rule '{rule}' takes .*: use rule=.*proposes \w+ trees"):
            Speculator(TARGET, build(), rule=rule, lossy=lossy)
        return
    spec = Speculator(TARGET, build(), rule=rule, lossy=lossy)
    if name == "undeclared" and rule in ("block", "rejection"):
        with pytest.raises(UnsupportedTreeError, match="chains only"):
            spec.generate(PROMPT, **SAMPLING)
        return
    spec.generate(PROMPT, **SAMPLING)
    assert spec.report is not None
    assert (spec.report.rule, spec.report.num_drafter_faults) == (rule, 0)
    assert spec.report.lossless is not lossy


def test_a_lossy_rule_must_be_agreed_to() -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"'typical' is lossy: it keeps .* law\. Pass lossy=True"):
        Speculator(TARGET, DRAFT, rule="typical")
    with pytest.raises(UnsupportedArgumentError, match="Pass lossy=True"):
        specdec.generate(TARGET, DRAFT, PROMPT, rule="typical")
    with pytest.raises(UnsupportedArgumentError, match="Pass lossy=True"), specdec.patch(TARGET, DRAFT, rule="typical"):
        raise AssertionError("patched")


@pytest.mark.parametrize("rule", ["auto", *(name for name, kind in RULES.items() if kind.lossless)])
def test_there_is_nothing_to_agree_to_where_nothing_is_lossy(rule: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match="nothing is lossy"):
        Speculator(TARGET, DRAFT, rule=rule, lossy=True)


def test_the_report_says_that_a_text_is_lossy() -> None:
    spec = Speculator(TARGET, DRAFT, rule="typical", lossy=True)
    spec.generate(PROMPT, **SAMPLING)
    assert spec.report is not None
    assert "model / typical (LOSSY" in spec.report.summary()
    assert spec.report.to_dict()["lossless"] is False
    exact = Speculator(TARGET, DRAFT)
    exact.generate(PROMPT, **SAMPLING)
    assert exact.report is not None
    assert "LOSSY" not in exact.report.summary()


def test_typical_thresholds_are_checked() -> None:
    kind: Any = type(make_rule("typical"))
    for wrong in ({"epsilon": 1.5}, {"delta": -0.1}):
        with pytest.raises(UnsupportedArgumentError, match="0 <= epsilon <= 1 and delta >= 0"):
            kind(**wrong)


def test_the_page_of_rules_says_what_each_takes() -> None:
    page = (Path(__file__).parents[3] / "docs" / "rules.md").read_text()
    rows = {name: takes for name, takes in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.M)}
    assert rows.keys() == {"auto", *RULES}
    kinds = [DraftKind("chain", "deterministic"), DraftKind("chain", "sampled")]
    kinds += [DraftKind("tree", "deterministic"), DraftKind("tree", "mixed"), DraftKind("tree", "sampled")]
    said: dict[str, Callable[[DraftKind], bool]] = {
        "all": lambda kind: True,
        "all, temperature 0": lambda kind: True,
        "chains": lambda kind: kind.shape == "chain",
        "at most one sampled child per node": lambda kind: kind.shape == "chain" or kind.nodes != "sampled",
    }
    for name in RULES:
        assert [make_rule(name).refusal(kind) is None for kind in kinds] == [said[rows[name]](kind) for kind in kinds]
