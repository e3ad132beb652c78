"""Cost tables are corrected by what steps really took, relative to each other, and only where no text shows it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from planner_world import Outcome, World

from specdec import Speculator
from specdec.planner import factory
from specdec.planner.cost_refinement import FEWEST, PLAIN, refined
from specdec.planner.costs import Costs
from specdec.planner.risk_budget import RISK, RISK_STEPS
from specdec.planner.store import CostStore

TRUE = Costs(1, 5.0, {"model": {1: 6.5, 2: 7.5, 4: 9.0, 8: 12.5}, "ngram": {4: 6.0}})


def took(costs: Costs, times: float = 1.0, count: int = 20, **depths: list[int]) -> dict[tuple[str, int], list[float]]:
    """Steps as `costs` say, on a machine that takes `times` as long: plain ones, and those of some depths."""
    kinds = [(name, depth) for name, wanted in depths.items() for depth in wanted]
    return {PLAIN: [times * costs.plain] * count, **{kind: [times * costs.step(*kind)] * count for kind in kinds}}


def against_plain(costs: Costs, depth: int, option: str = "model") -> float:
    return costs.step(option, depth) / costs.plain


def dear(factor: float) -> Costs:
    """The table as a busy neighbour may make it look while it is measured."""
    return replace(TRUE, steps={**TRUE.steps, "model": {d: factor * ms for d, ms in TRUE.steps["model"].items()}})


@pytest.mark.parametrize("factor", [0.8, 1.25])
@pytest.mark.parametrize("speed", [0.7, 1.0, 1.6])
def test_a_table_measured_in_a_bad_moment_is_right_after_some_calls(factor: float, speed: float) -> None:
    table = dear(factor)
    for _ in range(8):
        table = refined(table, took(TRUE, speed, model=[4]))
    assert against_plain(table, 4) == pytest.approx(against_plain(TRUE, 4), rel=0.01)
    for depth in (1, 2, 8):  # never seen: nearer to the truth than before
        wrong, left = (abs(against_plain(one, depth) / against_plain(TRUE, depth) - 1) for one in (dear(factor), table))
        assert left < 0.85 * wrong
    assert table.steps["ngram"] == TRUE.steps["ngram"]
    assert table.plain == TRUE.plain


def test_no_choice_changes_with_the_speed_of_the_whole_machine() -> None:
    table = refined(TRUE, took(TRUE, 1.7, model=[1, 2, 4, 8], ngram=[4]))
    for depth in (1, 2, 4, 8):
        assert table.step("model", depth) == pytest.approx(TRUE.step("model", depth))
    assert table.plain == pytest.approx(TRUE.plain)


def test_nothing_is_learned_where_there_is_nothing_to_compare() -> None:
    slow = took(dear(2.0), model=[4])
    assert refined(TRUE, {("model", 4): slow["model", 4]}) is TRUE
    assert refined(TRUE, {**slow, PLAIN: slow[PLAIN][: FEWEST - 1]}) is TRUE
    assert refined(TRUE, slow) is not TRUE


def test_one_call_is_not_believed_at_once_and_few_steps_less() -> None:
    told = [against_plain(refined(TRUE, took(dear(1.5), count=count, model=[4])), 4) for count in (FEWEST, 40)]
    assert against_plain(TRUE, 4) < told[0] < told[1] < 1.5 * against_plain(TRUE, 4)


def test_odd_steps_do_not_count() -> None:
    steps = took(TRUE, model=[4])
    steps["model", 4][:5] = [500.0] * 5
    assert against_plain(refined(TRUE, steps), 4) == pytest.approx(against_plain(TRUE, 4))


def test_a_corrected_table_is_written_every_time_the_calls_have_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    key, store = {"some": "key"}, CostStore()
    store.put(key, dear(1.5))
    store.refine(key, {})
    assert store.get(key) == (dear(1.5), None)
    here: list[float] = []
    written: list[float] = []
    for _ in range(5):
        store.refine(key, took(TRUE, model=[4]))
        for place, kept in ((here, store), (written, CostStore())):
            now, _ = kept.get(key)
            assert now is not None
            place.append(against_plain(now, 4))
    assert here == sorted(here, reverse=True)
    assert written == pytest.approx([here[0], here[1], here[1], here[3], here[3]])


def test_calls_correct_their_table_only_where_no_text_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that says twelve drafted tokens cost a fifth of a step: a call finds out. Sampled ones stay what they
    were."""
    target = tiny_llama(0)
    lie = Costs(1, 100.0, {"model": dict.fromkeys((1, 2, 4, 12), 120.0)})
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setattr(factory, "measure", lambda *_, **__: lie)
    spec = Speculator(target, noisy_copy(target, 1, 1.0))
    planned: list[Costs] = []
    own = factory.CallPlanner.__init__

    def init(self: Any, costs: dict[int, Costs], *args: Any) -> None:
        planned.append(costs[1])
        own(self, costs, *args)

    monkeypatch.setattr(factory.CallPlanner, "__init__", init)

    def generate(**sampling: Any) -> torch.Tensor:
        prompt = torch.tensor([[3, 5, 2, 6, 3, 5]])
        out: Any = spec.generate(prompt, max_new_tokens=60, eos_token_id=None, pad_token_id=0, **sampling)
        return out

    torch.manual_seed(3)
    first = generate(do_sample=True)
    greedy = [generate(do_sample=False) for _ in range(3)]
    torch.manual_seed(3)
    assert torch.equal(generate(do_sample=True), first)
    assert torch.equal(greedy[0], greedy[2])
    assert planned[0] == planned[1] == planned[4] == lie
    assert against_plain(planned[2], 12) > 1.3 > against_plain(lie, 12)


