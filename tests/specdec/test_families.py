"""Families: for every class listed in docs/models.md, drafted text and logits are those of plain `generate`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from families import NAMES, small_model
from models import noisy_copy

from specdec import Speculator, UnsupportedModelError
from specdec.kv import TargetFaultError, support
from specdec.verify import selfcheck

BOTH_WAYS = ("MegatronBertForCausalLM", "RemBertForCausalLM")
"""Their masks are not causal in transformers 5.17; where that is so, they are refused."""
KNOWN = frozenset(dir(tf))
"""Classes this release has; asking for one would import its module already while tests are collected."""
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # GPTBigCode before 5.18

IDS = torch.tensor([[0, 0, 0, 5, 9, 23, 41, 9, 23], [33, 8, 17, 52, 8, 17, 40, 8, 17]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
NEW = 10
TOLERANCE = 1e-4
"""Of logits: many models compute norms in float32 whatever their dtype."""


def compare(model: Any) -> None:
    """Plain and drafted generation of a padded batch, token by token as far as their texts agree."""
    options: dict[str, Any] = dict(
        attention_mask=MASK, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0,
    )  # fmt: skip
    plain = model.generate(IDS, **options)
    for draft, shape in ((noisy_copy(model, 0.02), {"tree": (3, 2)}), ("ngram", {"k": 3})):
        spec = Speculator(model, draft, **shape)
        ours: Any = spec.generate(IDS, **options)
        assert spec.report is not None
        assert spec.report.num_drafter_faults == 0, spec.report.last_drafter_fault
        for row in range(IDS.shape[0]):
            for step in range(NEW):
                end = IDS.shape[1] + step
                wanted, found = plain.logits[step][row].double(), ours.logits[step][row].double()
                torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
                best = wanted.topk(2).values
                if ours.sequences[row, end] != plain.sequences[row, end]:
                    assert best[0] - best[1] < TOLERANCE, f"{draft}: another token at step {step} of row {row}"
                    break


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name in KNOWN])
def test_text_is_plain_generations(name: str) -> None:
    model = small_model(name)
    if name in BOTH_WAYS and not hasattr(sys.modules[type(model).__module__], "create_causal_mask"):
        with pytest.raises(UnsupportedModelError, match="attend to later ones"):
            Speculator(model, "ngram")
        return
    compare(model)


REFUSED = ("DogeForCausalLM", "GitForCausalLM", "MoshiForCausalLM", "PaliGemmaForConditionalGeneration",
           "Kosmos2_5ForConditionalGeneration", "MllamaForCausalLM")  # fmt: skip


TRIED = REFUSED[:4]
"""Those that are told by what they compute."""


@pytest.mark.parametrize("name", [name for name in REFUSED if name in KNOWN])
def test_what_would_differ_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        Speculator(small_model(name), "ngram")


@pytest.mark.parametrize("name", ["DogeForCausalLM", "GitForCausalLM"])
def test_the_comparison_finds_such_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    monkeypatch.setattr(support, "_UNSUPPORTED_TYPES", {})
    monkeypatch.setattr(selfcheck, "is_tested", lambda model: True)
    with pytest.raises((AssertionError, TargetFaultError)):
        compare(small_model(name))


@pytest.mark.parametrize("name", [name for name in TRIED if name in KNOWN])
def test_the_trial_refuses_such_models_by_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written down about a class only makes the message better."""
    monkeypatch.setattr(support, "_UNSUPPORTED_TYPES", {})
    with pytest.raises(UnsupportedModelError, match="trial over a few tokens"):
        Speculator(small_model(name), "ngram")


def test_the_page_lists_exactly_what_is_tested() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    listed = re.search(r"\n\| family \| classes \|\n\|---\|---\|\n(.*?)\n\n", page, re.S)
    assert listed is not None
    names = re.findall(r"`(\w+)`", listed[1])
    assert sorted(names) == list(NAMES)
    assert len(names) > 80
