"""One text of an answer while it comes: steps of the engine become pieces of text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.detokenizer import Detokenizer
from specdec.engine import Handle, Result, StepOutput, TokenLogprobs, any_more
from specdec.kv.errors import SpecdecError
from specdec.serve.stops import StopFilter

MOST_STEPS = 32
"""Of one text that are given at once, where its reader was slower than the engine."""


@dataclass(frozen=True)
class ShownToken:
    """A token whose text is out. text: what it added, "" while a character was not whole. offset: characters before it.
    origin: see `StepOutput`."""

    id: int
    text: str
    offset: int
    origin: str
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class Piece:
    """What one step of the engine added. step: its number, from 0. finish_reason or error: in the last piece, which is
    of no step. held_back: all that it has may still be taken away by a stop string."""

    text: str
    tokens: list[ShownToken] = field(default_factory=list)
    step: int = 0
    finish_reason: str | None = None
    error: SpecdecError | None = None
    held_back: bool = False


class Choice:
    """Text `index` of an answer.

    Args:
        shown: pieces say which tokens they have.

    Attributes:
        num_steps: of the engine's, given so far. ended: all of it is given. result: how, unless it failed.
    """

    def __init__(self, index: int, handle: Handle, tokenizer: Any, stops: Sequence[str], shown: bool):
        self.index, self.handle, self.num_steps, self.ended = index, handle, 0, False
        self.result: Result | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopFilter(stops)
        # Where a stop string begins must not depend on which tokens came together.
        self._at_once = not shown and not stops
        self._held: deque[ShownToken] = deque()
        self._read = self._given = 0  # characters detokenized, and given out

    def ready(self) -> list[Piece]:
        """What is there and was not given: a piece for each step, and a last one with the reason of the end and what
        was held back, or with the error that the generation failed by."""
        ended = self.handle.done  # asked first: the end follows the last step
        steps = self.handle.steps_from(self.num_steps, MOST_STEPS)
        pieces = [self._piece(step, number) for number, step in enumerate(steps, self.num_steps)]
        self.num_steps += len(steps)
        if ended and self.num_steps == self.handle.num_steps:
            self.ended = True
            pieces.append(self._last())
        return pieces

    def _last(self) -> Piece:
        try:
            self.result = self.handle.result()
        except SpecdecError as error:
            return Piece("", step=self.num_steps, error=error)
        text = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        self._given += len(text)
        reason = "stop" if self._stop.stopped else self.result.finish_reason
        return Piece(text, self._taken(final=True), self.num_steps, reason)

    def _piece(self, step: StepOutput, number: int) -> Piece:
        if self._at_once:
            return Piece(self._detokenizer.push_all(step.token_ids), [], number)
        out = []
        for place, (token, origin) in enumerate(zip(step.token_ids, step.origins, strict=True)):
            text = self._detokenizer.push(token)
            logprobs = None if step.logprobs is None else step.logprobs[place]
            self._held.append(ShownToken(token, text, self._read, origin, logprobs))
            self._read += len(text)
            out.append(self._stop.push(text))
        piece = "".join(out)
        self._given += len(piece)
        tokens = self._taken(final=False)
        return Piece(piece, tokens, number, held_back=not (piece or tokens))

    def _taken(self, final: bool) -> list[ShownToken]:
        """Tokens whose text is out by now; behind a stop string there are none."""
        out = []
        while self._held and (final or self._held[0].offset + len(self._held[0].text) <= self._given):
            token = self._held.popleft()
            if self._stop.stopped and token.offset + len(token.text) > self._given:
                if token.offset >= self._given:
                    continue
                token = ShownToken(
                    token.id, token.text[: self._given - token.offset], token.offset, token.origin, token.logprobs
                )
            out.append(token)
        return out


async def next_pieces(choices: Sequence[Choice]) -> list[tuple[Choice, Piece]]:
    """Waits for what comes next of several texts: all pieces that are there by then. None when all texts have ended."""
    going = [one for one in choices if not one.ended]
    if going:
        await any_more([one.handle for one in going], [one.num_steps for one in going])
    return [(one, piece) for one in going for piece in one.ready()]
