"""One generation as an ASGI response: submitted, streamed or collected, and cancelled when its client is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from specdec.engine import Engine, Handle, Params
from specdec.serve.answers import Form, Whole, event, usage
from specdec.serve.choice import Choice, Piece, next_pieces
from specdec.serve.errors import Refusal, refusal
from specdec.serve.gate import answer
from specdec.serve.lifecycle import Lifecycle
from specdec.serve.options import ServeOptions

_LOG = logging.getLogger("specdec.serve")


@dataclass(frozen=True)
class Ask:
    """One text to be generated."""

    prompt: list[int]
    params: Params


class Gone(Exception):
    """The client is gone, or takes nothing any more."""


@dataclass(frozen=True)
class Desk:
    """What all generations of a server share. gone: told of every client that left early."""

    engine: Engine
    tokenizer: Any
    options: ServeOptions
    lifecycle: Lifecycle
    gone: Callable[[], None]


class Generating(Response):
    """Everything it takes is taken and given back inside its call: a place, rows, pages.

    Args:
        prepare: what is to be generated, in the order of the choices; called in a thread. It may raise `Refusal`.
        num_choices: texts of each prompt. stops: stop strings.
    """

    def __init__(
        self,
        desk: Desk,
        form: Form,
        prepare: Callable[[], Sequence[Ask]],
        num_choices: int,
        stops: Sequence[str],
        stream: bool,
    ):
        super().__init__()
        self._desk, self._form, self._prepare, self._num_choices = desk, form, prepare, num_choices
        self._stops, self._stream = stops, stream
        self._handles: list[Handle] = []
        self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop, patience = asyncio.get_running_loop(), self._desk.options.write_seconds
        since: float | None = None  # when a write began that has not ended
        late = False

        async def timely(message: Message) -> None:
            nonlocal since
            since = loop.time()
            try:
                await send(message)
            except OSError:
                raise Gone from None
            since = None

        timer = loop.call_later(patience / 2, lambda: look())

        def look() -> None:  # now and then: a timer for each write would cost more than the write
            nonlocal late, timer
            late = since is not None and loop.time() - since > patience
            if late:
                work.cancel()
            else:
                timer = loop.call_later(patience / 2, look)

        gone = asyncio.create_task(_disconnect(receive))
        work = asyncio.create_task(self._work(scope, receive, timely))
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._desk.gone()
        finally:
            self.abort()
            timer.cancel()
            for task in (gone, work):
                task.cancel()
            done = await asyncio.gather(gone, work, return_exceptions=True)
            self._desk.lifecycle.leave(self)
        if late or isinstance(done[1], Gone):
            self._desk.gone()
        elif isinstance(done[1], Exception):
            raise done[1]

    def abort(self) -> None:
        """Cancel all of it; a client that is still there is told that the server ends."""
        self._ended = True
        for handle in list(self._handles):
            handle.cancel()

    def _begin(self) -> list[Choice]:
        """In a thread: tokenizing and submitting take some time."""
        for ask in self._prepare():
            handle = self._desk.engine.submit(ask.prompt, ask.params)
            self._handles.append(handle)
            if self._ended:  # while this one was on its way
                handle.cancel()
        return [
            Choice(i, handle, self._desk.tokenizer, self._stops, self._form.shows_tokens)
            for i, handle in enumerate(self._handles)
        ]

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._desk.lifecycle.enter(self)
            choices = await asyncio.to_thread(self._begin)
            if not self._stream:
                response = await self._collected(choices)
            else:
                async with aclosing(self._chunks(choices)) as chunks:
                    first = await anext(chunks)  # what fails before it still has a status of its own
                    await self._streamed(first, chunks, send)
                return
        except Exception as error:
            if isinstance(error, Gone):
                raise
            response = answer(self._told(error))
        await response(scope, receive, send)

    async def _streamed(self, first: bytes, rest: AsyncIterator[bytes], send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]  # fmt: skip
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": first, "more_body": True})
        try:
            async for chunk in rest:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Gone:
            raise
        except Exception as error:  # the status is sent already: the stream ends with the error
            await send({"type": "http.response.body", "body": event(self._told(error).body), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _collected(self, choices: Sequence[Choice]) -> Response:
        wholes = [Whole() for _ in choices]
        while pieces := await next_pieces(choices):
            for choice, piece in pieces:
                if (failure := self._failure(piece)) is not None:
                    raise failure
                wholes[choice.index].add(piece)
        return JSONResponse(self._form.whole(wholes, self._usage(choices)))

    async def _chunks(self, choices: Sequence[Choice]) -> AsyncGenerator[bytes, None]:
        """Events. Those that are there at one time come as one: half of what a chunk costs is its write."""
        begun: set[int] = set()
        while pieces := await next_pieces(choices):
            events, failure = [], None
            for choice, piece in pieces:
                if (failure := self._failure(piece)) is not None:
                    break
                if piece.held_back:
                    continue
                events.append(self._form.chunk(choice.index, piece, choice.index not in begun))
                begun.add(choice.index)
            if events:
                yield b"".join(events)
            if failure is not None:
                raise failure
        if self._form.with_usage:
            yield self._form.usage_chunk(self._usage(choices))

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return usage([one.result for one in choices if one.result is not None], self._num_choices)

    def _failure(self, piece: Piece) -> Exception | None:
        if piece.finish_reason == "timeout":
            seconds = self._desk.options.request_seconds
            return Refusal(408, f"not done within {seconds:g} seconds: ask for fewer tokens", code="request_timeout")
        if piece.finish_reason == "cancelled":
            return Refusal(503, "the server is shutting down", code="shutting_down")
        return piece.error

    def _told(self, error: Exception) -> Refusal:
        """The refusal to send; errors nobody expects are logged."""
        told = refusal(error)
        if told.status_code == 500:
            _LOG.error("a generation failed", exc_info=error)
        return told


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
