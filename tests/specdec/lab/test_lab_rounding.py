"""Near-ties and bugs in 16 bits: what rounding explains is measured on the model, and what it does not is found."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from test_lab_audits import Diverging

import specdec
from specdec.lab.greedy import MARGIN, GreedyAudit, gap_noise, last_logits
from specdec.lab.kv import LogitAudit
from specdec.lab.rounding import nudged, nudged_logits
from specdec.verify.native.library import why_not
from specdec.verify.passes import native
from specdec.verify.passes.native_weights import NativeWeights
from specdec.verify.passes.parameters import Parameters

PROMPT = models.prompts((9,), models.VOCAB, 3)[0]
NEW = 24


def plain_text(target: Any) -> torch.Tensor:
    arguments = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": NEW, "do_sample": False}
    text: torch.Tensor = type(target).generate(target, PROMPT, eos_token_id=None, pad_token_id=0, **arguments)
    return text


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_passes_that_differ_by_rounding_differ_by_what_is_measured(dtype: str) -> None:
    target: Any = models.target("llama-gqa", dtype)
    text = plain_text(target)
    whole = target(text).logits[0].double()
    steps = torch.stack([last_logits(target, text[:, : i + 1], 1) for i in range(text.shape[1])]).double()
    moved = (nudged_logits(target, text, text.shape[1])[:, 0].double() - whole).square().mean().sqrt()
    assert float((steps - whole).square().mean().sqrt()) < 3 * float(moved)
    size = float(whole.abs().max()) * torch.finfo(target.dtype).eps
    assert 0.1 * size < float(moved) < 20 * size


def test_nudging_leaves_nothing_behind() -> None:
    target: Any = models.target("llama-gqa", "bf16")
    before = target(PROMPT).logits
    with nudged(target, 0):
        assert not torch.equal(target(PROMPT).logits, before)
    assert torch.equal(target(PROMPT).logits, before)
    assert not any(part._forward_hooks for part in target.modules())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@torch.no_grad()
def test_a_near_tie_is_named_and_a_clear_choice_is_a_bug(dtype: str) -> None:
    target: Any = models.target("llama-gqa", dtype)
    text = plain_text(target)
    choices = []
    for column in range(PROMPT.shape[1], text.shape[1]):
        scores, tokens = last_logits(target, text[:, :column], 1).float().topk(8)
        gaps = (scores[0] - scores).tolist()
        choices += [(gaps[i], column, int(tokens[0]), int(tokens[i])) for i in range(1, 8) if gaps[i] > 0]
    found: dict[bool, GreedyAudit] = {}
    for near_tie, (gap, column, best, other) in ((True, min(choices)), (False, max(choices))):
        noise = gap_noise(target, text[:, :column], (best, other), 4, lambda ids, given: given)
        assert gap < MARGIN / 2 * noise if near_tie else gap > 2 * MARGIN * noise
        found[near_tie] = GreedyAudit(Diverging(target, column, other), 4, NEW)  # type: ignore[arg-type]
        found[near_tie].add(0, PROMPT)
    assert found[True].finding().status == "pass"
    assert "near-tie" in found[True].finding().detail
    assert found[False].finding().status == "FAIL"
    assert "BUG" in found[False].finding().detail
    told = found[True].finding().figures["divergences"][0]
    assert told["near_tie"]
    assert told["gap"] <= MARGIN * told["noise"]


@pytest.mark.skipif(why_not() is not None, reason="the error is planted in a native pass")
@pytest.mark.parametrize(("dtype", "scale"), [("fp32", 1.00001), ("bf16", 1.5), ("fp16", 1.05)])
def test_a_wrong_scale_in_one_layer_is_found(dtype: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves scores by some ten times what rounding does; the honest pass is the control."""
    target: Any = models.target("llama-gqa", dtype)

    class Wrong(NativeWeights):
        def __init__(self, own: Parameters, *copies: Any):
            own.layers[1].after.factor = own.layers[1].after.factor * scale
            super().__init__(own, *copies)

    def audited() -> LogitAudit:
        audit = LogitAudit()
        audit.add(specdec.Speculator(target, "ngram", k=3), PROMPT, 2, NEW, 0.0, do_sample=False)
        return audit

    assert audited().finding().status == "pass"
    monkeypatch.setattr(native, "NativeWeights", Wrong)
    found = audited().finding()
    assert found.status == "FAIL"
    assert found.figures["difference"] < 60 * found.figures["noise"]
    report = specdec.check(target, "ngram", k=3, prompts=[PROMPT[0].tolist()], budget_s=600, max_rows=8)
    assert not report.passed
    assert report["verification logits"].status == "FAIL"
