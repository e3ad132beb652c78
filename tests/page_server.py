"""A server in a thread that answers the page by a plan: what it streams is known, and when it breaks off."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from time import sleep
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from specdec.serve.page_files import PageFiles

WORDS = (
    "Rain is water that comes back . First the sun warms the sea , and a little of the water rises as vapour . High up "
    "it is cold , so the vapour turns into tiny drops , and many tiny drops make a cloud . When they grow too heavy , "
    "they fall : that is rain . Then rivers carry it home to the sea , and all of it begins again ."
)
TOKENS = [word if word in ".,:" else f" {word}" for word in WORDS.split()]
RUNS = ("ddb", "ddr", "r", "db", "dddb", "dr")
"""Per pass the origins of its tokens, over and over: drafted, recovered, bonus."""
ORIGIN = {"d": "drafted", "r": "recovered", "b": "bonus", "p": "plain"}


def passes(tokens: list[str], draft: str) -> list[list[tuple[str, str]]]:
    """Per pass, texts and origins."""
    out, at, turn = [], 0, 0
    while at < len(tokens):
        run = "p" if draft == "none" else RUNS[turn % len(RUNS)]
        out.append([(text, ORIGIN[origin]) for text, origin in zip(tokens[at:], run, strict=False)])
        at, turn = at + len(run), turn + 1
    return out


class PageServer:
    """Prompts that do something else than get an answer: "hang" (after the first pass), "break" (the connection ends
    there, as soon as `seen` is set), "fail" (an error there), "busy" (429).

    Args:
        key: what it asks for; None: nothing. pause: seconds between passes.

    Attributes:
        bodies: of the requests, as they came. left: answers whose client went away. seen: see "break".
    """

    def __init__(self, chat_template: bool = True, key: str | None = None, pause: float = 0.0):
        self.chat_template, self.key, self.pause = chat_template, key, pause
        self.bodies: list[dict[str, Any]] = []
        self.left = 0
        self.seen = threading.Event()
        self.app = FastAPI()
        self.app.get("/specdec/info")(self.info)
        self.app.post("/v1/chat/completions")(self.generate)
        self.app.post("/v1/completions")(self.generate)
        self.app.mount("/", PageFiles())

    def _refusal(self, request: Request) -> Response | None:
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "no valid key"}}, 401)

    async def info(self, request: Request) -> Response:
        offered = {
            "model": "smollm2-135m", "drafters": ["ngram", "self:int4", "none"], "chat_template": self.chat_template,
            "max_request_tokens": 2048, "max_new_tokens": 1024, "lossy": None, "version": "0",
        }  # fmt: skip
        return self._refusal(request) or JSONResponse(offered)

    async def generate(self, request: Request) -> Response:
        if (refused := self._refusal(request)) is not None:
            return refused
        body = await request.json()
        self.bodies.append(body)
        prompt = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        if prompt == "busy":
            return JSONResponse({"error": {"message": "256 generations are under way"}}, 429)
        return StreamingResponse(self._events(body, prompt), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any], prompt: str) -> AsyncIterator[str]:
        tokens = TOKENS[: body["max_tokens"]]
        chat = "messages" in body
        steps = passes(tokens, body.get("draft", "ngram"))
        for number, step in enumerate(steps):
            text = "".join(piece for piece, _ in step)
            told = {"tokens": [{"id": 0, "text": piece, "origin": origin} for piece, origin in step], "step": number}
            yield self._event(chat, text, None, specdec=told)
            if prompt == "hang":
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.left += 1
                    raise
            if prompt == "break":
                await asyncio.to_thread(self.seen.wait, 60)  # what is not read yet goes with the connection
                raise ConnectionError
            if prompt == "fail":
                yield f"data: {json.dumps({'error': {'message': 'the generation failed: NaN in its logits'}})}\n\n"
                yield "data: [DONE]\n\n"
                return
            await asyncio.sleep(self.pause)
        reason = "length" if len(tokens) < len(TOKENS) else "stop"
        yield self._event(chat, "", reason, specdec={"tokens": [], "step": len(steps)})
        kept = sum(origin == "drafted" for step in steps for _, origin in step)
        drafted = 0 if body.get("draft") == "none" else 4 * len(steps)
        counts = {"steps": len(steps), "draft_tokens": drafted, "accepted_tokens": kept}
        yield f"data: {json.dumps({'choices': [], 'usage': {'specdec': counts}})}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, chat: bool, text: str, reason: str | None, **more: Any) -> str:
        said = {"delta": {"content": text}} if chat else {"text": text}
        return f"data: {json.dumps({'choices': [{'index': 0, **said, 'finish_reason': reason}], **more})}\n\n"


@contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of an application that is served in a thread for as long as the block lasts."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", ws="none", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()
