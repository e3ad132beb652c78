"""Requests whose own code fails, by what it does: planted among healthy ones, each must end alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import models
import torch
from torch import Tensor
from transformers import (
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import specdec
from specdec.engine import Engine


def _beyond(after: int) -> LogitsProcessor:
    """An id that does not exist, given past `generate`'s own arguments, whose ids are looked at."""
    return ForcedEOSTokenLogitsProcessor(after + 2, models.VOCAB)


class UnreadableError(Exception):
    """Neither its text nor its representation can be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Processor(LogitsProcessor):
    """Does what it is told once the text has `after` tokens, nothing before."""

    def __init__(self, act: Callable[[Tensor, Tensor], Any], after: int):
        self.act, self.after = act, after

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        return scores if input_ids.shape[1] < self.after else self.act(input_ids, scores)


@specdec.pure
class PureProcessor(Processor):
    """May be asked about drafts."""


class Criterion(StoppingCriteria):
    """The same for the end of a text."""

    def __init__(self, act: Callable[[Tensor, Any], Any], after: int):
        self.act, self.after = act, after

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.zeros(1, dtype=torch.bool) if input_ids.shape[1] < self.after else self.act(input_ids, scores)


class Late(StoppingCriteria):
    """Fails the second time somebody makes stop rules of it: when its lane takes the request in."""

    def __init__(self) -> None:
        self.asked = 0

    @property
    def eos_token_id(self) -> Tensor:
        self.asked += 1
        if self.asked > 1:
            raise LookupError("no such token")
        return torch.tensor([models.EOS])

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.zeros(1, dtype=torch.bool)


def raising(error: BaseException | type[BaseException]) -> Callable[..., Any]:
    def act(*_: Any) -> Any:
        raise error

    return act


def _fn(act: Callable[[], Any], after: int) -> Callable[[int, Tensor], Any]:
    return lambda _, ids: list(range(models.VOCAB)) if len(ids) < after else act()


RAISED: dict[str, BaseException | type[BaseException]] = {
    "error": KeyError("no such state"),
    "unreadable": UnreadableError,
    "exit": SystemExit(3),
    "generator": GeneratorExit,
    "cancelled": asyncio.CancelledError,
    "memory": MemoryError,
    "recursion": RecursionError,
    "stop": StopIteration,
}
NONSENSE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "none": lambda ids, scores: None,
    "text": lambda ids, scores: "scores",
    "narrow": lambda ids, scores: scores[:, :-1],
    "rows": lambda ids, scores: scores.repeat(3, 1),
    "flat": lambda ids, scores: scores[0, 0],
    "ints": lambda ids, scores: scores.long(),
    "wide": lambda ids, scores: torch.cat([scores, scores], 1),
}
LAWLESS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nan": lambda ids, scores: torch.full_like(scores, float("nan")),
    "nothing": lambda ids, scores: torch.full_like(scores, float("-inf")),
}
ANSWERS: dict[str, Any] = {"none": None, "text": "yes", "tuple": ()}
ALLOWED: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "beyond": lambda: [10**6],
    "text": lambda: "abc",
    "object": object,
}

Plant = Callable[[int], dict[str, Any]]
"""Arguments of a request that fails when its text has so many tokens."""


def _processor(kind: type[Processor], act: Callable[..., Any]) -> Plant:
    return lambda after: {"logits_processor": LogitsProcessorList([kind(act, after)])}


def _criterion(act: Callable[..., Any]) -> Plant:
    return lambda after: {"stopping_criteria": StoppingCriteriaList([Criterion(act, after)])}


def _prefixes(act: Callable[[], Any]) -> Plant:
    return lambda after: {"prefix_allowed_tokens_fn": _fn(act, after)}


def _same(answer: Any, *_: Any) -> Any:
    return answer


def _sampled(plant: Plant) -> Plant:
    return lambda after: {**plant(after), "do_sample": True}


PLANTS: dict[str, Plant] = {
    **{f"processor raises {name}": _processor(Processor, raising(error)) for name, error in RAISED.items()},
    **{f"pure processor raises {name}": _processor(PureProcessor, raising(error)) for name, error in RAISED.items()},
    **{f"processor returns {name}": _processor(Processor, act) for name, act in NONSENSE.items()},
    **{f"pure processor returns {name}": _processor(PureProcessor, act) for name, act in NONSENSE.items()},
    **{f"processor leaves {name}": _sampled(_processor(Processor, act)) for name, act in LAWLESS.items()},
    **{f"pure processor leaves {name}": _sampled(_processor(PureProcessor, act)) for name, act in LAWLESS.items()},
    **{f"criterion raises {name}": _criterion(raising(error)) for name, error in RAISED.items()},
    **{f"criterion says {name}": _criterion(partial(_same, answer)) for name, answer in ANSWERS.items()},
    **{f"prefix function raises {name}": _prefixes(raising(error)) for name, error in RAISED.items()},
    **{f"prefix function allows {name}": _prefixes(act) for name, act in ALLOWED.items()},
    "last token beyond the vocabulary": lambda after: {"logits_processor": LogitsProcessorList([_beyond(after)])},
    "criterion fails in the lane": lambda after: {"stopping_criteria": StoppingCriteriaList([Late()])},
}


def calling(served: Engine, name: str) -> Plant:
    """A processor that uses the engine it is called by."""

    def act(ids: Tensor, scores: Tensor) -> Any:
        getattr(served, name)()
        return scores

    return _processor(Processor, act)
