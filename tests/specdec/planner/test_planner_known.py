"""What a planner knows before a call (beliefs from measuring and from earlier calls), and chains only heard in it."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from planner_world import DEPTH, World

from specdec import Speculator
from specdec.planner import factory, risk_budget
from specdec.planner.acceptance import AcceptanceHistory, Known, would_be_kept
from specdec.planner.batch_planner import BatchPlanner
from specdec.planner.costs import Costs
from specdec.planner.options import Option
from specdec.planner.store import CostStore
from specdec.trace import StepTrace
from specdec.verify.draft_kind import DraftKind
from specdec.verify.weights import fingerprint

TARGET = tiny_llama(0)
GOOD = {1: ([40.0] * DEPTH, [34.0] * DEPTH)}
USELESS = {1: ([40.0] * DEPTH, [0.0] * DEPTH)}
TABLE = Costs(1, 1.0, {"model": {1: 1.3, 2: 1.6, 4: 2.2, 12: 4.6}, "ngram": {1: 1.1, 10: 1.8}}, 0.004, 0.06)


def option(name: str) -> Option:
    kind = DraftKind("chain", "deterministic")
    drafter: Any = SimpleNamespace(kind=kind, keeps_kv=name == "model", max_depth=DEPTH, max_nodes=DEPTH)
    return Option(name, name, drafter, (1,) * DEPTH, may_be_empty=name == "ngram")


def run(text: list[tuple[int, int]], names: list[str], known: Known | None = None) -> tuple[float, BatchPlanner]:
    """One call along a text that says, position by position, how many tokens of the model and of the n-gram would be
    accepted there. Returns what it took, in plain steps."""
    options: Any = SimpleNamespace(options=tuple(map(option, names)), max_depth=DEPTH, used=None, asked=[], heard=None)
    planner = BatchPlanner(options, lambda rows: TABLE, 1, 128, known)
    spent, at, step = 0.0, 0, 0
    while at < len(text):
        budget: Any = planner.budget([0], [len(text) - at])
        model, ngram = text[at]
        drafted = kept = 0
        ms, options.used, options.asked, options.heard = 1.0, None, [], None
        if budget.max_depth:
            options.used, drafted = budget.option, budget.depths[0]
            name = names[budget.option]
            options.asked = [(budget.option, 1)] if name == "ngram" else []
            kept = min(drafted, model if name == "model" else ngram)
            ms = TABLE.step(name, drafted)
        if budget.max_depth and budget.beside is not None:
            options.heard = budget.beside, [[0] * min(ngram, kept + 1) + [1] * (DEPTH - min(ngram, kept + 1))]
        trace = StepTrace(step, [0], [drafted], [kept], [[0] * (kept + 1)], [], 0.0, ms, 0.0)
        planner.learn(trace, [min(drafted, kept + 1)])
        spent, at, step = spent + ms, at + kept + 1, step + 1
    return spent, planner


def test_a_drafter_known_to_be_useless_costs_nothing_in_short_calls() -> None:
    text = [(0, 0)] * 60
    assert run(text, ["model"], Known({"model": USELESS}))[0] == 60
    assert run(text, ["model"])[0] > 60, "the case is not a hard one"


def test_a_drafter_known_to_be_good_survives_a_bad_start() -> None:
    text = [(0, 0)] * 3 + [(6, 0)] * 93
    spent, planner = run(text, ["model"], Known({"model": GOOD}))
    assert spent < 0.6 * len(text)
    assert planner.report.num_stops == 0
    late, planner = run(text, ["model"])
    assert planner.report.num_stops == 1, "without a belief so much is not risked for it"
    assert late > spent


def test_a_belief_that_has_become_false_is_bounded() -> None:
    spent, _ = run([(0, 0)] * 256, ["model"], Known({"model": GOOD}))
    assert spent <= 256 * (1 + 1.1 * risk_budget._TRUSTED * risk_budget.RISK)


def test_useless_n_grams_leave_the_model_its_chance() -> None:
    text = [(5, 0)] * 96
    assert run(text, ["model", "ngram"])[0] < 1.1 * run(text, ["model"])[0]


def test_n_grams_that_become_good_are_noticed_without_being_tried() -> None:
    text = [(2, 0)] * 60 + [(2, 10)] * 120
    spent, planner = run(text, ["model", "ngram"])
    assert sum(count for name, count in planner.report.steps.items() if "ngram" in name) > 5
    assert spent < 0.75 * run(text, ["model"])[0]


def test_nothing_is_noticed_without_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchPlanner, "_hear", lambda self, index, chains, trace: None)
    text = [(2, 0)] * 60 + [(2, 10)] * 120
    assert run(text, ["model", "ngram"])[0] > 0.9 * run(text, ["model"])[0]


@pytest.mark.parametrize(
    ("chain", "run", "fate"),
    [([5, 6, 7], [5, 9], (2, 1)), ([5, 6, 7], [5, 6], (2, 2)), ([5], [5, 6, 7], (1, 1)), ([5, 6], [9], (1, 0)),
     ([], [4], (0, 0))],
)  # fmt: skip
def test_chains_that_were_only_heard(chain: list[int], run: list[int], fate: tuple[int, int]) -> None:
    assert would_be_kept(chain, run) == fate


def test_beliefs_weigh_little_and_add_up() -> None:
    history = AcceptanceHistory(DEPTH, 1, GOOD)
    assert history.believes
    assert history.num_decisions == 0
    assert history.chances(1)[0] == pytest.approx(0.85, abs=0.03)
    for _ in range(12):
        history.add((1,) * DEPTH, [0], [1], [0])
    assert history.chances(1)[0] < 0.4, "a call soon believes its own drafts"
    tried, kept = history.belief[1]
    assert tried[0] == pytest.approx(0.8 * 40 + 12)
    assert kept[0] == pytest.approx(0.8 * 34)


def test_what_was_known_of_other_trees_is_passed_on_as_it_was() -> None:
    """A call that drafted chains has nothing to say about siblings, and takes nothing from what is known of them."""
    begun = {1: GOOD[1], 3: ([6.0] + [0.0] * (DEPTH - 1), [5.0] + [0.0] * (DEPTH - 1))}
    history = AcceptanceHistory(DEPTH, 1, begun)
    history.add((1,) * DEPTH, [0], [2], [1])
    assert set(history.belief) == {1, 3}
    assert history.belief[3] == begun[3]
    assert AcceptanceHistory(DEPTH, 1, history.belief).chances(3)[0] == pytest.approx(
        AcceptanceHistory(DEPTH, 1, begun).chances(3)[0], 0.1
    )


def test_forecasts_follow_a_text_that_gets_easier() -> None:
    here = World(draft=0.05, verify=0.05, tokens=400, acceptance=lambda row, at: 0.3 if at < 120 else 0.95)
    ratios = [here.run(seed).report for seed in range(10)]
    close = sum(abs(one.predicted_tokens_per_second / one.realised_tokens_per_second - 1) < 0.15 for one in ratios)
    assert close >= 9


def generate(spec: Speculator, **sampling: Any) -> torch.Tensor:
    prompt = torch.tensor([[3, 5, 2, 6, 3, 5]])
    out: Any = spec.generate(prompt, max_new_tokens=40, eos_token_id=None, pad_token_id=0, top_k=0, **sampling)
    return out


def test_calls_pass_on_what_they_learned_only_where_no_text_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "STORE", CostStore())
    monkeypatch.setattr(factory, "measure", lambda *_, **__: replace(TABLE, beliefs={"model": USELESS}))
    spec = Speculator(TARGET, noisy_copy(TARGET, 1, 0.5))
    assert spec.planners is not None
    torch.manual_seed(3)
    first = generate(spec, do_sample=True)
    generate(spec, do_sample=True, seed=1)
    assert not spec.planners._learned
    generate(spec, do_sample=False)
    assert [sampling for sampling, _ in spec.planners._learned] == [False]
    torch.manual_seed(3)
    assert torch.equal(generate(spec, do_sample=True), first)


def test_tables_keep_how_drafts_fared_and_other_weights_have_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CostStore()
    monkeypatch.setattr(factory, "STORE", kept)
    monkeypatch.setenv("SPECDEC_CACHE", "off")
    for draft in (noisy_copy(TARGET, 1, 0.01), noisy_copy(TARGET, 2, 5.0)):
        generate(Speculator(TARGET, draft), do_sample=False)
    near, far = kept._known.values()
    again = Costs.from_json(json.loads(json.dumps(near.to_json())))
    assert again.to_json() == near.to_json()
    share = [sum(costs.beliefs["model"][1][1]) / sum(costs.beliefs["model"][1][0]) for costs in (near, far)]
    assert share[0] > share[1] + 0.3
    assert fingerprint(TARGET) != fingerprint(noisy_copy(TARGET, 1, 0.01))
    assert fingerprint(TARGET) == fingerprint(tiny_llama(0))


def test_what_n_grams_would_have_proposed_while_measuring_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = CostStore()
    monkeypatch.setattr(factory, "STORE", kept)
    monkeypatch.setenv("SPECDEC_CACHE", "off")
    spec = Speculator(TARGET, "ngram")
    generate(spec, do_sample=False)
    generate(spec, do_sample=True, temperature=50.0)
    repeated, random = kept._known.values()
    for costs in (repeated, random):
        assert Costs.from_json(json.loads(json.dumps(costs.to_json()))).to_json() == costs.to_json()
        assert 0 < costs.found["ngram"] <= 1
    greedy, sampled = (
        sum(kept) / sum(tried) for tried, kept in (one.beliefs["ngram"][1] for one in (repeated, random))
    )
    assert greedy > sampled + 0.2, "greedy texts of tiny models repeat themselves"
