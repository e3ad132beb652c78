"""`python -m specdec.experiments.laws` and `.strict`: what they judge, and that they fail when something is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exact_law
import numpy as np
import pytest
import torch
from torch import Tensor

from specdec import ModelDrafter
from specdec.drafters import Budget
from specdec.experiments import strict
from specdec.experiments.laws import __main__ as command
from specdec.experiments.laws import world
from specdec.experiments.laws.bugs import AcceptsAlways
from specdec.experiments.laws.controls import Control, controls
from specdec.experiments.laws.judge import joint_law
from specdec.experiments.laws.options import Budget as Amount
from specdec.experiments.laws.run import judge_pair, judge_pairs
from specdec.kv import UnsupportedArgumentError
from specdec.verify import DraftTree, Noise, Verdict
from specdec.verify.rules import RULES
from specdec.verify.rules.coupled import Coupled

SMALL = ["--samples", "4000", "--chunk", "2000", "--small-samples", "17", "--small-seconds", "0"]


def run(out: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = command.main([*SMALL, *arguments, "--out", str(out)])
    (path,) = out.glob("laws-*.json")
    return code, json.loads(path.read_text())


def test_the_library_passes_and_a_planted_bug_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [next(controls())]
    monkeypatch.setattr("specdec.experiments.laws.run.controls", lambda: iter(few))
    chosen = ("--drafters", "chain", "mixed tree", "--rules", "block", "budget_flow")
    code, result = run(tmp_path, *chosen, "--control-samples", "4000")
    assert code == 0
    assert sorted((c["rule"], c["drafter"], -c["batch"]) for c in result["cells"]) == [
        (rule, drafter, -batch)
        for rule, drafter in (("block", "chain"), ("budget_flow", "chain"), ("budget_flow", "mixed tree"))
        for batch in (2000, 17, 3, 1)
    ]
    for cell in result["cells"]:
        assert cell["samples"] >= (4000 if cell["batch"] == 2000 else 17)
        assert cell["tokens_per_step"] > 1.2, "nothing is accepted: the test would say nothing"
        assert 0 < cell["joint"]["detectable_tv"] <= 1
    assert result["controls"][0]["caught"]
    assert result["summary"]["failed_cells"] == result["summary"]["controls_missed"] == []
    assert {"command", "git_commit", "versions", "cpu", "seed", "alpha"} <= result["provenance"].keys()
    assert "written: laws-" in capsys.readouterr().out


def test_a_wrong_rule_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "rejection", AcceptsAlways)
    code, result = run(tmp_path, "--drafters", "chain", "--rules", "rejection", "--control-samples", "0")
    assert code == 1
    assert ["rejection", "chain", 2000] in result["summary"]["failed_cells"]


class Sociable(ModelDrafter):
    """Exact, but what it drafts depends on how many rows there are."""

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        self.temperature = 0.5 if len(budget.depths) == 1 else 2.0
        return super().propose(budget, uniforms)


def test_texts_that_depend_on_their_batch_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their law is right in every batch: only the comparison with the wide batch can tell."""
    monkeypatch.setitem(world.DRAFTERS, "chain", lambda: world.chain(Sociable))
    code, result = run(tmp_path, "--drafters", "chain", "--rules", "rejection", "--control-samples", "0")
    assert code == 1
    assert all(cell[name]["passed"] for cell in result["cells"] for name in ("joint", "step 2"))
    same = {cell["batch"]: cell["same texts as the wide batch"]["passed"] for cell in result["cells"][1:]}
    assert not same[1]
    assert result["summary"]["tv_small_to_wide"][1] == 1.0


class Swayed(Coupled):
    """Emits the draft's first token whatever the race says."""

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        verdict = super().__call__(tree, p, noise)
        first = verdict.num_accepted == 0
        return verdict._replace(next_token=torch.where(first, tree.tokens[:, -1], verdict.next_token))


