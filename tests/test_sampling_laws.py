"""The emitted text follows the target's law exactly: real generate(), exact enumeration, tests with known power."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exact_law import joint_law, noisy_copy, tiny_llama
from law_checks import check_acceptance, check_joint_law, check_second_step
from stats import ALPHA, POWER, TV, g_test, judge, required_samples, samples_for

from specdec import ModelDrafter, NgramDrafter, Speculator

TARGET = tiny_llama(0)
DRAFT = noisy_copy(TARGET, 1)
PROMPT = torch.tensor([[3, 5, 1, 6, 3, 5]])  # repeats itself, so that n-grams are found
NO_TOP_K: dict[str, Any] = {"top_k": 0}
COMBINED: dict[str, Any] = {
    "temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.4,
}  # fmt: skip


def chain(k: int = 3, temperature: float = 1.0) -> ModelDrafter:
    return ModelDrafter(DRAFT, k=k, temperature=temperature)


def tree(*widths: int) -> ModelDrafter:
    return ModelDrafter(DRAFT, tree=widths)


CASES = {
    "temperature, chain, auto": (chain, "auto", {**NO_TOP_K, "temperature": 0.6}),
    "top-k, chain, rejection": (chain, "rejection", {"top_k": 3}),
    "top-p, chain with its own temperature, block": (lambda: chain(2, 1.6), "block", {**NO_TOP_K, "top_p": 0.7}),
    "min-p, tree, auto": (lambda: tree(2, 2), "auto", {**NO_TOP_K, "min_p": 0.2}),
    "repetition penalty, chain, block": (chain, "block", {"top_k": 3, "repetition_penalty": 1.6}),
    "combined, tree, naive": (lambda: tree(3, 1), "naive", COMBINED),
    "combined, cold chain, rejection": (lambda: chain(3, 0.5), "rejection", COMBINED),
    "top-k, chain, naive": (chain, "naive", {"top_k": 3, "temperature": 1.5}),
    "top-k, n-gram chain, auto": (lambda: NgramDrafter(k=4), "auto", {"top_k": 3}),
    "top-k, n-gram chain, rejection": (lambda: NgramDrafter(k=3), "rejection", {"top_k": 3}),
    "top-p, n-gram branches, naive": (lambda: NgramDrafter(k=3, branches=2), "naive", {**NO_TOP_K, "top_p": 0.7}),
    "top-k with an end token, chain, block": (chain, "block", {"top_k": 3, "eos_token_id": 6}),
}
SLOW = {"combined, cold chain, rejection", "top-k, n-gram chain, rejection", "top-k, chain, naive"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES])
def test_joint_law_of_first_tokens(name: str) -> None:
    drafter, rule, sampling = CASES[name]
    check_joint_law(Speculator(TARGET, drafter(), rule=rule), PROMPT, **sampling)


@pytest.mark.parametrize(
    ("drafter", "rule", "sampling"),
    [
        (chain, "rejection", NO_TOP_K),
        (chain, "block", NO_TOP_K),
        (lambda: tree(2, 2), "naive", NO_TOP_K),
        (lambda: NgramDrafter(k=4), "block", NO_TOP_K),
    ],
    ids=["chain, rejection", "chain, block", "tree, naive", "n-gram, block"],
)
def test_second_step_ignores_the_noise_of_the_first(drafter: Any, rule: str, sampling: dict[str, Any]) -> None:
    check_second_step(Speculator(TARGET, drafter(), rule=rule), PROMPT, 12_000, **sampling)


@pytest.mark.parametrize(
    ("drafter", "rule"),
    [
        (chain, "rejection"),
        (chain, "block"),
        (chain, "naive"),
        (lambda: tree(2, 2), "naive"),
        (lambda: NgramDrafter(k=4), "block"),
    ],
    ids=["chain, rejection", "chain, block", "chain, naive", "tree, naive", "n-gram, block"],
)
def test_accepted_tokens_match_the_theory_of_the_very_draft(drafter: Any, rule: str) -> None:
    check_acceptance(Speculator(TARGET, drafter(), rule=rule), PROMPT, 12_000, **NO_TOP_K)


def test_joint_law_of_a_left_padded_batch() -> None:
    prompts = torch.tensor([[3, 5, 1, 6, 3, 5], [0, 0, 7, 4, 4, 2], [0, 0, 0, 0, 0, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    check_joint_law(Speculator(TARGET, chain()), prompts, mask, top_k=2, temperature=1.5)


@pytest.mark.slow
def test_joint_law_of_a_left_padded_batch_with_everything() -> None:
    prompts = torch.tensor([[3, 5, 1, 6, 3, 5], [0, 0, 7, 4, 4, 2], [0, 0, 0, 0, 0, 6]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    sampling = {"top_k": 3, "temperature": 1.2, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3}
    check_joint_law(Speculator(TARGET, tree(2, 1), rule="naive"), prompts, mask, **sampling)


@pytest.mark.parametrize(
    "drafter", [chain, lambda: tree(2, 2), lambda: NgramDrafter(k=4)], ids=["chain", "tree", "n-gram"]
)
def test_batch_of_one_draws_the_rows_of_the_judged_batch(drafter: Any) -> None:
    """The law of a batch of one is that of the big batches above, because it is the same function of the seed."""
    spec = Speculator(TARGET, drafter())
    prompts = PROMPT.expand(60, -1)
    together = spec.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        max_new_tokens=12,
        seed=list(range(60)),
        **COMBINED,
    )
    for row in range(60):
        alone = spec.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=True, max_new_tokens=12, seed=row, **COMBINED
        )
        assert torch.equal(alone[0], together[row])
    assert len({tuple(row) for row in together.tolist()}) > 50


@pytest.mark.slow
def test_every_draw_of_a_smaller_vocabulary_alone() -> None:
    """Batches of one, judged directly: two tokens of three, one call per sample."""
    target = tiny_llama(5, vocab=3)
    spec = Speculator(target, ModelDrafter(noisy_copy(target, 6, 0.3), k=2))
    prompt = torch.tensor([[1, 2]])
    mask = torch.ones_like(prompt)
    counts = torch.zeros(3, 3)
    for seed in range(1500):
        out = spec.generate(prompt, attention_mask=mask, do_sample=True, max_new_tokens=2, seed=seed, top_k=0)
        counts[int(out[0, 2]), int(out[0, 3])] += 1
    judge(g_test(counts.numpy(), joint_law(target, prompt, mask, 2, top_k=0).numpy()), "1500 batches of one")


def test_the_tests_have_the_power_they_promise() -> None:
    """Tilt a law by exactly TV in the direction hardest to see; the G-test must refuse it as often as promised."""
    law = joint_law(TARGET, PROMPT, torch.ones_like(PROMPT), 3, top_k=3).numpy().ravel()
    law = law[law > 0]
    half = np.argsort(law)[::2]
    tilted = law.copy()
    tilted[half] += TV * law[half] / law[half].sum()
    rest = np.setdiff1d(np.arange(len(law)), half)
    tilted[rest] -= TV * law[rest] / law[rest].sum()
    assert abs(abs(tilted - law).sum() / 2 - TV) < 1e-12
    draws = np.random.default_rng(0).multinomial(samples_for(law), tilted, size=400)
    assert np.mean([g_test(row, law).p_value < ALPHA for row in draws]) >= POWER - 0.02
    honest = np.random.default_rng(1).multinomial(samples_for(law), law, size=400)
    assert 0.2 < np.mean([g_test(row, law).p_value < 0.5 for row in honest]) < 0.8


def test_sample_sizes_grow_with_the_cells() -> None:
    assert 30_000 < required_samples(1) < required_samples(26) < required_samples(511) < 200_000
