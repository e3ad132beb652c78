"""Phase 2: the target is frozen and writes texts; the draft learns to write on as the target does.

What the draft meets at run time is the target's own text, not the corpus: learning there lifts acceptance most
(Zhou et al., "DistillSpec", 2023, section 4). Half of the texts are greedy, half sampled at temperature 1. The target's
top probabilities are kept on disk, so each text costs one target pass however often the draft reads it.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from specdec.experiments.train_pair.acceptance import write_on
from specdec.experiments.train_pair.data import WindowStream
from specdec.experiments.train_pair.joint import run_joint_phase
from specdec.experiments.train_pair.losses import top_law, top_law_loss
from specdec.experiments.train_pair.session import Session
from specdec.experiments.train_pair.state import DONE, JOINT, ON_POLICY, TrainingState


def batch_path(state: TrainingState, index: int) -> Path:
    return state.out / f"on_policy-{index:04d}.safetensors"


def continue_prompts(
    model: LlamaForCausalLM, prompts: Tensor, length: int, num_top: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Let the model write on to `length` tokens: even rows greedily, odd rows by sampling.

    Args:
        prompts: int64 [rows, prompt].

    Returns:
        `ids` int16 [rows, length], and for each position but the last the law of the next token, as `top_ids` int16 and
        `top_log_p` float16 [rows, length - 1, num_top].
    """
    laws: list[tuple[Tensor, Tensor]] = []
    greedy_row = torch.arange(len(prompts), device=prompts.device) % 2 == 0

    def choose(logits: Tensor) -> Tensor:
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        return torch.where(greedy_row, logits.argmax(-1), sampled)

    num_new = length - prompts.shape[1]
    ids = write_on(model, prompts, num_new, choose, lambda logits: laws.append(top_law(logits, num_top)))
    top_ids, top_log_p = (torch.cat(parts, dim=1) for parts in zip(*laws, strict=True))
    return {"ids": ids.to(torch.int16), "top_ids": top_ids, "top_log_p": top_log_p}


def write_batch(state: TrainingState, index: int) -> None:
    """Generate batch `index` and put it on disk."""
    recipe = state.recipe
    # Another seed than the joint phase's, so that the prompts are other windows of the same files.
    stream = WindowStream(state.stream.files, recipe.on_policy_prompt, recipe.seed + 1)
    prompts = stream.windows(index * recipe.on_policy_rows, recipe.on_policy_rows).to(state.device)
    generator = torch.Generator(state.device).manual_seed(recipe.seed * 1_000_003 + index)
    tensors = continue_prompts(state.target, prompts, recipe.on_policy_length, recipe.on_policy_top, generator)
    partial = batch_path(state, index).with_suffix(".partial")
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial)
    os.replace(partial, batch_path(state, index))


def draft_step(state: TrainingState, texts: dict[str, Tensor]) -> dict[str, float]:
    """One optimizer step of the draft on `tokens_per_step` tokens of the target's texts."""
    recipe = state.recipe
    num_texts = len(texts["ids"])
    rows = max(1, recipe.tokens_per_step // recipe.on_policy_length)
    epoch, first = divmod(state.step * rows, num_texts // rows * rows)
    order = torch.randperm(num_texts, generator=torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch))
    chosen = order[first : first + rows]
    ids, top_ids, top_log_p = (texts[key][chosen].to(state.device) for key in ("ids", "top_ids", "top_log_p"))
    logits = state.draft(ids[:, :-1].long(), use_cache=False).logits
    loss, agreement = top_law_loss(
        logits.flatten(0, 1), top_ids.flatten(0, 1), top_log_p.flatten(0, 1), recipe.on_policy_hard
    )
    loss.backward()
    state.draft_optimizer.step(recipe.on_policy_lr * (1 - state.step / num_draft_steps(state)))
    return {"draft_loss": loss.item(), "agreement": agreement.item()}


def num_draft_steps(state: TrainingState) -> int:
    recipe = state.recipe
    rows = max(1, recipe.tokens_per_step // recipe.on_policy_length)
    return recipe.on_policy_epochs * (recipe.on_policy_batches * recipe.on_policy_rows // rows)


def run_on_policy_phase(state: TrainingState, session: Session) -> None:
    """Write the missing texts, then take the draft steps that are left."""
    recipe = state.recipe
    state.target.eval()
    missing = [i for i in range(recipe.on_policy_batches) if not batch_path(state, i).exists()]
    tokens_per_batch = recipe.on_policy_rows * recipe.on_policy_length
    done = recipe.on_policy_batches - len(missing)
    with session.progress("texts", recipe.on_policy_batches, done, tokens_per_batch) as advance:
        for index in missing:
            write_batch(state, index)
            advance({})
            session.after_step(state)
    batches = [load_file(batch_path(state, i)) for i in range(recipe.on_policy_batches)]
    texts = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    state.draft.train()
    session.steps("draft", state, num_draft_steps(state), partial(draft_step, state, texts))
    state.phase, state.step = DONE, 0
    state.save()


def train_all(state: TrainingState, session: Session, *, compile_layers: bool = False) -> None:
    """Take all steps that are left, of both phases."""
    if state.phase == JOINT:
        run_joint_phase(state, session, compile_layers=compile_layers)
    if state.phase == ON_POLICY:
        run_on_policy_phase(state, session)
