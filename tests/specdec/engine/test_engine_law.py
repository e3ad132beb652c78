"""Shared draft budgets leave the law of sampled texts alone; a budget that looked at the draws would not."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from exact_law import joint_law, noisy_copy, tiny_llama
from stats import ALPHA, POWER, LawMismatch, g_test, judge

from specdec.engine import Engine
from specdec.engine.costs import StepCosts
from specdec.engine.lane import Lane
from specdec.lab.stats import required_samples
from specdec.verify import DraftTree

TARGET = tiny_llama(0)
PROMPT = [3, 5, 2, 6]
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0}
VISIBLE = 0.08
"""Total variation that must show."""


@pytest.fixture(autouse=True)
def moody_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that change at every look: all depths are drafted, by turns, whatever this machine's times are."""
    rng = random.Random(0)
    monkeypatch.setattr(StepCosts, "cost", lambda self, tokens, levels: rng.uniform(1.0, 2.0))


def observed_law(samples: int, seed: int, **options: Any) -> np.ndarray:
    """Counts of the first two tokens of unseeded requests, which the engine may draft for as it likes."""
    torch.manual_seed(seed)
    engine = Engine(TARGET, noisy_copy(TARGET, 4), num_pages=2000, page_size=4, max_rows=128, max_step_tokens=1200,
                    max_waiting=samples, **options)  # fmt: skip
    counts = np.zeros((8, 8))
    handles = []
    for _ in range(samples):
        handles.append(engine.submit(PROMPT, max_new_tokens=3, **SAMPLING))
    engine.run()
    for handle in handles:
        first, second, _ = handle.result().token_ids
        counts[first, second] += 1
    metrics = engine.metrics()
    assert 1.0 < metrics.num_draft_tokens / metrics.num_drafts < 1.9  # both depths of drafts
    return counts


def judge_engine(seed: int) -> None:
    ids = torch.tensor([PROMPT])
    law = joint_law(TARGET, ids, torch.ones_like(ids), 2, **SAMPLING).numpy()
    samples = required_samples(law.size - 1, VISIBLE, ALPHA, POWER)
    judge(g_test(observed_law(samples, seed, k=2).flatten(), law.flatten()), "two tokens of an engine's texts")


@pytest.mark.slow
def test_the_law_of_texts_with_shared_budgets() -> None:
    judge_engine(1)


@pytest.mark.slow
def test_a_budget_that_looks_at_the_draws_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: withdrawing a drawn token because the drafter finds it unlikely biases the text (B.5)."""
    propose = Lane.propose

    def anticipating(self: Lane, *given: Any) -> DraftTree:
        tree = propose(self, *given)
        if tree.q is None or tree.tokens.shape[1] < 2:
            return tree
        mass = tree.q[:, 0].gather(1, tree.tokens[:, 1:2])[:, 0]
        return replace(tree, num_nodes=torch.where(mass < 0.3, 1, tree.num_nodes))

    monkeypatch.setattr(Lane, "propose", anticipating)
    with pytest.raises(LawMismatch):
        judge_engine(1)
