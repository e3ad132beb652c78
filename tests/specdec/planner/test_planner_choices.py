"""Planned calls against every fixed setting, where drafts fare as those of a real pair do: sampled and greedy, with a
model, n-grams or both, in calls of all lengths, with what is known before them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planner_world import DEPTH, Acceptance, Fixed, World

from specdec.planner import risk_budget
from specdec.planner.acceptance import Belief, Known

MACHINES = {
    "cheap passes": World(step=2.0, verify=0.05, draft=0.2, catch_up=0.012, prefill=0.05),
    "dear passes": World(step=4.5, verify=0.3, draft=0.5, catch_up=0.03, prefill=0.2),
}
PROMPTS, ROUNDS = 6, 4
ACCEPTANCE = {"greedy": ((0.85, 0.95), (0.4, 0.8)), "sampled": ((0.5, 0.85), (0.0, 0.1))}
"""Of the model's and of the n-grams' tokens: the lowest and the highest of all prompts."""
DRAFTERS = ("model", "ngram", "model+ngram")
CLOSE = 0.95


Prompts = list[World]


def always(chance: float) -> Acceptance:
    return lambda row, at: chance


def prompts(machine: str, law: str, drafters: str, tokens: int) -> Prompts:
    """One world for each prompt, easy ones and hard ones in turns."""
    model, ngram = ([low + (high - low) * i / (PROMPTS - 1) for i in range(PROMPTS)] for low, high in ACCEPTANCE[law])
    out = []
    for i in (0, 3, 1, 4, 2, 5):
        own, other = always(model[i]), always(ngram[(i * 5) % PROMPTS])
        here = replace(MACHINES[machine], tokens=tokens, acceptance=own)
        if drafters == "ngram":
            here = replace(here, draft=0.0, found=0.5, acceptance=other)
        elif drafters == "model+ngram":
            here = replace(here, ngram=other)
        out.append(here)
    return out


def belief(law: str, which: int) -> Belief:
    """What a few dozen drafts before the call have shown."""
    chance = sum(ACCEPTANCE[law][which]) / 2
    return {1: ([20.0] * DEPTH, [20 * chance] * DEPTH)}


def known(law: str, drafters: str) -> Known:
    if drafters == "ngram":  # the only drafter of a world is called model
        return Known({"model": belief(law, 1)})
    return Known({"model": belief(law, 0), "ngram": belief(law, 1)})


def calls(worlds: Prompts, rounds: int) -> list[tuple[World, int]]:
    """Every prompt `rounds` times, with luck of its own."""
    return [(here, round * PROMPTS + i) for round in range(rounds) for i, here in enumerate(worlds)]


def best_fixed(worlds: Prompts, rounds: int) -> float:
    settings: list[Fixed] = [(one.name, depth) for one in worlds[0].all for depth in (0, 1, 2, 3, 4, 6, 8, 12)]
    return min(sum(here.run(seed, one).spent for here, seed in calls(worlds, rounds)) for one in settings)


def first_calls(worlds: Prompts, rounds: int, before: Known | None) -> float:
    return sum(here.run(seed, known=before).spent for here, seed in calls(worlds, rounds))


def later_calls(worlds: Prompts, rounds: int) -> float:
    """Each begins with what the one before it has learned, the first with what one more call has."""
    before, spent = worlds[-1].run(999).known, 0.0
    for here, seed in calls(worlds, rounds):
        outcome = here.run(seed, known=before)
        before, spent = outcome.known, spent + outcome.spent
    return spent


@pytest.mark.parametrize("tokens", [48, 96, 250])
@pytest.mark.parametrize("drafters", DRAFTERS)
@pytest.mark.parametrize("law", ACCEPTANCE)
@pytest.mark.parametrize("machine", MACHINES)
def test_within_five_percent_of_the_best_fixed_setting(machine: str, law: str, drafters: str, tokens: int) -> None:
    worlds = prompts(machine, law, drafters, tokens)
    best = best_fixed(worlds, ROUNDS)
    assert first_calls(worlds, ROUNDS, known(law, drafters)) <= best / CLOSE
    assert later_calls(worlds, ROUNDS) <= best / CLOSE


@pytest.mark.parametrize("law", ACCEPTANCE)
def test_long_enough_calls_are_that_close_without_knowing_anything(law: str) -> None:
    worlds = prompts("cheap passes", law, "model", 250)
    assert first_calls(worlds, ROUNDS, None) <= best_fixed(worlds, ROUNDS) / CLOSE


def test_drafts_deep_from_the_start_fail_that_test_in_shorter_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = prompts("cheap passes", "sampled", "model", 96)
    best = best_fixed(worlds, ROUNDS)
    assert first_calls(worlds, ROUNDS, None) <= best / CLOSE
    monkeypatch.setattr("specdec.planner.batch_planner.TRIES", 1)
    assert first_calls(worlds, ROUNDS, None) > best / CLOSE


@pytest.mark.parametrize("tokens", [48, 250])
@pytest.mark.parametrize("machine", MACHINES)
def test_false_beliefs_cost_no_more_than_may_be_risked(machine: str, tokens: int) -> None:
    """Whatever was believed: evidence of the call itself must prove a drafter before it may lose more."""
    useless = replace(MACHINES[machine], tokens=tokens)
    false = Known({"model": {1: ([80.0] * DEPTH, [76.0] * DEPTH)}})
    most = risk_budget._TRUSTED * max(risk_budget.RISK * useless.plain, risk_budget.RISK_STEPS * useless.step)
    for seed in range(6):
        assert useless.run(seed, known=false).spent - useless.plain <= most + 1e-9
