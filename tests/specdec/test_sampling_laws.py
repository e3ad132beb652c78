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
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])  # repeats itself, so that n-grams are found
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


DRAFTED = pytest.mark.parametrize(
    ("drafter", "rule"),
    [
        pytest.param(chain, "rejection", id="chain, rejection"),
        pytest.param(chain, "block", id="chain, block"),
        pytest.param(chain, "naive", id="chain, naive"),
        pytest.param(lambda: tree(2, 2), "naive", id="tree, naive"),
        pytest.param(lambda: NgramDrafter(k=3), "block", id="n-gram, block"),
    ],
)


@DRAFTED
def test_second_step_ignores_the_noise_of_the_first(drafter: Any, rule: str) -> None:
    check_second_step(Speculator(TARGET, drafter(), rule=rule), PROMPT, 8_000, **NO_TOP_K)


@DRAFTED
def test_accepted_tokens_match_the_theory_of_the_very_draft(drafter: Any, rule: str) -> None:
    check_acceptance(Speculator(TARGET, drafter(), rule=rule), PROMPT, 8_000, **NO_TOP_K)


RAGGED = torch.tensor([[3, 5, 2, 6, 3, 5], [0, 0, 7, 4, 4, 2], [0, 0, 0, 0, 0, 6]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])


def test_joint_law_of_a_left_padded_batch() -> None:
    check_joint_law(Speculator(TARGET, chain()), RAGGED, REAL, top_k=2, temperature=1.5)


@pytest.mark.slow
def test_joint_law_of_a_left_padded_batch_with_everything() -> None:
    sampling: dict[str, Any] = {"top_k": 2, "temperature": 1.2, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3}
    check_joint_law(Speculator(TARGET, tree(2, 1), rule="naive"), RAGGED, REAL, **sampling)


@pytest.mark.parametrize(
    "drafter",
    [
        pytest.param(chain, id="chain"),
        pytest.param(lambda: tree(2, 2), id="tree"),
        pytest.param(lambda: NgramDrafter(k=3), id="n-gram"),
    ],
)
def test_batch_of_one_draws_the_rows_of_a_big_batch(drafter: Any) -> None:
    """A batch of one follows the law judged on the big batches: it is the same function of the seed."""
    spec = Speculator(TARGET, drafter())
    prompts = PROMPT.expand(30, -1)
    sampling = {**COMBINED, "do_sample": True, "max_new_tokens": 6}
    together = spec.generate(prompts, attention_mask=torch.ones_like(prompts), seed=list(range(30)), **sampling)
    assert isinstance(together, torch.Tensor)
    for row in range(30):
        alone = spec.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), seed=row, **sampling)
        assert torch.equal(alone[0], together[row])
    assert len({tuple(row) for row in together.tolist()}) > 15


@pytest.mark.slow
def test_batches_of_one_judged_directly() -> None:
    target = tiny_llama(5, vocab=3)
    spec = Speculator(target, ModelDrafter(noisy_copy(target, 6, 0.3), k=2))
    prompt = torch.tensor([[1, 2]])
    mask = torch.ones_like(prompt)
    counts = np.zeros((3, 3))
    for seed in range(2000):
        out = spec.generate(prompt, attention_mask=mask, do_sample=True, max_new_tokens=2, seed=seed, top_k=0)
        assert isinstance(out, torch.Tensor)
        counts[int(out[0, 2]), int(out[0, 3])] += 1
    judge(g_test(counts, joint_law(target, prompt, mask, 2, top_k=0).numpy()), "2000 batches of one")


def test_the_judgement_has_the_power_it_promises() -> None:
    """A law off by exactly TV, spread in the direction hardest to see, is refused as often as promised."""
    law = joint_law(TARGET, PROMPT, torch.ones_like(PROMPT), 3, top_k=3).numpy().ravel()
    law = law[law > 0]
    up = np.zeros(len(law), dtype=bool)
    up[np.argsort(law)[::2]] = True
    wrong = law + TV * np.where(up, law / law[up].sum(), -law / law[~up].sum())
    assert abs(abs(wrong - law).sum() / 2 - TV) < 1e-12
    drawn = np.random.default_rng(0).multinomial(samples_for(law), wrong, size=400)
    assert np.mean([g_test(counts, law).p_value < ALPHA for counts in drawn]) >= POWER - 0.02
    honest = np.random.default_rng(1).multinomial(samples_for(law), law, size=400)
    assert 0.4 < np.mean([g_test(counts, law).p_value < 0.5 for counts in honest]) < 0.6


def test_sample_sizes_grow_with_the_cells() -> None:
    assert 30_000 < required_samples(1) < required_samples(26) < required_samples(511) < 200_000
