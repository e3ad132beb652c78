"""Sampled texts of a target that drafts for itself follow its law, with every form; a lie about q is caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import law_checks
import pytest
import torch
from exact_law import tiny_llama
from law_checks import check_acceptance, check_joint_law, check_second_step, must_be_caught
from torch import Tensor

from specdec import Speculator
from specdec.drafters.self_draft import SelfDrafter
from specdec.verify import DraftTree

TARGET = tiny_llama(0, layers=2)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])
FORMS = ("int8", "int4", "exit1", "skip0", "hot50", "wanda50")
TEXTS = [PROMPT[0], PROMPT[0].flip(0)]
RAGGED = torch.tensor([[3, 5, 2, 6, 3, 5], [0, 0, 7, 4, 4, 2]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _four_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token is never drafted (that step reads the prompt), the last needs no draft: two remain."""
    monkeypatch.setattr(law_checks, "NEW", 4)


@pytest.mark.parametrize("form", FORMS)
def test_joint_law_of_the_first_tokens(form: str) -> None:
    spec = Speculator(TARGET, SelfDrafter(TARGET, form, k=3, calibration=TEXTS))
    check_joint_law(spec, PROMPT, top_k=2, temperature=1.5)
    assert spec.report is not None
    assert spec.report.num_draft_tokens > 0


@pytest.mark.parametrize("form", ["exit1"])
def test_joint_law_of_a_tree_in_a_padded_batch(form: str) -> None:
    spec = Speculator(TARGET, SelfDrafter(TARGET, form, tree=(2, 1), calibration=TEXTS), rule="naive")
    check_joint_law(spec, RAGGED, REAL, top_k=2, temperature=1.5)


def test_the_second_step_ignores_the_noise_of_the_first() -> None:
    spec = Speculator(TARGET, SelfDrafter(TARGET, "exit1", k=3), rule="block")
    check_second_step(spec, PROMPT, 8_000, top_k=0)


def test_accepted_tokens_match_the_theory_of_the_very_draft() -> None:
    spec = Speculator(TARGET, SelfDrafter(TARGET, "exit1", k=3), rule="block")
    check_acceptance(spec, PROMPT, 8_000, top_k=0)


class Lying(SelfDrafter):
    """Says of its tokens that they came from a flatter law than they did."""

    def propose(self, budget: Any, uniforms: Tensor) -> DraftTree:
        tree = super().propose(budget, uniforms)
        if tree.q is None:
            return tree
        flat = tree.q.sqrt()
        return replace(tree, q=flat / flat.sum(-1, keepdim=True))


@pytest.mark.parametrize("form", ["int8", "exit1"])
def test_a_drafter_that_misstates_its_law_is_caught(form: str) -> None:
    with must_be_caught():
        check_joint_law(Speculator(TARGET, Lying(TARGET, form, k=3)), PROMPT, top_k=2, temperature=1.5)
