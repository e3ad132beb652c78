"""`monitor=True` holds acceptance against theory while generating: honest runs stay near zero, faults stand out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from torch import Tensor

from specdec import ModelDrafter, NgramDrafter, Speculator, UnsupportedArgumentError
from specdec.drafters import Budget
from specdec.monitor import Monitor, Watched
from specdec.verify import DraftTree, Noise, Verdict
from specdec.verify.rules import RULES
from specdec.verify.rules.block import Block
from specdec.verify.rules.rejection import Rejection

TARGET = tiny_llama(3, vocab=4)
DRAFT = noisy_copy(TARGET, 4, 0.3)
PROMPT = torch.tensor([[3, 1, 2, 3, 1]])
ROWS = 2_000


def measure(spec: Speculator) -> float:
    spec.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=True, max_new_tokens=8, num_return_sequences=ROWS,
        seed=5, top_k=0,
    )  # fmt: skip
    assert spec.report is not None
    assert spec.report.num_drafter_faults == 0
    assert spec.report.acceptance_z is not None
    return spec.report.acceptance_z


class TellsRawLaw(ModelDrafter):
    """Samples with its temperature, records the law before it."""

    def propose(self, budget: Budget, uniforms: Tensor) -> DraftTree:
        tree = super().propose(budget, uniforms)
        if tree.q is None:
            return tree
        raw = tree.q**self.temperature
        return replace(tree, q=raw / raw.sum(-1, keepdim=True))


def drafter(kind: type[ModelDrafter] = ModelDrafter, **options: Any) -> ModelDrafter:
    return kind(DRAFT, **{"k": 3, "temperature": 0.5, **options})


@pytest.mark.parametrize(
    ("draft", "rule"),
    [
        (drafter, "rejection"),
        (drafter, "block"),
        (drafter, "naive"),
        (drafter, "auto"),
        (lambda: ModelDrafter(DRAFT, tree=(2, 2)), "auto"),
        (lambda: NgramDrafter(k=3), "auto"),
    ],
    ids=["rejection", "block", "naive", "chain auto", "tree auto", "n-gram auto"],
)
def test_honest_acceptance_stays_near_theory(draft: Any, rule: str) -> None:
    assert abs(measure(Speculator(TARGET, draft(), rule=rule, monitor=True))) < 4


@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_a_false_draft_law_stands_out(rule: str) -> None:
    assert abs(measure(Speculator(TARGET, drafter(TellsRawLaw), rule=rule, monitor=True))) > 6


@pytest.mark.parametrize("kind", [Rejection, Block])
def test_a_rule_that_accepts_too_much_stands_out(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Generous(kind):
        def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
            verdict: Verdict = super().__call__(tree, p, noise._replace(accept=noise.accept * 0.8))
            return verdict

    monkeypatch.setitem(RULES, kind.name, Generous)
    assert measure(Speculator(TARGET, drafter(temperature=1.0), rule=kind.name, monitor=True)) > 10


def test_a_monitor_of_ones_own_sees_every_step_and_changes_nothing() -> None:
    class Counting(Monitor):
        decisions = steps = 0

        def decided(self, *given: Any) -> None:
            self.decisions += 1

        def stepped(self, loop: Watched) -> None:
            self.steps += 1
            assert loop.cache.lengths[0] == loop.rows.num_tokens[0] - 1

    watching = Counting()
    spec = Speculator(TARGET, drafter(), monitor=watching)
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 8, "top_k": 0}
    out = spec.generate(PROMPT, do_sample=True, seed=3, **arguments)
    assert spec.report is not None
    assert (watching.decisions, watching.steps) == (spec.report.num_steps,) * 2
    assert torch.equal(out, Speculator(TARGET, drafter()).generate(PROMPT, do_sample=True, seed=3, **arguments))  # type: ignore[arg-type]
    spec.generate(PROMPT, do_sample=False, **{k: v for k, v in arguments.items() if k != "top_k"})
    assert watching.decisions < watching.steps, "greedy decoding takes no random decision"


def test_unmonitored_and_greedy_calls_report_nothing() -> None:
    for monitor, sampling in ((False, True), (True, False)):
        spec = Speculator(TARGET, drafter(), monitor=monitor)
        spec.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=sampling, max_new_tokens=4, seed=1)
        assert spec.report is not None
        assert spec.report.acceptance_z is None
        assert "theory" not in spec.report.summary()


def test_the_report_shows_it() -> None:
    spec = Speculator(TARGET, drafter(), monitor=True)
    measure(spec)
    assert spec.report is not None
    assert "acceptance vs theory" in spec.report.summary()
    assert spec.report.to_dict()["acceptance_z"] == spec.report.acceptance_z


def test_what_is_no_monitor_is_refused() -> None:
    with pytest.raises(UnsupportedArgumentError, match="expected True, False or a Monitor"):
        Speculator(TARGET, drafter(), monitor="yes")  # type: ignore[arg-type]
