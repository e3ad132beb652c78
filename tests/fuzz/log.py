"""What the user's own objects saw: every call of a callback in order, with what it was shown."""

from __future__ import annotations

from typing import Any, NamedTuple

import models
import torch
from torch import Tensor


class UsersError(Exception):
    """Raised by callbacks of these tests, as a user's code might raise anything."""


class Event(NamedTuple):
    """who: which object; ids: what text it was shown; scores: `[rows, vocab]` of processors, else None."""

    who: str
    ids: Any
    scores: Tensor | None = None


class Log:
    """Events of one run."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def add(self, who: str, ids: Any, scores: Tensor | None = None) -> None:
        shown = ids.tolist() if isinstance(ids, Tensor) else ids
        self.events.append(Event(who, shown, None if scores is None else scores.detach().clone()))

    def of(self, who: str) -> list[Event]:
        return [event for event in self.events if event.who == who]


def difference(plain: Log, ours: Log) -> str | None:
    """Where two runs of the same callbacks part, in words."""
    for i, (theirs, mine) in enumerate(zip(plain.events, ours.events, strict=False)):
        if theirs[:2] != mine[:2]:
            return f"event {i}: plain {theirs[:2]}, ours {mine[:2]}"
        if (theirs.scores is None) != (mine.scores is None):
            return f"event {i} of {mine.who}: scores for one side only"
        if theirs.scores is not None and mine.scores is not None:
            gap = shown_apart(theirs, mine)
            if gap is not None:
                return f"event {i} of {mine.who}: {gap}"
    if len(plain.events) != len(ours.events):
        longer = plain if len(plain.events) > len(ours.events) else ours
        extra = longer.events[min(len(plain.events), len(ours.events))]
        return f"plain has {len(plain.events)} events, ours {len(ours.events)}; the first one more: {extra[:2]}"
    return None


def shown_apart(theirs: Event, mine: Event) -> str | None:
    """Rows that are over show what nobody reads (they end in a pad): only the others count."""
    assert theirs.scores is not None
    assert mine.scores is not None
    if theirs.scores.dtype != mine.scores.dtype or theirs.scores.shape != mine.scores.shape:
        return f"plain shows {theirs.scores.dtype} {tuple(theirs.scores.shape)}, ours {mine.scores.dtype} " + str(
            tuple(mine.scores.shape)
        )
    live = torch.tensor([row[-1] != models.PAD for row in theirs.ids])
    return apart(theirs.scores[live], mine.scores[live])


def apart(theirs: Tensor, mine: Tensor) -> str | None:
    """In words how two score tensors differ beyond rounding, infinities included."""
    if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
        return f"plain {theirs.dtype} {tuple(theirs.shape)}, ours {mine.dtype} {tuple(mine.shape)}"
    if torch.allclose(theirs, mine, rtol=1e-4, atol=1e-4, equal_nan=True):
        return None
    gap = (theirs - mine).abs().nan_to_num(float("inf"), float("inf"))
    return f"scores differ by up to {float(gap[theirs != mine].max()):.3g}"
