"""What one step of an engine gave one request: tokens, where each came from, and log-probabilities if asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from specdec.decision import Decided

Origin = Literal["drafted", "recovered", "bonus", "plain"]
MOST_LOGPROBS = 20
"""Alternatives per token that a request may ask for, as in OpenAI's API."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities at one emitted token: the target's own, of its logits as they are, before temperature
    and every other processor (vLLM's `raw_logprobs`, and OpenAI's). So a token that a processor forced may have
    a small one, and one that the model rules out has -inf.

    logprob: the emitted token's. top_ids, top_logprobs: the likeliest tokens, best first.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class StepOutput:
    """What one step added to a request's text, after any stop rule's cut; at least one token.

    start: tokens emitted before it.
    origins: per token "drafted" (a draft token that was kept), "recovered" (the target's own, where the draft was
        refused), "bonus" (the target's own, behind a draft that was kept to its end) or "plain" (no draft was made).
    num_draft_tokens: drafted in this step, kept or not.
    logprobs: per token; None unless the request asked for them (`Params.logprobs`).
    """

    start: int
    token_ids: tuple[int, ...]
    origins: tuple[Origin, ...]
    num_draft_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None = None

    @property
    def stop(self) -> int:
        """Tokens emitted up to its end."""
        return self.start + len(self.token_ids)


def step_output(decided: Decided, place: int, start: int, num_logprobs: int | None) -> StepOutput:
    """What a step that has been advanced gave the row at `place`.

    Args:
        start: tokens the request had before. num_logprobs: alternatives it asked for, None for no log-probabilities.
    """
    decision = decided.decision
    tokens, drafted = decision.runs[place], decision.drafted[place]
    origins = tuple(_ORIGINS[kind] if drafted else "plain" for kind in decision.kinds[place])
    logprobs = None
    if num_logprobs is not None and tokens:
        nodes = decision.paths[place][: len(tokens)]  # the law at a node is that of the token after it
        logprobs = _raw_logprobs(decided.logits[place, nodes], tokens, num_logprobs)
    return StepOutput(start, tuple(tokens), origins, drafted, logprobs)


_ORIGINS: dict[str, Origin] = {"accepted": "drafted", "recovered": "recovered", "bonus": "bonus"}


def _raw_logprobs(logits: Tensor, tokens: Sequence[int], num_logprobs: int) -> tuple[TokenLogprobs, ...]:
    """Args:
    logits: float `[tokens, vocab]`.
    """
    laws = logits.float().log_softmax(-1)
    own = laws.gather(1, laws.new_tensor(tokens, dtype=torch.int64)[:, None])[:, 0]
    top = laws.topk(min(num_logprobs, laws.shape[1]), dim=-1)
    columns = zip(own.tolist(), top.indices.tolist(), top.values.tolist(), strict=True)
    return tuple(TokenLogprobs(logprob, tuple(ids), tuple(values)) for logprob, ids, values in columns)
