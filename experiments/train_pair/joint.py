"""Phase 1: the target learns from text, the draft from the target, in the same steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from specdec.experiments.train_pair.losses import joint_losses
from specdec.experiments.train_pair.session import Session
from specdec.experiments.train_pair.state import ON_POLICY, TrainingState

LossFunction = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, ...]]


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 products on GPUs; CPUs without bf16 units are faster in float32."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def compiled(state: TrainingState, enabled: bool) -> Iterator[LossFunction]:
    """Inside, the decoder layers run compiled (about 1.25x on a CPU, after a minute of compiling); yields the loss.

    Layers are compiled one by one because they share their code: one compilation serves all of them.
    """
    if not enabled:
        yield joint_losses
        return
    layers = [layer for model in (state.target, state.draft) for layer in (*model.model.layers, model.model.norm)]
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        yield torch.compile(joint_losses, dynamic=False)
    finally:
        for layer in layers:
            layer._compiled_call_impl = None  # phase 2 and evaluation call with many shapes


def joint_step(state: TrainingState, loss_function: LossFunction = joint_losses) -> dict[str, float]:
    """One optimizer step of both models; returns the losses in nats per token."""
    recipe = state.recipe
    ids = state.stream.batch(state.step, recipe.tokens_per_step, recipe.length_at(state.step)).to(state.device)
    micro_batches = ids.chunk(recipe.tokens_per_step // recipe.micro_batch_tokens)
    totals = torch.zeros(3, device=state.device)
    for micro_batch in micro_batches:
        with autocast(state.device):
            target_logits = state.target(micro_batch, use_cache=False).logits
            draft_logits = state.draft(micro_batch, use_cache=False).logits
        losses = loss_function(target_logits, draft_logits, micro_batch, recipe.distillation_ce)
        ((losses[0] + losses[1]) / len(micro_batches)).backward()
        totals += torch.stack(losses).detach() / len(micro_batches)
    rate = recipe.rate_at(state.step)
    state.target_optimizer.step(rate)
    # The draft keeps its full rate here and decays in phase 2, where it meets the target's final law.
    state.draft_optimizer.step(max(rate, min(1.0, (state.step + 1) / recipe.warmup_steps)))
    target_ce, draft_loss, draft_ce = totals.tolist()
    return {"target_ce": target_ce, "draft_loss": draft_loss, "draft_ce": draft_ce}


def run_joint_phase(state: TrainingState, session: Session, *, compile_layers: bool = False) -> None:
    """Take the steps that are left, saving now and then; ends in phase 2 unless interrupted."""
    state.target.train()
    state.draft.train()
    with compiled(state, compile_layers) as loss_function:
        session.steps("joint", state, state.recipe.num_steps, partial(joint_step, state, loss_function))
    state.phase, state.step = ON_POLICY, 0
    state.save()
