"""NaN at nodes that plain decoding never visits costs time, not the output: whole levels are decoded again."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from exact_law import joint_law, noisy_copy, tiny_llama
from stats import LawMismatch, g_test, judge
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import specdec
from specdec import NgramDrafter, Speculator, TargetFaultError
from specdec.target import TargetPasses
from specdec.verify import DraftTree

MODEL = tiny_llama(0, layers=2)
DRAFT = noisy_copy(MODEL, 1, noise=0.3)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5], [0, 0, 7, 4, 4, 2]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


def poisoned(token: int) -> Any:
    """The target, except that it answers NaN wherever it has read `token`."""
    model = copy.deepcopy(MODEL)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    return model


@pytest.mark.parametrize("shape", [{"tree": (3, 2)}, {"tree": (4, 2, 1)}, {"k": 3}], ids=str)
def test_greedy_text_is_plain_decodings(shape: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "attention_mask": REAL,
        "do_sample": False,
        "max_new_tokens": 14,
        "suppress_tokens": [1],
    }
    plain: Any = MODEL
    wanted = plain.generate(PROMPT, **arguments)
    arguments["suppress_tokens"] = None
    target = poisoned(1)
    target.generation_config.suppress_tokens = None

    class Suppress(torch.nn.Module):
        """The target's head, never in favour of the poisoned token; the drafter may well propose it."""

        def __init__(self, head: torch.nn.Module):
            super().__init__()
            self.head = head

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(x)
            return torch.cat([out[..., :1], out[..., 1:2] - 1e4, out[..., 2:]], dim=-1)

    target.lm_head = Suppress(target.lm_head)
    spec = Speculator(target, DRAFT, **shape)
    out: Any = spec.generate(PROMPT, **arguments)
    assert torch.equal(wanted, out)
    assert spec.report is not None
    if "tree" in shape:
        assert any("NaN" in note for note in spec.report.notes), "the drafter never proposed the poisoned token"


@pytest.mark.parametrize("branches", [1, 2])
def test_nan_that_processors_make_is_taken_as_plain_greedy_decoding_takes_it(branches: int) -> None:
    @specdec.pure
    class Spoiling(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            spoiled = torch.arange(scores.shape[1]) == 2 + input_ids[:, -1:] % 3
            return scores.masked_fill(spoiled & (input_ids[:, -1:] % 2 == 0), float("nan"))

    arguments: dict[str, Any] = {"attention_mask": REAL, "do_sample": False, "max_new_tokens": 14}
    arguments["logits_processor"] = LogitsProcessorList([Spoiling()])
    plain: Any = MODEL
    wanted = plain.generate(PROMPT, **arguments)
    assert not torch.equal(wanted, plain.generate(PROMPT, **{**arguments, "logits_processor": None}))
    out: Any = Speculator(MODEL, NgramDrafter(k=3, branches=branches)).generate(PROMPT, **arguments)
    assert torch.equal(wanted, out)


def test_trees_in_no_level_order_are_dropped() -> None:
    """An n-gram tree lists branch after branch: no level can be cut off."""
    text = torch.tensor([[3, 1, 4, 3, 5, 2, 3, 6, 4, 3]])
    drafter = NgramDrafter(k=3, branches=3, max_ngram=1)
    spec = Speculator(MODEL, drafter)
    wanted: Any = spec.generate(text, do_sample=False, max_new_tokens=12)

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        nodes = output.logits.shape[1]
        if nodes in (1, text.shape[1] - 1):  # the root alone, and the prefill
            return None
        output.logits = output.logits * float("nan")
        return output

    handle = MODEL.register_forward_hook(spoil)
    try:
        out: Any = spec.generate(text, do_sample=False, max_new_tokens=12)
    finally:
        handle.remove()
    assert torch.equal(wanted, out)
    assert spec.report is not None
    assert any("NaN" in note for note in spec.report.notes)


SHORT = torch.tensor([[5, 6]])
POISON = 3
"""After SHORT the drafter proposes this token six times as often as the target would."""


def drawn(calls: int) -> tuple[np.ndarray, np.ndarray]:
    """First tokens of many sampled calls, and their exact law. A call faults just when its first token is POISON."""
    spec = Speculator(poisoned(POISON), DRAFT, k=2)
    counts = np.zeros(8, dtype=np.int64)
    for seed in range(calls):
        try:
            out: Any = spec.generate(SHORT, do_sample=True, top_k=0, max_new_tokens=2, seed=seed)
            counts[int(out[0, SHORT.shape[1]])] += 1
        except TargetFaultError:
            counts[POISON] += 1
    return counts, joint_law(MODEL, SHORT, torch.ones_like(SHORT), 1, top_k=0).numpy()


def test_sampled_text_keeps_its_law() -> None:
    counts, law = drawn(1500)
    judge(g_test(counts, law), "first token beside a poisoned one")


def test_dropping_the_draft_instead_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def drop(self: TargetPasses, tree: DraftTree) -> tuple[DraftTree, Tensor]:
        return self.afresh(DraftTree.root_only(tree.tokens[:, 0]))

    monkeypatch.setattr(TargetPasses, "healthy_part", drop)
    counts, law = drawn(1500)
    with pytest.raises(LawMismatch):
        judge(g_test(counts, law), "first token when drafts are withdrawn because of what they are")
