"""What the user's own objects saw: every call of a callback in order, with what it was shown."""

from __future__ import annotations

from typing import Any, NamedTuple

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

    def streamed(self) -> list[Event]:
        """What streamers saw. Ours hear of several tokens at a time, so that only their own order is plain's."""
        return [event for event in self.events if event.who == STREAMER]

    def asked(self) -> list[Event]:
        """What all others saw."""
        return [event for event in self.events if event.who != STREAMER]


STREAMER = "streamer"


def difference(plain: list[Event], ours: list[Event], text: Tensor | None, pad: int) -> str | None:
    """Where two runs of the same callbacks part, in words.

    Args:
        text: int64 `[rows, columns]`, the final text of both; None where there is none, as after an error.
        pad: what finished rows of it are filled up with.
    """
    for i, (theirs, mine) in enumerate(zip(plain, ours, strict=False)):
        if theirs[:2] != mine[:2]:
            return f"event {i}: plain {theirs[:2]}, ours {mine[:2]}"
        if theirs.scores is not None and mine.scores is not None:
            running = _running(theirs.ids, text, pad)
            gap = apart(theirs.scores[running], mine.scores[running])
            if gap is not None:
                return f"event {i} of {mine.who}: {gap}"
    if len(plain) != len(ours):
        extra = max(plain, ours, key=len)[min(len(plain), len(ours))]
        return f"plain has {len(plain)} events, ours {len(ours)}; the first one more: {extra[:2]}"
    return None


def _running(shown: list[list[int]], text: Tensor | None, pad: int) -> Tensor:
    """Bool `[rows]`: rows that go on. What is shown of those that are over (only pads follow), nobody reads."""
    if len(shown) == 1:
        return torch.ones(1, dtype=torch.bool)
    if text is None:
        return torch.zeros(len(shown), dtype=torch.bool)
    return (text[:, len(shown[0]) :] != pad).any(1)


def apart(theirs: Tensor, mine: Tensor) -> str | None:
    """In words how two score tensors differ beyond rounding, infinities included."""
    if theirs.shape != mine.shape or theirs.dtype != mine.dtype:
        return f"plain {theirs.dtype} {tuple(theirs.shape)}, ours {mine.dtype} {tuple(mine.shape)}"
    if torch.allclose(theirs, mine, rtol=1e-4, atol=1e-4, equal_nan=True):
        return None
    gap = (theirs - mine).abs().nan_to_num(float("inf"), float("inf"))
    return f"scores differ by up to {float(gap[theirs != mine].max()):.3g}"
