"""Planned calls on real models: the text and its law are the target's, calls repeat, bad tables and bad arguments are
met with a note or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from law_checks import check_joint_law, must_be_caught

from specdec import ModelDrafter, NgramDrafter, Speculator
from specdec.experiments.laws.false_drafters import DropsUnlikelyTokens
from specdec.kv import UnsupportedArgumentError
from specdec.planner import factory
from specdec.planner.costs import Costs
from specdec.planner.options import Options
from specdec.planner.store import CostStore
from specdec.verify.folders import VARIABLE

TARGET = tiny_llama(0)
DRAFT = noisy_copy(TARGET, 1)
NEAR = noisy_copy(TARGET, 1, 0.02)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])
SAMPLING: dict[str, Any] = {"top_k": 0, "do_sample": True}
CHEAP = Costs(1, 1.0, {name: {1: 1.1, 4: 1.3, 12: 3.0} for name in ("model", "ngram")}, 0.001, 0.5)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts are nearly free, whatever this machine says."""
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setattr(factory, "measure", lambda *_, **__: CHEAP)


def generate(spec: Speculator, **options: Any) -> torch.Tensor:
    out = spec.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), eos_token_id=None, pad_token_id=0, **options)
    assert isinstance(out, torch.Tensor)
    return out


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("draft", [NEAR, "ngram", [NEAR, "ngram"]], ids=["model", "ngram", "both"])
def test_greedy_text_is_the_targets_and_drafts_are_planned(draft: Any) -> None:
    spec = Speculator(TARGET, draft)
    plain = generate(Speculator(TARGET), max_new_tokens=60, do_sample=False)
    assert torch.equal(generate(spec, max_new_tokens=60, do_sample=False), plain)
    assert spec.report is not None
    assert spec.report.plan is not None
    assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
    assert spec.report.num_steps < 60
    assert sum(spec.report.plan.steps.values()) == spec.report.num_steps
    assert "steps by plan" in spec.report.summary()


@pytest.mark.usefixtures("cheap")
def test_sampled_calls_repeat_and_the_plan_matters() -> None:
    spec = Speculator(TARGET, [DRAFT, "ngram"])
    first = generate(spec, max_new_tokens=50, seed=4, **SAMPLING)
    assert torch.equal(generate(spec, max_new_tokens=50, seed=4, **SAMPLING), first)
    assert not torch.equal(generate(spec, max_new_tokens=50, seed=5, **SAMPLING), first)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("draft", [DRAFT, [DRAFT, "ngram"]], ids=["model", "both"])
def test_planned_sampling_follows_the_law(draft: Any) -> None:
    check_joint_law(Speculator(TARGET, draft), PROMPT, samples=16_000, top_k=0)


@pytest.mark.usefixtures("cheap")
def test_a_dishonest_option_is_caught_by_that_test() -> None:
    target = tiny_llama(3, vocab=4)
    liar = DropsUnlikelyTokens(noisy_copy(target, 4, 0.3), k=3, temperature=1.0)
    with must_be_caught():
        check_joint_law(Speculator(target, liar, k="auto"), torch.tensor([[3, 1, 2]]), samples=8_000, top_k=0)


def test_costs_are_measured_once_and_kept_without_touching_global_noise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    state = torch.get_rng_state()
    spec = Speculator(TARGET, DRAFT)
    generate(spec, max_new_tokens=8, do_sample=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert spec.report is not None
    assert spec.report.plan is not None
    assert spec.report.plan.ms_measuring > 0
    [file] = tmp_path.iterdir()
    costs = Costs.from_json(json.loads(file.read_text())["costs"])
    assert costs.plain < costs.step("model", 12)
    monkeypatch.setattr(factory, "STORE", CostStore())  # another process
    again = Speculator(TARGET, DRAFT)
    generate(again, max_new_tokens=8, do_sample=False)
    assert again.report is not None
    assert again.report.plan is not None
    assert again.report.plan.ms_measuring == 0
    file.write_text(file.read_text()[:40])
    monkeypatch.setattr(factory, "STORE", CostStore())
    third = Speculator(TARGET, DRAFT)
    generate(third, max_new_tokens=8, do_sample=False)
    assert third.report is not None
    assert any("not readable and is measured again" in note for note in third.report.notes)


def test_without_costs_it_drafts_as_if_k_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Costs:
        raise RuntimeError("no clock")

    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setattr(factory, "measure", fails)
    spec = Speculator(TARGET, DRAFT)
    fixed = Speculator(TARGET, DRAFT, k=4)
    planned, given = (generate(one, max_new_tokens=20, seed=1, **SAMPLING) for one in (spec, fixed))
    assert torch.equal(planned, given)
    assert spec.report is not None
    assert any("no clock" in note for note in spec.report.notes)


def test_k_and_tree_and_drafter_objects_are_not_planned() -> None:
    for options in (dict(k=2), dict(tree=(2, 1))):
        assert not isinstance(Speculator(TARGET, DRAFT, **options).drafter.inner, Options)  # type: ignore[union-attr]
    assert Speculator(TARGET, NgramDrafter(k=3)).planners is None
    assert Speculator(TARGET, NgramDrafter(k=3), k="auto").planners is not None
    assert Speculator(TARGET).planners is None


@pytest.mark.parametrize(
    ("draft", "options", "message"),
    [
        (DRAFT, {"k": "five"}, "expected a number of tokens or 'auto'"),
        ([DRAFT, "ngram"], {"k": 3}, "describe one drafter's drafts"),
        ([DRAFT, noisy_copy(TARGET, 2)], {}, "at most one model"),
        ([], {}, "at least one usable drafter"),
        (ModelDrafter(DRAFT, tree=(2, 2)), {"k": "auto", "rule": "block"}, "takes chains only"),
        (None, {"k": "auto"}, "draft is None"),
    ],
)
def test_what_cannot_be_planned_is_refused(draft: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=message):
        Speculator(TARGET, draft, **options)


@pytest.mark.parametrize(
    "data",
    [None, {}, {"rows": 1, "plain": -1, "steps": {}, "draft_token": 0, "prompt_token": 0},
     {"rows": 1, "plain": 1, "steps": {"model": {"0": 1}}, "draft_token": 0, "prompt_token": 0},
     {"rows": 1, "plain": 1, "steps": {"model": {"1": float("nan")}}, "draft_token": 0, "prompt_token": 0}],
)  # fmt: skip
def test_tables_that_are_none_are_refused(data: Any) -> None:
    with pytest.raises(UnsupportedArgumentError, match="cost table"):
        Costs.from_json(data)


def test_costs_between_and_beyond_measured_depths() -> None:
    costs = Costs(1, 10.0, {"model": {2: 14.0, 4: 20.0}})
    assert [costs.step("model", d) for d in (0, 1, 2, 3, 4, 6)] == pytest.approx([10, 12, 14, 17, 20, 26])
    assert Costs.from_json(json.loads(json.dumps(costs.to_json()))) == costs
