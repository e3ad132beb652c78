"""Sampled trees of every shape follow the target's law through the real generate(); their planted bugs do not."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_law import joint_law, noisy_copy, tiny_llama
from law_checks import NEW, check_joint_law, check_second_step, counts_of, must_be_caught
from stats import g_test, judge

from specdec import ModelDrafter, Speculator
from specdec.drafters import BestFirst, DrafterFaultWarning, DySpec, growth, guard
from specdec.experiments.laws.false_drafters import (
    ForgetsToRenormalise,
    PrunesUnlikelyNodes,
    RanksSiblingsByValue,
    raw_mixed_children,
)
from specdec.verify import DraftTree

TARGET = tiny_llama(3, vocab=4)
DRAFT = noisy_copy(TARGET, 4, 0.3)
PROMPT = torch.tensor([[3, 1, 2]])
SAMPLING: dict[str, Any] = {"top_k": 0}
SAMPLES = 8_000
"""For planted bugs; a judged law gets what its promised power asks for."""

PATHS = [[0], [1], [0, 0], [0, 1], [0, 0, 0]]
CASES: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "mixed widths, budget flow": ((2, 2, 1), "mixed", "budget_flow", SAMPLING),
    "mixed widths, auto": ((3, 1), "mixed", "auto", {"top_k": 0, "temperature": 0.7}),
    "mixed paths, traversal": (PATHS, "mixed", "traversal", {"top_k": 0, "top_p": 0.9}),
    "mixed widths, fewer allowed tokens than children, budget flow": ((3, 2), "mixed", "budget_flow", {"top_k": 2}),
    "sampled widths, auto": ((3,), "sampled", "auto", SAMPLING),
    "sampled widths, traversal": ((2, 2), "sampled", "traversal", SAMPLING),
    "sampled paths, recursive rejection": (PATHS, "sampled", "recursive_rejection", {"top_k": 3}),
    "sampled widths, fewer allowed tokens than children, traversal": ((3, 2), "sampled", "traversal", {"top_k": 2}),
    "top paths, naive": (PATHS, "top", "naive", SAMPLING),
    "dyspec, auto": (DySpec(3, 5, 2), "sampled", "auto", SAMPLING),
    "dyspec, traversal": (DySpec(3, 6, 3, 0.1), "sampled", "traversal", SAMPLING),
    "dyspec, recursive rejection": (DySpec(2, 4, 3, 0.2, trust=1.0), "sampled", "recursive_rejection", {"top_k": 3}),
    "dyspec, naive": (DySpec(3, 5, 2, 0.15), "sampled", "naive", SAMPLING),
    "best first, auto": (BestFirst(3, 2, 5), "top", "auto", SAMPLING),
}
QUICK = {"mixed widths, auto", "dyspec, traversal"}


def speculator(tree: Any, children: str, rule: str, kind: type[ModelDrafter] = ModelDrafter) -> Speculator:
    return Speculator(TARGET, kind(DRAFT, tree=tree, children=children), rule=rule)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_joint_law_of_first_tokens(name: str) -> None:
    tree, children, rule, sampling = CASES[name]
    samples = None if name in QUICK else 20_000
    spec = speculator(tree, children, rule)
    check_joint_law(spec, PROMPT, samples=samples, **sampling)
    assert spec.report is not None
    assert spec.report.num_accepted_tokens > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixed widths, budget flow", "sampled widths, traversal", "dyspec, traversal"])
def test_second_step_ignores_the_noise_of_the_first(name: str) -> None:
    tree, children, rule, sampling = CASES[name]
    check_second_step(speculator(tree, children, rule), PROMPT, SAMPLES, **sampling)


@pytest.mark.parametrize("rule", ["traversal", "recursive_rejection"])
@pytest.mark.parametrize("bug", [RanksSiblingsByValue, PrunesUnlikelyNodes, ForgetsToRenormalise])
def test_false_siblings_are_caught(bug: type[ModelDrafter], rule: str) -> None:
    with must_be_caught():
        check_joint_law(speculator((2,), "sampled", rule, bug), PROMPT, samples=SAMPLES, **SAMPLING)


@pytest.mark.parametrize("rule", ["traversal", "budget_flow"])
def test_a_raw_law_in_place_of_the_off_top_law_is_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "mixed_children", raw_mixed_children)
    with must_be_caught():
        check_joint_law(speculator((2, 2), "mixed", rule), PROMPT, samples=SAMPLES, **SAMPLING)


def poisoned() -> Any:
    """A drafter that knows only NaN once it has read token 1."""
    model = copy.deepcopy(DRAFT)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = float("nan")
    return model


def judge_poisoned(tree: Any, children: str, rule: str) -> None:
    prompt = torch.tensor([[3, 2, 2]])
    mask = torch.ones_like(prompt)
    spec = Speculator(TARGET, ModelDrafter(poisoned(), tree=tree, children=children), rule=rule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DrafterFaultWarning)
        out: Any = spec.generate(
            prompt, attention_mask=mask, do_sample=True, max_new_tokens=NEW, num_return_sequences=SAMPLES, seed=1,
            **SAMPLING,
        )  # fmt: skip
    assert spec.report is not None
    assert spec.report.num_drafter_faults > 0
    law = joint_law(TARGET, prompt, mask, NEW, **SAMPLING).numpy().ravel()
    judge(g_test(counts_of(out[:, prompt.shape[1] :], 4), law), "joint law beside a poisoned drafter")


POISONED = pytest.mark.parametrize(
    ("tree", "children", "rule"),
    [
        ((2, 2), "mixed", "budget_flow"),
        ((2, 1), "sampled", "traversal"),
        (DySpec(3, 4, 2, 0.1, trust=1.0), "sampled", "traversal"),
    ],
    ids=["mixed", "sampled", "dyspec"],
)


@POISONED
def test_a_law_lost_further_down_withdraws_nothing_above_it(tree: Any, children: str, rule: str) -> None:
    judge_poisoned(tree, children, rule)


@POISONED
def test_dropping_poisoned_rows_drafts_is_caught(
    tree: Any, children: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: rows whose later laws are lost lose the tokens before them, too."""
    honest = guard.finite_levels

    def drop(drafted: DraftTree) -> DraftTree | None:
        kept = honest(drafted)
        if kept is None:
            return None
        whole = kept.num_nodes == drafted.num_nodes
        return replace(kept, num_nodes=torch.where(whole, kept.num_nodes, 1), topology=None)

    monkeypatch.setattr(guard, "finite_levels", drop)
    with must_be_caught():
        judge_poisoned(tree, children, rule)