def test_texts_of_a_race_are_compared_with_those_without_a_drafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where steps end is not judged: best-first trees withdraw nodes after a look at the noise of later positions."""
    chosen = ("--drafters", "BestFirst", "--rules", "coupled", "--control-samples", "0")
    code, result = run(tmp_path / "right", *chosen)
    assert code == 0
    wide = result["cells"][0]
    assert wide["same texts as without a drafter"] == {"compared": 4000, "differing": 0, "passed": True}
    assert wide["joint"]["passed"] is True
    assert wide["step 2"]["passed"] is None
    assert result["summary"]["not_promised"] == ["coupled, BestFirst: step 2"]
    monkeypatch.setitem(RULES, "coupled", Swayed)
    code, result = run(tmp_path / "wrong", *chosen)
    assert code == 1
    assert not result["cells"][0]["same texts as without a drafter"]["passed"]


def test_a_bug_that_is_missed_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Control("nothing planted", "block")
    monkeypatch.setattr("specdec.experiments.laws.run.controls", lambda: iter([nothing]))
    code, result = run(tmp_path, "--rules", "block", "--only", "others", "--control-samples", "2000")
    assert code == 1
    assert result["summary"]["controls_missed"] == [["nothing planted", "block"]]
    assert result["summary"]["failed_cells"] == []
    assert {cell["drafter"] for cell in result["cells"]} == {"n-gram"}


def test_every_lossless_sampling_rule_meets_every_drafter_it_takes() -> None:
    every = set(world.pairs())
    assert {pair.rule for pair in every} == {name for name, rule in RULES.items() if rule.lossless} - {"greedy"}
    for rule in ("naive", "traversal", "recursive_rejection", "coupled"):
        assert {pair.drafter for pair in every if pair.rule == rule} == set(world.DRAFTERS)
    assert {pair.drafter for pair in every if pair.rule == "block"} == {"chain", "n-gram"}
    assert ("budget_flow", "sampled tree") not in every
    assert ("budget_flow", "mixed tree") in every


def test_pairs_a_rule_is_made_for_get_the_most() -> None:
    assert set(world.HOME) == {pair.rule for pair in world.pairs()}
    assert all(rule in {pair.rule for pair in world.pairs(drafters=[name])} for rule, name in world.HOME.items())


def test_a_run_keeps_to_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is shared by the pairs to come; each draws a text of every setting and batch size in any case."""
    seconds: list[float] = []

    def pretend(pair: world.Pair, amount: Amount) -> Iterator[dict[str, Any]]:
        seconds.append(amount.seconds)
        clock.now += amount.seconds + len(amount.batches) * amount.small_limit
        yield {}

    clock = Clock()
    monkeypatch.setattr("specdec.experiments.laws.run.judge_pair", pretend)
    monkeypatch.setattr("specdec.experiments.laws.run.time.perf_counter", clock)
    assert len(list(judge_pairs(world.pairs()[:10], Amount(), deadline=600.0))) == 10
    assert clock.now == pytest.approx(600.0)
    assert seconds == pytest.approx([42.0] * 10)
    monkeypatch.undo()
    cells = list(judge_pair(world.Pair("block", "chain"), Amount(chunk=40).within(0.0)))
    assert [cell["samples"] for cell in cells] == [80, 2, 6, 34]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_names_that_mean_nothing_are_refused() -> None:
    with pytest.raises(UnsupportedArgumentError, match=r"rules: expected some of .* got \['best'\]"):
        world.pairs(rules=["best"])
    with pytest.raises(UnsupportedArgumentError, match="takes one of the drafters"):
        world.pairs(rules=["block"], drafters=["mixed tree"])


@pytest.mark.parametrize(("setting", "prompt"), list(itertools.product(range(2), range(3))))
def test_the_enumerated_law_is_that_of_a_second_enumeration(setting: int, prompt: int) -> None:
    ids = torch.tensor([world.PROMPTS[prompt]])
    law = exact_law.joint_law(world.target(), ids, torch.ones_like(ids), world.JOINT, **world.SETTINGS[setting])
    assert np.abs(law.numpy().ravel() - joint_law(setting, prompt)).max() < 1e-7


def test_strict_mode_is_compared_with_its_control(tmp_path: Path) -> None:
    strict.main(["--prompts", "4", "--tokens", "4", "--pair-prompts", "0", "--rules", "greedy", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("strict-*.json")
    found = json.loads(path.read_text())["identity"]
    assert {key.split(",")[0] for key in found} == {
        "float32 greedy strict", "float32 greedy distribution", "float32 alone against batches",
        "bfloat16 greedy strict", "bfloat16 greedy distribution", "bfloat16 alone against batches",
    }  # fmt: skip
    for name in ("float32", "bfloat16"):
        texts = found[f"{name} greedy strict, 4 prompts"]
        assert len(texts) == 7
        assert all(way["differing_texts"] == way["differing_logits"] == 0 for way in texts.values())
        assert texts["chain k=4"]["tokens_per_step"] > 1.2
    control = found["float32 greedy distribution, 1 prompts"]
    assert sum(way["differing_logits"] for way in control.values()) >= 5, "the comparison can see a difference"
