"""`specdec.check` passes an honest library and fails every planted bug, by the test that should see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama

import specdec
from specdec import CheckReport, ModelDrafter, NgramDrafter, UnsupportedArgumentError
from specdec.drafters import BestFirst
from specdec.experiments.laws.bugs import (
    AcceptReusesDraftNoise,
    AcceptsAlways,
    DropsResidual,
    FrozenStep,
    StopsAtFirstReject,
)
from specdec.experiments.laws.false_drafters import DropsUnlikelyTokens, TellsRawLaw, TellsRowOfNextPosition
from specdec.kv.shared import SharedKVCache
from specdec.verify.passes import forward
from specdec.verify.rules import RULES

TARGET = tiny_llama(3, vocab=6)
DRAFT = noisy_copy(TARGET, 4, 0.3)
PROMPTS = [[3, 1, 2, 5, 3, 1]]
ROWS = 4_000
"""Decides how long a check takes here; the budget is out of reach."""


def run(draft: Any, **options: Any) -> CheckReport:
    return specdec.check(TARGET, draft, prompts=PROMPTS, budget_s=600, **{"max_rows": ROWS, **options})


def chain(kind: type[ModelDrafter] = ModelDrafter, temperature: float = 1.0) -> ModelDrafter:
    return kind(DRAFT, k=3, temperature=temperature)


def failed(report: CheckReport) -> set[str]:
    return {finding.name for finding in report.findings if finding.status == "FAIL"}


@pytest.mark.parametrize(
    ("draft", "options"),
    [
        (lambda: chain(temperature=0.5), {"rule": "rejection"}),
        (lambda: chain(temperature=0.5), {"rule": "block", "top_p": 0.9}),
        (lambda: ModelDrafter(DRAFT, tree=(2, 2)), {"temperature": 1.4}),
        (lambda: ModelDrafter(DRAFT, tree=(2, 1), children="sampled"), {"rule": "traversal"}),
        (lambda: NgramDrafter(k=3), {"repetition_penalty": 1.3}),
        (chain, {"rule": "coupled"}),
        (lambda: None, {"top_k": 3}),
    ],
    ids=["rejection", "block, top-p", "mixed tree", "sampled tree", "n-gram, penalty", "coupled", "no drafter"],
)
def test_the_honest_library_passes(draft: Any, options: dict[str, Any]) -> None:
    report = run(draft(), **options)
    assert report.passed, report.summary()
    assert report["law of token 1"].status == report["law of every token"].status == "pass"
    assert report.settings["num_rows"] == ROWS
    judged = {f.name for f in report.findings if f.status == "pass"}
    if draft() is not None and options.get("rule") != "coupled":
        assert "accepted | draft" in judged
    if isinstance(draft(), ModelDrafter) and options.get("rule") != "coupled":
        assert {"draft law, p/q", "draft law, q"} <= judged


def test_where_a_race_of_best_first_trees_ends_a_step_is_not_judged() -> None:
    drafter = ModelDrafter(DRAFT, tree=BestFirst(3, 2, 4))
    report = run(drafter, rule="coupled")
    assert report.passed, report.summary()
    assert report["law after step 1"].status == "skipped"
    assert report["law of every token"].status == "pass"
    assert run(drafter)["law after step 1"].status == "pass"  # the same trees without a race


@pytest.mark.parametrize(
    ("bug", "seen_by"),
    [
        (AcceptsAlways, {"accepted | draft", "law of every token"}),
        (DropsResidual, {"law of token 1"}),
        (StopsAtFirstReject, {"accepted | draft"}),
    ],
)
def test_wrong_rules_fail(bug: Any, seen_by: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, bug.name, bug)
    report = run(chain(), rule=bug.name)
    assert seen_by <= failed(report), report.summary()


@pytest.mark.parametrize(
    ("bug", "temperature"), [(TellsRawLaw, 0.5), (TellsRowOfNextPosition, 1.0), (DropsUnlikelyTokens, 1.0)]
)
def test_false_draft_laws_fail(bug: Any, temperature: float) -> None:
    report = run(chain(bug, temperature), rule="rejection")
    assert failed(report) & {"draft law, p/q", "draft law, q"}, report.summary()


def test_noise_shared_by_roles_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.batch.NoiseStream", AcceptReusesDraftNoise)
    assert {"law of token 1", "law of every token"} <= failed(run(chain(), rule="rejection"))


def test_noise_shared_by_steps_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.batch.NoiseStream", FrozenStep)
    report = run(chain(), rule="rejection", max_rows=3 * ROWS)
    assert "law after step 1" in failed(report), report.summary()
    assert report["law of token 1"].status == "pass", "each step's own law is intact"


def test_a_commit_that_moves_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter of chains is audited with a tree as well, or this could not show."""
    original = SharedKVCache.commit
    monkeypatch.setattr(
        SharedKVCache, "commit", lambda self, paths: original(self, [list(range(len(path))) for path in paths])
    )
    report = run(DRAFT, k=3, max_rows=64)
    assert {"K/V cache", "verification logits"} <= failed(report), report.summary()


def test_nodes_at_wrong_positions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    original = forward.nodes_of

    def nodes_of(*given: Any) -> Any:
        nodes = original(*given)
        return nodes and nodes._replace(depths=torch.arange(nodes.depths.shape[1]).expand_as(nodes.depths))

    monkeypatch.setattr(forward, "nodes_of", nodes_of)
    report = run(DRAFT, k=3, max_rows=64)
    assert {"K/V cache", "verification logits"} <= failed(report), report.summary()


def test_a_drafter_that_fails_fails() -> None:
    class Broken(ModelDrafter):
        def propose(self, *given: Any) -> Any:
            raise RuntimeError("planted")

    with pytest.warns(UserWarning, match="planted"):
        report = run(chain(Broken), max_rows=64)
    assert failed(report) == {"drafter"}
    assert "planted" in report["drafter"].detail


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"temperature .*: expected a number > 0"),
        ({"budget_s": 0.0}, "budget_s: expected a number > 0"),
        ({"rule": "typical"}, "lossy by design"),
        ({"rule": "greedy"}, "does not sample"),
        ({"rule": "best"}, "rule: expected one of"),
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["text"]}, "needs the tokenizer"),
        ({"prompts": [[99]]}, r"0\.\.5"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArgumentError, match=message):
        specdec.check(TARGET, DRAFT, **options)
