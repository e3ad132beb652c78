"""The lab's audits one by one: near-ties told from bugs, edges of filters excused, laws and reports checked."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from exact_law import next_laws, noisy_copy, tiny_llama
from torch import Tensor

import specdec
from specdec.lab.findings import CheckReport, Finding
from specdec.lab.greedy import GreedyAudit, kernel_noise
from specdec.lab.laws import Draws, LawTests
from specdec.lab.reference import Reference, places

TARGET = tiny_llama(3, vocab=8, layers=2).float()
PROMPT = torch.tensor([[3, 1, 2, 5, 3, 1]])


class Diverging:
    """Stands for a Speculator whose greedy text is plain generation's up to `column`, where it emits `token`."""

    def __init__(self, target: Any, column: int, token: int, cut: bool = False):
        self.target, self.column, self.token, self.cut = target, column, token, cut

    def generate(self, prompt: Tensor, **arguments: Any) -> Tensor:
        out: Tensor = type(self.target).generate(self.target, prompt, **arguments)
        if self.cut:
            return out[:, : self.column]
        out[0, self.column] = self.token
        return out


def best_two(target: Any, column: int) -> tuple[list[int], float]:
    text = type(target).generate(target, PROMPT, max_new_tokens=12, do_sample=False)[:, :column]
    best = target(text).logits[0, -1].topk(2)
    return best.indices.tolist(), float(best.values[0] - best.values[1])


def audit(spec: Any) -> GreedyAudit:
    found = GreedyAudit(spec, width=4, new_tokens=12)
    found.add(0, PROMPT)
    return found


def tied_target() -> Any:
    """The two best tokens after some prefix differ by less than rounding: one output row is a copy of the other's."""
    target = tiny_llama(3, vocab=8, layers=2).float()
    (best, _), _ = best_two(target, 9)
    other = (best + 1) % 8
    with torch.no_grad():
        weight: Any = target.lm_head.weight
        weight[other] = weight[best]
        weight[other, 0] += 1e-8
    return target, best, other


@torch.no_grad()
def test_a_near_tie_passes_and_is_reported() -> None:
    target, best, other = tied_target()
    text = type(target).generate(target, PROMPT, max_new_tokens=12, do_sample=False)
    column = next(c for c in range(PROMPT.shape[1], text.shape[1]) if int(text[0, c]) in (best, other))
    swapped = other if int(text[0, column]) == best else best
    found = audit(Diverging(target, column, swapped))
    assert found.divergences[0].near_tie
    assert found.finding().status == "pass"
    assert "near-tie" in found.finding().detail


@torch.no_grad()
def test_a_clear_difference_is_a_bug() -> None:
    (_, second), gap = best_two(TARGET, 9)
    found = audit(Diverging(TARGET, 9, second))
    assert (found.divergences[0].position, found.divergences[0].our_token) == (3, second)
    assert found.divergences[0].gap == pytest.approx(gap, rel=1e-3)
    assert found.finding().status == "FAIL"


def test_a_text_that_ends_early_is_a_bug() -> None:
    assert audit(Diverging(TARGET, 9, 0, cut=True)).finding().status == "FAIL"


def test_equal_texts_pass_and_noise_is_small_but_never_zero() -> None:
    found = audit(specdec.Speculator(TARGET, noisy_copy(TARGET, 1), k=3))
    assert found.finding().status == "pass"
    assert found.compared == 12
    assert 0 < kernel_noise(TARGET, PROMPT, 4) < 1e-4
    assert 0 < found.noise < 1e-4


@torch.no_grad()
def test_the_reference_is_a_plain_pass_over_the_whole_text() -> None:
    sampling = {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.4}
    reference = Reference(TARGET, PROMPT, sampling)
    tails = torch.tensor([[1, 2, 3], [7, 7, 0]])
    mask = torch.ones_like(PROMPT)
    for position in reference.along(tails):
        wanted = next_laws(TARGET, PROMPT, mask, tails[:, : position.place], **sampling)
        torch.testing.assert_close(position.law, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reference.first(), next_laws(TARGET, PROMPT, mask, tails[:1, :0], **sampling)[0])


def test_places_are_uniform_for_tokens_of_the_law_ties_included() -> None:
    law = torch.tensor([0.2, 0.2, 0.5, 0.1, 0.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.multinomial(law, 40_000, replacement=True, generator=generator)
    found = places(law.expand(40_000, -1), tokens, torch.rand(40_000, generator=generator, dtype=torch.float64))
    assert 0 <= float(found.min())
    assert float(found.max()) < 1
    for edge in (0.1, 0.3, 0.5, 0.7, 0.95):
        assert float((found < edge).double().mean()) == pytest.approx(edge, abs=0.012)
    assert places(law[None], torch.tensor([4]), torch.zeros(1, dtype=torch.float64)).item() == 1.0


def judged(target: Any, token: int, **sampling: Any) -> LawTests:
    tests = LawTests(target, [PROMPT], {"top_k": 1, **sampling}, noise=1e-6, seed=0)
    rows = torch.full((50, 1), token)
    tests.add(0, Draws(rows, torch.ones(50, dtype=torch.int64), torch.ones(50, dtype=torch.int64)))
    return tests


def test_a_filter_s_edge_between_equal_scores_is_excused_and_nothing_else() -> None:
    target = tiny_llama(3, vocab=8, layers=2).float()
    with torch.no_grad():
        logits: Any = target(PROMPT).logits[0, -1]
        best = int(logits.argmax())
        other = (best + 1) % 8
        weight: Any = target.lm_head.weight
        weight[other] = weight[best]
        weight[other] *= 1 - 1e-8
        weight[other, 0] -= 1e-8 * float(weight[other, 0].sign())
        first = int(target(PROMPT).logits[0, -1].argmax())
    second = other if first == best else best
    excused = judged(target, second)
    assert excused.excused + excused.tokens >= 50
    assert excused.impossible == 0
    wrong = judged(target, (other + 1) % 8)
    assert (wrong.impossible, wrong.excused) == (50, 0)
    assert {f.name for f in wrong.findings(1e-7) if f.status == "FAIL"} >= {"impossible tokens"}


def test_texts_that_end_count_up_to_their_end() -> None:
    """An end token in the middle: what follows is padding, on both sides of the two-sample test."""
    target = tiny_llama(5, vocab=5)
    report = specdec.check(
        target, noisy_copy(target, 2, 0.3), k=2, prompts=[[1, 2, 3]], max_rows=2000, budget_s=600, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    assert report.passed, report.summary()
    assert report.settings["num_tokens"] < 2000 * 5


def test_strict_mode_can_be_checked() -> None:
    report = specdec.check(
        TARGET, noisy_copy(TARGET, 2), k=2, prompts=[PROMPT], max_rows=64, budget_s=600, exactness="strict"
    )
    assert report.passed, report.summary()


def test_a_report_speaks() -> None:
    good = Finding("a", "pass", "fine", {"z": float("inf")})
    report = CheckReport((good, Finding("b", "FAIL", "wrong")), {"seed": 1})
    assert not report.passed
    assert "FAILED: b" in report.summary()
    assert json.loads(json.dumps(report.to_dict()))["findings"][0]["figures"] == {"z": "inf"}
    assert report["a"] is good
    with pytest.raises(KeyError, match="expected one of"):
        report["c"]
    assert CheckReport((good,), {}).passed


def test_progress_only_grows() -> None:
    seen: list[float] = []
    specdec.check(TARGET, None, max_rows=100, budget_s=600, progress=lambda share, what: seen.append(share))
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