HERE = World(draft=0.05, verify=0.05, tokens=128, acceptance=lambda row, position: 0.75)
"""Drafts of four or five are best here."""


def series(explores: bool, calls: int = 10) -> list[Outcome]:
    """Calls that hand on what they learned and the table, which at first says that deep drafts are dear."""
    model = {depth: ms * (1.0 if depth == 1 else 1.42) for depth, ms in HERE.costs.steps["model"].items()}
    believed, known = replace(HERE.costs, steps={"model": model}), None
    done = []
    for seed in range(calls):
        done.append(HERE.run(seed, known=known, believed=believed, explores=explores))
        believed, known = refined(believed, done[-1].took), done[-1].known
    return done


def spent(calls: list[Outcome]) -> float:
    return sum(call.spent for call in calls)


def test_a_call_that_tries_near_rivals_finds_a_table_wrong() -> None:
    found, never = series(True), series(False)
    best = [HERE.run(seed, known=found[seed - 1].known if seed else None) for seed in range(10)]
    assert spent(found[5:]) < 1.03 * spent(best[5:])
    assert spent(never[5:]) > 1.05 * spent(best[5:])


def test_trying_costs_next_to_nothing_where_the_table_is_right() -> None:
    runs = [[HERE.run(seed, explores=explores) for seed in range(20)] for explores in (False, True)]
    kinds = [sum(len(run.took) for run in some) for some in runs]
    assert kinds[1] > kinds[0]
    assert spent(runs[1]) < 1.01 * spent(runs[0])


def test_what_is_tried_does_not_depend_on_the_clock() -> None:
    moody = random.Random(0)
    calm, wild = HERE.run(0, explores=True), HERE.run(0, explores=True, clock=lambda: moody.uniform(0.2, 5.0))
    assert calm.plans == wild.plans


def test_what_another_drafter_costs_stays_true_while_one_is_corrected() -> None:
    table = dear(1.25)
    for _ in range(10):
        table = refined(table, took(TRUE, model=[1, 2, 4, 8]))
    for option, depth in (("model", 8), ("ngram", 4)):
        assert against_plain(table, depth, option) == pytest.approx(against_plain(TRUE, depth, option), rel=0.01)


def test_a_jump_between_two_measured_depths_is_found_by_those_who_went_there() -> None:
    truth = replace(TRUE, steps={"model": {**TRUE.steps["model"], 6: 9.6}, "ngram": {4: 6.0}})
    table = TRUE
    for _ in range(10):
        table = refined(table, took(truth, model=[4, 6, 8]))
    assert against_plain(table, 6) == pytest.approx(against_plain(truth, 6), rel=0.01)
    assert against_plain(table, 8) == pytest.approx(against_plain(truth, 8), rel=0.01)


def test_no_draft_becomes_cheaper_than_none() -> None:
    steps = took(TRUE, model=[1])
    steps[PLAIN] = [3 * TRUE.plain] * 20  # whatever kept those
    table = TRUE
    for _ in range(20):
        table = refined(table, steps)
    assert min(table.steps["model"].values()) >= table.plain == TRUE.plain


def test_the_first_calls_of_a_process_explore_and_then_every_eighth() -> None:
    store = CostStore()
    assert [i for i in range(1, 30) if store.explores({"one": "key"})] == [*range(1, 9), 16, 24]
    assert store.explores({"another": "key"})


@pytest.mark.parametrize("rows", [1, 3])
def test_rivals_are_tried_a_few_times_each_and_only_with_all_rows(rows: int) -> None:
    """Rows end one after the other: what few rows take is another table's."""
    here = replace(HERE, rows=rows, acceptance=lambda row, position: (0.75, 0.6, 0.85)[row])
    for seed in range(5):
        run = here.run(seed, explores=True)
        assert len(run.took) > 2
        assert sum(map(len, run.took.values())) < sum(len(one.live) == rows for one in run.seen)
        assert run.spent < 1.03 * here.run(seed).spent


def test_n_grams_that_pay_are_not_left_out_for_a_try() -> None:
    here = replace(
        HERE, tokens=256, acceptance=lambda row, position: 0.6, ngram=lambda row, position: 0.95, ngram_found=0.9
    )
    with_, without = (spent([here.run(seed, explores=explores) for seed in range(10)]) for explores in (True, False))
    assert with_ < 1.01 * without


@pytest.mark.parametrize(("draft", "verify"), [(0.3, 0.15), (0.17, 0.1), (0.05, 0.05)])
def test_exploring_calls_lose_no_more_than_was_risked(draft: float, verify: float) -> None:
    useless = World(draft=draft, verify=verify, tokens=200)
    for seed in range(10):
        lost = useless.run(seed, explores=True).spent - useless.plain
        assert lost <= max(RISK * useless.plain, RISK_STEPS) + 1e-9
