"""Processors and criteria with state, of the kinds users write; all of them write down how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

Log = list[tuple[Any, ...]]


class Counting(LogitsProcessor):
    """Favours other tokens at every call."""

    def __init__(self, log: Log):
        self.log, self.calls = log, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log.append((type(self).__name__, input_ids.tolist()))
        self.calls += 1
        favoured = (torch.arange(scores.shape[1]) + self.calls) % 3 == 0
        return scores + 3.0 * favoured.to(scores.dtype)


class InPlace(Counting):
    """Changes the scores it is given."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores += super().__call__(input_ids, scores.clone()) - scores
        return scores


class InOrder(Counting):
    """Raises unless each prefix is the last one and one token more."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.log and not torch.equal(torch.tensor(self.log[-1][1]), input_ids[:, :-1]):
            raise RuntimeError(f"out of order: {input_ids.tolist()} after {self.log[-1][1]}")
        return super().__call__(input_ids, scores)


class Matcher(Counting):
    """A grammar with a matcher per row: letters 3-9 and 10-19 in turn, closed by 20, then only 20 or the end (2)."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log.append(("Matcher", input_ids.tolist()))
        if self.calls == 0:
            self.state = [0] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if self.state[row] == 2:
                    continue
                allowed = range(3, 10) if self.state[row] == 0 else range(10, 20)
                if token not in (*allowed, 20):
                    raise RuntimeError(f"row {row}: {token} cannot be accepted in state {self.state[row]}")
                self.state[row] = 2 if token == 20 else 1 - self.state[row]
        self.calls += 1
        out = torch.full_like(scores, float("-inf"))
        for row, state in enumerate(self.state):
            ids = [2, 20] if state == 2 else [*(range(3, 10) if state == 0 else range(10, 20)), 20]
            out[row, ids] = scores[row, ids]
        return out


class PerRow(Counting):
    """Knows rows by their place and remembers what it saw in each."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log.append(("PerRow", input_ids.tolist()))
        self.calls += 1
        seen = input_ids.sum(1) + torch.arange(len(input_ids)) * self.calls
        return scores.scatter_add(1, (seen % scores.shape[1])[:, None], torch.full_like(scores[:, :1], 6.0))


def prefix_fn(log: Log) -> Callable[[int, Tensor], list[int]]:
    """A `prefix_allowed_tokens_fn` that counts its calls."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        log.append(("prefix_fn", row, ids.tolist()))
        return list(range(3 + len(log) % 2, 40, 2))

    return allowed


class EveryNth(StoppingCriteria):
    """Stops a row at its own number of calls: each row at another."""

    def __init__(self, log: Log):
        self.log, self.calls = log, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.log.append(("criterion", input_ids.tolist(), None if scores is None else len(scores)))
        self.calls += 1
        return torch.arange(len(input_ids)) * 2 + 5 <= self.calls


class StopTokens(StoppingCriteria):
    """A stop token for every row."""

    def __init__(self, log: Log):
        self.log = log

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.log.append(("criterion", input_ids.tolist(), None if scores is None else len(scores)))
        return input_ids[:, -1] % 5 == torch.arange(len(input_ids)) % 5


class SecondWind(LogitsProcessor):
    """Turns the law of every second call upside down; state that plain order alone keeps right."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return -scores if self.calls % 2 == 0 else scores


PROCESSORS = (Counting, InPlace, InOrder, Matcher, PerRow)
CRITERIA = (EveryNth, StopTokens)
