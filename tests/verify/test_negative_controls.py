"""Planted bugs, each known from some engine: the very functions that judge the sampling laws must refuse them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from law_checks import check_acceptance, check_joint_law, check_second_step, must_be_caught

from specdec import ModelDrafter, Speculator
from specdec.experiments.laws.bugs import (
    AcceptReusesDraftNoise,
    AcceptsAlways,
    DropsResidual,
    FrozenStep,
    OneCoin,
    ResidualReusesAcceptNoise,
    ResidualReusesDraftNoise,
    StopsAtFirstReject,
    TokenwiseResidualInBlock,
)
from specdec.experiments.laws.controls import controls
from specdec.experiments.laws.false_drafters import (
    DropsUnlikelyTokens,
    TellsRawLaw,
    TellsRowOfAnotherRequest,
    TellsRowOfNextPosition,
)
from specdec.verify.rules import RULES

TARGET = tiny_llama(3, vocab=4)
DRAFT = noisy_copy(TARGET, 4, 0.3)
PROMPT = torch.tensor([[3, 1, 2]])
SAMPLING: dict[str, Any] = {"top_k": 0}
SAMPLES = 8_000
"""Far fewer than a judged law gets: a bug that is seen here is seen there."""


def chain(kind: type[ModelDrafter] = ModelDrafter, temperature: float = 1.0) -> ModelDrafter:
    return kind(DRAFT, k=3, temperature=temperature)


def test_the_honest_library_passes_at_the_same_size() -> None:
    for rule in ("rejection", "block"):
        spec = Speculator(TARGET, chain(temperature=0.5), rule=rule)
        check_joint_law(spec, PROMPT, samples=SAMPLES, **SAMPLING)
        check_second_step(spec, PROMPT, SAMPLES, **SAMPLING)
        check_acceptance(spec, PROMPT, SAMPLES, **SAMPLING)


@pytest.mark.parametrize("bug", [AcceptsAlways, DropsResidual, StopsAtFirstReject])
def test_wrong_chain_rules_are_caught(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, bug.name, bug)
    with must_be_caught():
        check_joint_law(Speculator(TARGET, chain(), rule=bug.name), PROMPT, samples=SAMPLES, **SAMPLING)


def test_the_residual_of_another_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows only where P_1 is far below 1 and the second token is refused: a drafter that is badly off."""
    monkeypatch.setitem(RULES, "block", TokenwiseResidualInBlock)
    drafter = ModelDrafter(noisy_copy(TARGET, 4, 1.0), k=2, temperature=0.7)
    with must_be_caught():
        check_joint_law(Speculator(TARGET, drafter, rule="block"), PROMPT, samples=40_000, **SAMPLING)


@pytest.mark.parametrize("bug", [AcceptsAlways, StopsAtFirstReject])
def test_wrong_acceptance_is_caught(bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, bug.name, bug)
    with must_be_caught():
        check_acceptance(Speculator(TARGET, chain(), rule=bug.name), PROMPT, SAMPLES, **SAMPLING)


def test_a_coin_shared_by_the_nodes_of_a_tree_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "naive", OneCoin)
    with must_be_caught():
        spec = Speculator(TARGET, DRAFT, tree=(2, 2), rule="naive")
        check_joint_law(spec, PROMPT, samples=SAMPLES, **SAMPLING)


@pytest.mark.parametrize(
    ("bug", "rule"),
    [
        (AcceptReusesDraftNoise, "rejection"),
        (AcceptReusesDraftNoise, "block"),
        (ResidualReusesDraftNoise, "rejection"),
        (ResidualReusesAcceptNoise, "rejection"),
    ],
)
def test_noise_shared_by_roles_is_caught(bug: Any, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.batch.NoiseStream", bug)
    with must_be_caught():
        check_joint_law(Speculator(TARGET, chain(), rule=rule), PROMPT, samples=SAMPLES, **SAMPLING)


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_noise_shared_by_steps_is_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.batch.NoiseStream", FrozenStep)
    with must_be_caught():
        check_second_step(Speculator(TARGET, chain(), rule=rule), PROMPT, SAMPLES, **SAMPLING)


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize(
    ("bug", "temperature"),
    [(TellsRawLaw, 0.5), (TellsRowOfNextPosition, 1.0), (TellsRowOfAnotherRequest, 1.0), (DropsUnlikelyTokens, 1.0)],
)
def test_false_draft_laws_are_caught(bug: Any, temperature: float, rule: str) -> None:
    with must_be_caught():
        spec = Speculator(TARGET, chain(bug, temperature), rule=rule)
        check_joint_law(spec, PROMPT, samples=SAMPLES, **SAMPLING)


@pytest.mark.parametrize(
    "name",
    ["realised instead of nominal mass", "block's coins keyed by absolute position", "race without position"],
)
def test_subtle_bugs_are_caught_by_more_samples(name: str) -> None:
    """As in `python -m specdec.experiments.laws`, which passes the honest library at far larger sizes."""
    (control,) = (control for control in controls() if control.name == name)
    assert control.run(60_000, 4000)["caught"]
