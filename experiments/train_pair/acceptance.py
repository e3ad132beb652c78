"""How often the target takes what the draft proposes, by plain forwards of both models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from specdec.kv.versions import cached


@torch.inference_mode()
def write_on(
    model: Any, prompts: Tensor, num_new: int, choose: Callable[[Tensor], Tensor],
    see: Callable[[Tensor], None] = lambda logits: None,
) -> Tensor:  # fmt: skip
    """ids[rows, prompt + num_new]: each next token is what `choose` makes of logits[rows, vocab]. `see` is shown the
    logits[rows, length, vocab] of every pass."""
    ids, cache, fed = prompts, DynamicCache(config=model.config), prompts
    for _ in range(num_new):
        logits = model(fed, **cached(model, cache)).logits
        see(logits)
        fed = choose(logits[:, -1].float())[:, None]
        ids = torch.cat([ids, fed], dim=1)
    return ids


def continue_text(model: Any, prompts: Tensor, num_new: int, generator: torch.Generator | None = None) -> Tensor:
    """Greedy continuations, or sampled at temperature 1 when a generator is given."""
    if generator is None:
        return write_on(model, prompts, num_new, lambda logits: logits.argmax(-1))
    return write_on(model, prompts, num_new, lambda x: torch.multinomial(x.softmax(-1), 1, generator=generator)[:, 0])


def num_before_end(generated: Sequence[int], eos_token_id: int) -> int:
    """Number of tokens a decoder emits of `generated`: up to and including the first end-of-text."""
    generated = list(generated)
    return generated.index(eos_token_id) + 1 if eos_token_id in generated else len(generated)


@torch.inference_mode()
def greedy_agreement(draft: Any, ids: Tensor, prompt_tokens: int, eos_token_id: int) -> list[list[bool]]:
    """Per row of ids[rows, length], for each generated token: is it the draft's greedy choice after what precedes it?

    While all draft tokens of a chain were accepted, the draft's context is exactly the target's text, so one forward
    over the finished text tells what a chain started anywhere would have proposed.
    """
    choices = draft(ids[:, :-1], use_cache=False).logits[:, prompt_tokens - 1 :].argmax(-1)
    agreements = []
    for row, choice in zip(ids[:, prompt_tokens:].tolist(), choices.tolist(), strict=True):
        num = num_before_end(row, eos_token_id)
        agreements.append([a == b for a, b in zip(row[:num], choice[:num], strict=True)])
    return agreements


def walk_chains(agreement: Sequence[bool], k: int) -> tuple[list[int], list[int], int]:
    """Replay speculative decoding of one text: `(reached, accepted, num_steps)`, the first two per chain position.

    A step drafts k tokens, keeps those before the first disagreement and emits one token more. Positions beyond the end
    of the text are not counted.

    >>> walk_chains([True, True, False, True, True], k=2)
    ([2, 2], [2, 2], 2)
    """
    reached, accepted = [0] * k, [0] * k
    position = num_steps = 0
    while position < len(agreement):
        num_steps += 1
        kept = 0
        for j in range(min(k, len(agreement) - position)):
            reached[j] += 1
            if not agreement[position + j]:
                break
            accepted[j] += 1
            kept += 1
        position += kept + 1
    return reached, accepted, num_steps


@torch.inference_mode()
def sampled_acceptance(target: Any, draft: Any, ids: Tensor, prompt_tokens: int) -> float:
    """Mean over generated positions of sum(min(p, q)): the chance that a token drawn from q is accepted."""
    window = slice(prompt_tokens - 1, ids.shape[1] - 1)
    p = target(ids, use_cache=False).logits[:, window].float().softmax(-1)
    q = draft(ids, use_cache=False).logits[:, window].float().softmax(-1)
    return float(torch.minimum(p, q).sum(-1).mean())
