"""The parts of the pair's recipe: reading order, plan, optimizer, losses, acceptance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from specdec.experiments.train_pair import acceptance
from specdec.experiments.train_pair.data import WindowStream
from specdec.experiments.train_pair.losses import joint_losses, top_law, top_law_loss
from specdec.experiments.train_pair.models import build_models
from specdec.experiments.train_pair.optim import Muon, orthogonalise
from specdec.experiments.train_pair.recipe import preset

TINY = replace(preset("tiny"), tokens=1024)

# --- data ---------------------------------------------------------------------------------------------------------


def stream(seed: int = 0) -> WindowStream:
    return WindowStream([torch.arange(i * 100, i * 100 + 37 + i) for i in range(20)], length=8, seed=seed)


def test_order_is_a_function_of_seed_and_step():
    assert torch.equal(stream().windows(3, 200), stream().windows(3, 200))
    assert not torch.equal(stream().windows(0, 50), stream(seed=1).windows(0, 50))
    assert torch.equal(stream().windows(0, 200)[120:], stream().windows(120, 80))


def test_an_epoch_reads_every_token_at_most_once_and_epochs_differ():
    data = stream()
    num = data.windows_per_epoch
    for epoch in range(2):
        tokens = data.windows(epoch * num, num).flatten()
        assert len(tokens.unique()) == len(tokens) >= data.num_tokens - 3 * data.length
    assert not torch.equal(data.windows(0, num), data.windows(num, num))


def test_short_batches_read_what_long_ones_read():
    long, short = stream().batch(2, 32, 8), stream().batch(2, 32, 4)
    assert short.shape == (8, 4)
    assert torch.equal(long.flatten(), short.flatten())


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="expected at least 16 tokens, got 9"):
        WindowStream([torch.arange(9)], length=8, seed=0)


# --- plan ---------------------------------------------------------------------------------------------------------


def test_rate_warms_up_and_ends_near_zero():
    recipe = preset("cpu")
    rates = [recipe.rate_at(step) for step in range(recipe.num_steps)]
    peak = rates.index(1.0)
    assert peak == recipe.warmup_steps - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert recipe.length_at(0) == recipe.short_length
    assert recipe.length_at(recipe.num_steps - 1) == recipe.long_length


def test_a_run_may_change_its_plan_only_where_the_past_stays_the_same():
    plan = replace(TINY, tokens=10 * TINY.tokens)
    shorter = replace(plan, tokens=plan.tokens // 2, scheduled_tokens=plan.tokens, cooldown_step=20)
    assert plan.same_until(shorter, 20)
    assert not plan.same_until(shorter, 30)
    assert not plan.same_until(replace(plan, hidden_lr=1.0), 0)
    assert plan.same_until(replace(plan, on_policy_epochs=7), 20)
    assert shorter.rate_at(20) == plan.rate_at(20)
    assert 0 < shorter.rate_at(shorter.num_steps - 1) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "expected optimizer"),
        ({"tokens": 1}, "expected tokens >= 128"),
        ({"long_length": 24}, "expected short_length to divide"),
        ({"micro_batch_tokens": 96}, "expected micro_batch_tokens"),
        ({"cooldown_step": 3}, "together or neither"),
        ({"cooldown_step": 9, "scheduled_tokens": 2048}, "expected 0 <= cooldown_step < 8"),
        ({"vocab_size": 40_000}, "expected vocab_size"),
    ],
)
def test_bad_recipes_are_refused(change: dict, message: str):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


# --- one step -----------------------------------------------------------------------------------------------------


def test_orthogonalise_brings_singular_values_near_one():
    stack = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(stack))
    assert values.min() > 0.5
    assert values.max() < 1.5
    assert torch.linalg.svdvals(stack / stack.norm(dim=(1, 2), keepdim=True)).min() < 0.1  # it had something to do


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (32, 32)])
def test_muon_steps_have_the_size_of_adamw_steps_and_descend(shape: tuple[int, int]):
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.1).step()
    assert 0.1 * 0.2 * 0.6 < weight.detach().square().mean().sqrt() < 0.1 * 0.2 * 1.2
    assert (weight.detach() * weight.grad).sum() < 0


def test_the_draft_does_not_pull_on_the_target():
    target, draft = build_models(TINY, 0)
    ids = torch.arange(64).view(2, 32)
    joint_losses(target(ids).logits, draft(ids).logits, ids, 0.1)[1].backward()
    assert all(parameter.grad is None for parameter in target.parameters())
    assert all(parameter.grad is not None for parameter in draft.parameters())


def test_the_top_law_loss_is_least_at_the_target_law():
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    top = top_law(logits, 8)
    at_law = logits.clone().requires_grad_()
    top_law_loss(at_law, *top, hard_weight=0.0)[0].backward()
    assert at_law.grad is not None
    assert at_law.grad.abs().max() < 1e-3  # the law is stored in float16
    moved, agreement = top_law_loss(logits.flip(0), *top, hard_weight=0.0)
    assert moved > top_law_loss(logits, *top, hard_weight=0.0)[0]
    assert top_law_loss(logits, *top, hard_weight=0.0)[1] == 1.0
    assert agreement < 1.0


# --- acceptance ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
@torch.inference_mode()
def test_walked_chains_are_what_drafting_chains_gives(k: int):
    target, draft = (model.eval() for model in build_models(TINY, 299))
    with torch.no_grad():  # random models agree by chance alone; near copies of one embedding agree half of the time
        for model in (target, draft):
            model.model.embed_tokens.weight.normal_(generator=torch.Generator().manual_seed(1))
    text = acceptance.continue_text(target, torch.arange(5)[None], 24)
    agreement = acceptance.greedy_agreement(draft, text, 5, eos_token_id=299)[0]
    reached, accepted, num_steps = [0] * k, [0] * k, 0
    position = 5
    while position < 5 + len(agreement):
        context, kept = text[:, :position], 0
        for j in range(min(k, 5 + len(agreement) - position)):
            reached[j] += 1
            context = torch.cat([context, draft(context).logits[:, -1:].argmax(-1)], dim=1)
            if context[0, -1] != text[0, position + j]:
                break
            accepted[j] += 1
            kept += 1
        position += kept + 1
        num_steps += 1
    assert acceptance.walk_chains(agreement, k) == (reached, accepted, num_steps)
    assert 0 < sum(accepted)


def test_a_text_counts_up_to_its_end():
    assert acceptance.num_before_end([5, 6, 0, 7], eos_token_id=0) == 3
    assert acceptance.num_before_end([5, 6], eos_token_id=0) == 2


def test_sampled_acceptance_of_a_model_with_itself_is_one():
    target, draft = build_models(TINY, 0)
    ids = torch.arange(40).view(2, 20)
    assert acceptance.sampled_acceptance(target, target, ids, 4) == pytest.approx(1.0, abs=1e-5)
    assert acceptance.sampled_acceptance(target, draft, ids, 4) < 0.999
