"""What planners expect of rows that a draft model cannot read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from context_cases import POSITIONS, SAME, TARGET, one_note
from planner_world import DEPTH, World

from specdec import Speculator
from specdec.planner import factory
from specdec.planner.acceptance import AcceptanceHistory, Known
from specdec.planner.choice import Situation, candidates
from specdec.planner.costs import Costs, StepTimes
from specdec.planner.store import CostStore


def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {name: {depth: 1.0 + 0.05 * depth for depth in (1, 4, 12)} for name in ("model", "ngram")}
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setattr(factory, "measure", lambda *_, **__: Costs(1, 1.0, steps, 0.001, 0.5))


def test_a_planner_lets_n_grams_draft_where_the_model_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    cheap(monkeypatch)
    ids, mask = models.prompts((40,), models.VOCAB, 1, period=4)
    spec = Speculator(TARGET, [SAME, "ngram"])
    arguments: dict[str, Any] = dict(do_sample=False, max_new_tokens=40, eos_token_id=None, pad_token_id=0)
    with one_note():
        out: Any = spec.generate(ids, attention_mask=mask, **arguments)
    assert torch.equal(out, TARGET.generate(ids, attention_mask=mask, **arguments))
    assert spec.report is not None
    assert spec.report.plan is not None
    assert {name.split()[0] for name in spec.report.plan.steps} <= {"plain", "ngram"}
    assert spec.report.num_draft_tokens > 0
    with one_note():
        alone = Speculator(TARGET, SAME)
        alone.generate(ids, attention_mask=mask, **arguments)
    assert alone.report is not None
    assert alone.report.plan is not None
    assert alone.report.plan.why_plain == "model cannot read that many tokens (24 positions)"


def test_a_planner_expects_nothing_of_rows_that_the_model_cannot_read() -> None:
    world = World(draft=0.0, verify=0.01, catch_up=0.0, prefill=0.0, rows=2, acceptance=lambda row, position: 0.9)
    planner, stand_in = world.planner(Known({"model": {1: ([50.0] * DEPTH, [45.0] * DEPTH)}}))
    [option] = stand_in.options
    planner._choices = stand_in.options = (replace(option, positions=POSITIONS),)
    plan = planner.budget([0, 1], [90, 90], [40, 20])
    assert plan.depths == (0, 5), "one row cannot be read, the other one to its 24th token"
    times = StepTimes.of(world.costs, {"model": DEPTH})
    both, one = (Situation([0, 1], [90, 90], DEPTH, lambda rows: times, lengths) for lengths in ([6, 6], [40, 6]))
    assert one.limits_of(option) == both.limits == [(0, DEPTH), (1, DEPTH)]
    history = AcceptanceHistory(DEPTH, 2)
    expected = [[plan.tokens - 2 for plan in candidates(0, stand_in.options[0], history, now)] for now in (both, one)]
    assert expected[1] == pytest.approx([tokens / 2 for tokens in expected[0]])
