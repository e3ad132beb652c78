"""Penalties and biases as OpenAI defines them, and stop strings: code of one request that the engine calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from specdec.detokenizer import Detokenizer
from specdec.serve.stops import StopFilter
from specdec.verify.purity import pure


@pure
class CountPenalties(LogitsProcessor):
    """`logits[t] - count[t] * frequency - (count[t] > 0) * presence`, over tokens generated so far, not the prompt's.

    A function of the text alone: drafts are judged under it as they are without it.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float):
        self._begin, self._presence, self._frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Args: input_ids: int64 `[rows, tokens]`. scores: `[rows, vocab]`; a new tensor is returned."""
        said = input_ids[:, self._begin :].sort(-1).values
        first = torch.ones_like(said, dtype=torch.bool)
        first[:, 1:] = said[:, 1:] != said[:, :-1]
        taken = self._frequency + self._presence * first.to(scores.dtype)
        return scores.scatter_add(1, said, -taken)


@pure
class Biases(LogitsProcessor):
    """Numbers added to the logits of some tokens."""

    def __init__(self, biases: Mapping[int, float]):
        self._ids, self._values = torch.tensor(list(biases)), torch.tensor(list(biases.values()))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        values = self._values.to(scores).expand(len(scores), -1)
        return scores.index_add(1, self._ids.to(scores.device), values)


class StopTexts(StoppingCriteria):
    """Ends a text at the token that completes one of the stop strings. Keeps state: one object serves one text.

    (`transformers`' own looks through the whole vocabulary for every new string first.)
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_length: int):
        self._detokenizer, self._filter = Detokenizer(tokenizer), StopFilter(stops)
        self._read = prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Bool `[1]`; input_ids: int64 `[1, tokens]`."""
        for token in input_ids[0, self._read :].tolist():
            self._filter.push(self._detokenizer.push(token))
        self._read = input_ids.shape[1]
        return torch.tensor([self._filter.stopped], device=input_ids.device)
