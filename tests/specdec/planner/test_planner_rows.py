"""With a seed a planned row's text does not depend on the rows around it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from planner_world import DEPTH, World

import specdec
from specdec.planner import factory
from specdec.planner.costs import Costs
from specdec.planner.row_planner import RowPlanner
from specdec.planner.store import CostStore

FAMILY = "llama-gqa"
LENGTHS = (7, 3, 5)
SEEDS = range(6)


def table(request: object, target: object, options: object, rule: str, rows: int, strict: object, **_: Any) -> Costs:
    """Drafts are dear, so that what a row has accepted so far decides how deep it drafts; dearer in a batch."""
    costs = World(draft=0.12 if rows == 1 else 0.3, verify=0.05, rows=rows).costs
    return replace(costs, steps={name: costs.steps["model"] for name in ("model", "ngram")})


def texts(draft: Any, seed: int, rows: list[int], plans: set[str]) -> list[list[int]]:
    """New tokens of the given rows, decoded in one batch; what was planned is added to `plans`."""
    spec = specdec.Speculator(models.target(FAMILY), draft)
    ids, mask = models.prompts(LENGTHS, models.VOCAB, 3, period=3)
    out: Any = spec.generate(
        ids[rows], attention_mask=mask[rows], do_sample=True, temperature=0.5, max_new_tokens=32, eos_token_id=None,
        seed=[100 * seed + row for row in rows],
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.plan is not None
    plans.update(spec.report.plan.steps)
    return [line.tolist() for line in out[:, ids.shape[1] :]]


def depends_on_companions(draft: Any) -> bool:
    plans: set[str] = set()
    alone = {(seed, row): texts(draft, seed, [row], plans)[0] for seed in SEEDS for row in range(3)}
    together = {(seed, row): text for seed in SEEDS for row, text in enumerate(texts(draft, seed, [0, 1, 2], plans))}
    assert len(plans) > 1, "nothing was planned"
    return alone != together


@pytest.fixture(autouse=True)
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setattr(factory, "measure", table)
    monkeypatch.setenv("SPECDEC_CACHE", "off")


@pytest.mark.parametrize("kind", ["model", "ngram"])
def test_a_seeded_row_is_the_same_alone_and_in_company(kind: str) -> None:
    assert not depends_on_companions("ngram" if kind == "ngram" else models.draft("near", FAMILY))


def test_plans_for_the_whole_batch_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    original = factory.PlannerFactory.planner_for

    def unseeded(self: factory.PlannerFactory, request: Any, *loop: Any) -> Any:
        return original(self, replace(request, seeded=False), *loop)

    monkeypatch.setattr(factory.PlannerFactory, "planner_for", unseeded)
    assert depends_on_companions(models.draft("near", FAMILY))


def test_a_lone_seeded_row_is_planned_as_it_is_in_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first caller's prompt told the table is believed by calls without a seed only."""
    plans: list[object] = []
    original = factory.PlannerFactory.planner_for

    def keep(self: factory.PlannerFactory, *given: Any) -> Any:
        plans.append(original(self, *given))
        return plans[-1]

    def hopeless(*arguments: Any, **_: Any) -> Costs:
        return replace(table(*arguments), beliefs={"model": {1: ([50.0] * DEPTH, [0.0] * DEPTH)}})

    monkeypatch.setattr(factory.PlannerFactory, "planner_for", keep)
    monkeypatch.setattr(factory, "measure", hopeless)
    spec = specdec.Speculator(models.target(FAMILY), models.draft("near", FAMILY))
    ids, _ = models.prompts((7,), models.VOCAB, 3, period=3)
    drafted = []
    for seed in (1, None):
        spec.generate(ids, do_sample=True, temperature=0.5, max_new_tokens=24, eos_token_id=None, seed=seed)
        assert spec.report is not None
        drafted.append(spec.report.num_draft_tokens)
    assert [type(plan) for plan in plans] == [RowPlanner, factory.CallPlanner]
    assert drafted[0] > 0
    assert drafted[1] == 0, "by the table drafts are hopeless"


def test_coupled_texts_need_no_such_plans() -> None:
    spec = specdec.Speculator(models.target(FAMILY), models.draft("near", FAMILY), rule="coupled")
    ids = torch.tensor([[5, 6, 7]])
    out: Any = spec.generate(ids, do_sample=True, max_new_tokens=12, seed=1)
    plain: Any = specdec.Speculator(models.target(FAMILY), rule="coupled").generate(
        ids, do_sample=True, max_new_tokens=12, seed=1
    )
    assert torch.equal(out, plain)
