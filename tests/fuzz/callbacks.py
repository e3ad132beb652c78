"""Users' own processors, criteria, prefix functions and streamers: pure ones, and ones with a memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

import specdec
from fuzz.call import Fresh
from fuzz.log import STREAMER, Log, UsersError


class Logged(LogitsProcessor):
    """A user's processor that tells the log what it is shown. `change` returns the new scores."""

    def __init__(self, log: Log, name: str):
        self.log, self.name = log, name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.log.add(self.name, input_ids, scores)
        return self.change(input_ids, scores)

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores


class AvoidsLast(Logged):
    """Reads the prefix."""

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_add(1, ids[:, -2:], torch.full_like(scores[:, : min(2, ids.shape[1])], -1.5))


class InPlace(Logged):
    """Writes into the scores it is given, and returns them."""

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 7] += 2.0
        scores[:, int(ids.sum()) % scores.shape[1]] -= 3.0
        return scores


class ByRow(Logged):
    """Knows the rows of its batch by position."""

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.arange(scores.numel()).view_as(scores) * 7 % 5
        return scores + bias.to(scores.dtype) / 2


class Counts(Logged):
    """Its law depends on how often it was called."""

    calls = 0

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.index_add(1, torch.tensor([3 + self.calls % 5]), torch.full_like(scores[:, :1], 4.0))


class Remembers(Logged):
    """Keeps every prefix it saw, and insists on each one being the last one and one token more."""

    last: Tensor | None = None

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.last is not None and not (ids.shape[1] == self.last.shape[1] + 1 and ids[:, :-1].equal(self.last)):
            raise UsersError(f"asked out of order: {ids.tolist()} after {self.last.tolist()}")
        self.last = ids.clone()
        return scores.scatter_add(1, ids[:, -1:], torch.full_like(scores[:, :1], -2.0))


class Grammar(Logged):
    """A matcher per row, fed one token a call: low, then high tokens; a row that is over is not asked."""

    width = 0
    state: list[int]

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        if not self.width:
            self.state = [0] * len(ids)
        elif ids.shape[1] != self.width + 1:
            raise UsersError(f"the matcher was fed {self.width} columns, now it is shown {ids.shape[1]}")
        else:
            for row, token in enumerate(ids[:, -1].tolist()):
                self.state[row] += token
        self.width = ids.shape[1]
        odd = torch.tensor([state % 2 for state in self.state])[:, None]
        tokens = torch.arange(scores.shape[1])
        forbidden = ((tokens > 20) == (odd == 1)) & (tokens != models.EOS)
        return scores.masked_fill(forbidden, float("-inf"))


class RaisesLate(Logged):
    """Fails at its third call."""

    calls = 0

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 3:
            raise UsersError("the user's processor failed")
        return scores


class NothingLeft(Logged):
    """Forbids every token from some length on."""

    def change(self, ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf")) if ids.shape[1] > 8 else scores


@specdec.pure
class Parity(LogitsProcessor):
    """Declared pure, so that nobody counts its calls: allows tokens of the parity of the prefix's sum."""

    def __init__(self, log: Log, name: str):
        pass

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        odd = input_ids.sum(1, keepdim=True) % 2
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 != odd, -30.0)


@specdec.pure
class PureByRow(Parity):
    """Declared pure, too: knows the rows of its batch by position, and one of them is forbidden almost everything."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.arange(scores.numel()).view_as(scores) * 7 % 5
        scores = scores + bias.to(scores.dtype)
        scores[0] = scores[0].masked_fill(torch.arange(scores.shape[1]) % 9 != input_ids.shape[1] % 9, float("-inf"))
        return scores


class Stops(StoppingCriteria):
    """A user's criterion that tells the log what it is shown."""

    def __init__(self, log: Log, name: str, rule: Callable[[Stops, Tensor], Tensor]):
        self.log, self.name, self.rule, self.calls = log, name, rule, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.log.add(self.name, input_ids)
        return self.rule(self, input_ids)


def _third_call_fails(self: Stops, ids: Tensor) -> Tensor:
    if self.calls == 3:
        raise UsersError("the user's criterion failed")
    return torch.zeros(len(ids), dtype=torch.bool)


STOPS: dict[str, Callable[[Stops, Tensor], Any]] = {
    "token%5": lambda self, ids: ids[:, -1] % 5 == 0,
    "pair%7": lambda self, ids: ids[:, -2:].sum(1) % 7 == 0,
    "columns>=9": lambda self, ids: torch.full((len(ids),), ids.shape[1] >= 9),
    "fourth call": lambda self, ids: torch.full((len(ids),), self.calls >= 4),
    "raises at its third call": _third_call_fails,
}
PROCESSORS: tuple[type[Any], ...] = (
    AvoidsLast, InPlace, ByRow, Counts, Remembers, Grammar, Parity, PureByRow, RaisesLate, NothingLeft,
)  # fmt: skip


def processor(kind: type[Any]) -> Fresh:
    return Fresh(f"{kind.__name__}()", lambda log: kind(log, kind.__name__))


def criterion(name: str) -> Fresh:
    return Fresh(f"Stops({name!r})", lambda log: Stops(log, f"Stops {name}", STOPS[name]))


def pure_criterion(name: str) -> Fresh:
    """The same, declared pure: its calls go into a log that nobody reads."""
    return Fresh(f"pure(Stops({name!r}))", lambda log: specdec.pure(Stops(Log(), name, STOPS[name])))


def _by_row(batch_id: int, prefix: Tensor) -> list[int]:
    first = 3 + (batch_id + int(prefix[-1])) % 4
    return [models.EOS, *range(first, 32, 3)]


def _failing(batch_id: int, prefix: Tensor) -> list[int]:
    if len(prefix) > 7:
        raise UsersError("the user's prefix function failed")
    return [5, 6, 7]


PREFIXES: dict[str, Callable[[int, Tensor], Any]] = {
    "by row": _by_row,
    "two tokens": lambda batch_id, prefix: [7, 8],
    "one token": lambda batch_id, prefix: [5 + batch_id],
    "a tensor": lambda batch_id, prefix: torch.tensor([4, 9, 12]),
    "nothing": lambda batch_id, prefix: [],
    "nothing later": lambda batch_id, prefix: [3, 4, 5, 6] if len(prefix) < 8 else [],
    "raises later": _failing,
}


def pure_prefix_function(name: str) -> Fresh:
    """Declared pure."""
    return Fresh(f"pure prefix function {name!r}", lambda log: specdec.pure(lambda *asked: PREFIXES[name](*asked)))


def prefix_function(name: str) -> Fresh:
    def make(log: Log) -> Callable[[int, Tensor], Any]:
        def allowed(batch_id: int, prefix: Tensor) -> Any:
            log.add(f"prefix function of row {batch_id}", prefix)
            return PREFIXES[name](batch_id, prefix)

        return allowed

    return Fresh(f"prefix function {name!r}", make)


class Recorder:
    """A streamer that tells the log what it is given; `fails`: at which put it raises."""

    def __init__(self, log: Log, fails: int | None = None):
        self.log, self.fails, self.puts = log, fails, 0

    def put(self, value: Tensor) -> None:
        self.log.add(STREAMER, value)
        self.puts += 1
        if self.puts == self.fails:
            raise UsersError("the user's streamer failed")

    def end(self) -> None:
        self.log.add(STREAMER, "end")


def streamer(fails: int | None = None) -> Fresh:
    return Fresh(f"Recorder(fails={fails})", lambda log: Recorder(log, fails))
