"""One text of an answer while it comes: steps of the engine become pieces of text."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from specdec.detokenizer import Detokenizer
from specdec.engine import Handle, Result, StepOutput, TokenLogprobs
from specdec.serve.stops import StopFilter


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
    """What one step of the engine added. step: its number, from 0. finish_reason: in the last piece, of no step."""

    text: str
    tokens: list[ShownToken] = field(default_factory=list)
    step: int = 0
    finish_reason: str | None = None


class Choice:
    """Text `index` of an answer.

    Attributes:
        result: how the engine ended it, once it has.
    """

    def __init__(self, index: int, handle: Handle, tokenizer: Any, stops: Sequence[str]):
        self.index, self.handle = index, handle
        self.result: Result | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = StopFilter(stops)
        self._held: deque[ShownToken] = deque()
        self._read = self._given = 0  # characters detokenized, and given out

    async def pieces(self) -> AsyncIterator[Piece]:
        """One per step, and a last one with the reason of the end and what was held back.

        Raises:
            TargetFaultError, RequestFaultError, EngineFaultError: the generation failed.
        """
        number = 0
        async for step in self.handle.steps():
            yield self._piece(step, number)
            number += 1
        self.result = await self.handle.wait()
        text = self._stop.push(self._detokenizer.flush()) + self._stop.flush()
        self._given += len(text)
        reason = "stop" if self._stop.stopped else self.result.finish_reason
        yield Piece(text, self._taken(final=True), number, reason)

    def _piece(self, step: StepOutput, number: int) -> Piece:
        out = []
        for place, (token, origin) in enumerate(zip(step.token_ids, step.origins, strict=True)):
            text = self._detokenizer.push(token)
            logprobs = None if step.logprobs is None else step.logprobs[place]
            self._held.append(ShownToken(token, text, self._read, origin, logprobs))
            self._read += len(text)
            out.append(self._stop.push(text))
        piece = "".join(out)
        self._given += len(piece)
        return Piece(piece, self._taken(final=False), number)

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
