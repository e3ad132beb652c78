"""The reference: the plain `transformers` model with the processors plain `generate` builds; nothing of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from specdec.kv.versions import cache_of, cached

MAX_ENTRIES = 1 << 25
"""Logits held at once: rows times positions times vocabulary."""


def processors_of(
    model: PreTrainedModel, prompt: Tensor, mask: Tensor | None = None, **sampling: Any
) -> LogitsProcessorList:
    """The processors that plain `generate` builds for these arguments, in its order."""
    seen: list[LogitsProcessorList] = []

    def capture(
        model: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, **rest: Any
    ) -> Tensor:
        seen.append(logits_processor)
        return input_ids

    mask = torch.ones_like(prompt) if mask is None else mask
    plain: Any = type(model)  # an instance may have been patched to call us
    arguments = {"do_sample": True, "max_new_tokens": 1, **sampling}
    plain.generate(model, prompt, attention_mask=mask, custom_generate=capture, **arguments)
    return seen[0]


class Position(NamedTuple):
    """The reference law at one new token of every row.

    place: which new token (0 = the first). prefix: int64 `[rows, tokens]`; logits: raw `[rows, vocab]`; law: float64
    `[rows, vocab]`.
    """

    place: int
    prefix: Tensor
    logits: Tensor
    law: Tensor


class Reference:
    """Next-token laws of `target` after one prompt, without the library's forward pass, cache or law.

    Args:
        prompt: int64 `[1, tokens]`.
        sampling: arguments of `generate` that choose the law (temperature, top_k, ...).
    """

    def __init__(self, target: PreTrainedModel, prompt: Tensor, sampling: Mapping[str, Any]):
        self.target: Any = target
        self.prompt = prompt
        self.sampling = dict(sampling)
        with torch.no_grad():
            out = self.target(input_ids=prompt, use_cache=True)
        self._cache = cache_of(out)
        self._logits = out.logits[:, -1]
        self.vocab = int(self._logits.shape[-1])
        self._processors: dict[int, LogitsProcessorList] = {}

    def law(self, prefix: Tensor, logits: Tensor) -> Tensor:
        """Processed probabilities, float64 `[rows, vocab]`, of raw logits `[rows, vocab]` after `prefix`."""
        rows = len(prefix)
        if rows not in self._processors:
            self._processors[rows] = processors_of(self.target, self.prompt.expand(rows, -1), **self.sampling)
        processors: Any = self._processors[rows]
        scores: Tensor = processors(prefix, logits.to(torch.float32, copy=True))
        return scores.double().softmax(-1)

    def first(self) -> Tensor:
        """The law of the first new token, float64 `[vocab]`."""
        return self.law(self.prompt, self._logits)[0]

    def along(self, tails: Tensor) -> Iterator[Position]:
        """The law at every token of `tails` (int64 `[rows, tokens]`, tokens that really follow the prompt).

        One forward pass over all of them per chunk of rows; chunks that share an index come one after the other.
        """
        rows = max(1, MAX_ENTRIES // (tails.shape[1] * self.vocab))
        for part in tails.split(rows):
            logits = self._forward(part)
            for index in range(part.shape[1]):
                prefix = torch.cat([self.prompt.expand(len(part), -1), part[:, :index]], dim=1)
                raw = logits[:, index]
                yield Position(index, prefix, raw, self.law(prefix, raw))

    @torch.no_grad()
    def _forward(self, tails: Tensor) -> Tensor:
        """Raw logits before each token of `tails`, `[rows, tokens, vocab]`."""
        first = self._logits.expand(len(tails), -1)[:, None]
        if tails.shape[1] == 1:
            return first
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(tails))
        out = self.target(input_ids=tails[:, :-1], **cached(self.target, cache))
        return torch.cat([first, out.logits], dim=1)


def places(law: Tensor, tokens: Tensor, uniforms: Tensor) -> Tensor:
    """Where each token falls in its law, likeliest first: uniform on [0, 1) exactly when tokens follow the law.

    Tokens of equal probability share their interval evenly, by `uniforms`; a token of probability zero is placed at 1.

    Args:
        law: float64 `[rows, vocab]`; tokens: int64 `[rows]`; uniforms: float64 `[rows]` in [0, 1), independent.
    """
    own = law.gather(1, tokens[:, None])
    above = torch.where(law > own, law, 0.0).sum(1)
    equal = torch.where(law == own, law, 0.0).sum(1)
    return torch.where(own[:, 0] > 0, (above + uniforms * equal).clamp(max=1 - 2**-52), 1.0)
