"""The application: which address does what."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from time import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from specdec.engine import Engine
from specdec.kv.support import text_config
from specdec.serve.answers import ChatForm, CompletionForm, Form
from specdec.serve.errors import Refusal, refusal
from specdec.serve.gate import Gate, Keys, answer
from specdec.serve.generation import Ask, Desk, Generating
from specdec.serve.lifecycle import Lifecycle
from specdec.serve.metrics import CONTENT_TYPE, ServerMetrics
from specdec.serve.options import ServeOptions
from specdec.serve.page_files import PageFiles
from specdec.serve.prompts import Prompts
from specdec.serve.replies import CHAT_REPLIES, COMPLETION_REPLIES, ERRORS, Info, Models
from specdec.serve.requests import ChatRequest, CompletionRequest, Generation
from specdec.serve.sampling import Sampling
from specdec.serve.token_texts import TokenTexts
from specdec.version import __version__

_LOG = logging.getLogger("specdec.serve")


def create_app(
    engine: Engine, tokenizer: Any, name: str, options: ServeOptions | None = None, rule: str = "auto"
) -> FastAPI:
    """OpenAI's API on an engine. While the application lives the engine's thread runs; at its end the engine is closed.

    Args:
        tokenizer: the target's. name: what the model is called. rule: see Speculator.

    `app.state.lifecycle` says how the server ends (see `Lifecycle`).

    Raises:
        UnsupportedArgumentError: a file of keys without one. OSError: one that cannot be read.
    """
    return _Server(engine, tokenizer, name, options or ServeOptions(), rule).app()


class _Server:
    def __init__(self, engine: Engine, tokenizer: Any, name: str, options: ServeOptions, rule: str):
        self.engine, self.name, self.options, self.created = engine, name, options, int(time())
        self.metrics = ServerMetrics(engine.metrics, name)
        self.lifecycle = Lifecycle(options)
        self.desk = Desk(engine, tokenizer, options, self.lifecycle, self.metrics.disconnected)
        config = text_config(engine.target)
        most = min(
            engine.max_request_tokens, getattr(config, "max_position_embeddings", None) or engine.max_request_tokens
        )
        self.prompts = Prompts(tokenizer, min(options.max_prompt_tokens or most, most))
        self.sampling = Sampling(options, tokenizer, most, engine.drafters, config.vocab_size, rule)
        self.texts = TokenTexts(tokenizer)
        self.keys = None if options.api_key_file is None else Keys(options.api_key_file)

    def app(self) -> FastAPI:
        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async with self.engine:
                yield

        app = FastAPI(
            title="specdec", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
            description="OpenAI's API on speculative decoding with exactly the target's law.",
        )  # fmt: skip
        app.state.lifecycle = self.lifecycle
        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(RequestValidationError, _invalid)
        app.add_exception_handler(Exception, _bug)
        app.get("/health", responses=ERRORS)(self.health)
        app.get("/metrics", response_class=Response)(self.prometheus)
        app.get("/v1/models", response_model=Models, responses=ERRORS)(self.models)
        app.get("/specdec/info", response_model=Info, responses=ERRORS)(self.info)
        app.post("/v1/completions", responses=COMPLETION_REPLIES)(self.completions)
        app.post("/v1/chat/completions", responses=CHAT_REPLIES)(self.chat)
        app.mount("/", PageFiles())
        app.add_middleware(Gate, options=self.options, keys=self.keys, answered=self.metrics.answered)
        if self.options.cors_origins:  # around the gate: a page must be able to read why it is refused
            app.add_middleware(
                CORSMiddleware, allow_origins=list(self.options.cors_origins), allow_methods=["GET", "POST"],
                allow_headers=["Authorization", "Content-Type", "X-Request-Id"], expose_headers=["X-Request-Id"],
            )  # fmt: skip
        return app

    async def health(self) -> Response:
        """200 while requests are taken, 503 while the server ends or its engine does not run."""
        self.lifecycle.refuse_draining()
        if not self.engine.threaded:
            raise Refusal(503, "the engine's thread is not running", code="engine_stopped")
        return JSONResponse({"status": "ok"})

    async def prometheus(self) -> Response:
        """Prometheus's text format, under vLLM's names."""
        return Response(await run_in_threadpool(self.metrics.exposition), media_type=CONTENT_TYPE)

    async def models(self) -> Models:
        """The one model there is."""
        return Models.of(self.name, self.created, self.sampling.most)

    async def info(self) -> Info:
        """What OpenAI's API has no word for: the drafters by name (the first drafts unless a request names another),
        whether there is a chat template, limits, and what makes texts follow another law than the model's."""
        kept = self.engine.pool.quantised
        return Info(
            model=self.name, drafters=list(self.engine.drafters), chat_template=self.prompts.has_template,
            max_request_tokens=self.sampling.most, max_new_tokens=self.options.max_new_tokens,
            lossy=None if kept is None else kept.loss, version=__version__,
        )  # fmt: skip

    async def completions(self, body: CompletionRequest) -> Response:
        """Texts that go on from prompts."""
        form = CompletionForm(self.name, self.texts, body.num_alternatives, *_stream_options(body))
        return self._generating(body, form, lambda: self.prompts.of_completion(body))

    async def chat(self, body: ChatRequest) -> Response:
        """The next turn of a conversation, in the model's own chat template."""
        form = ChatForm(self.name, self.texts, body.num_alternatives, *_stream_options(body))
        return self._generating(body, form, lambda: [self.prompts.of_chat(body)])

    def _generating(self, body: Generation, form: Form, prompts: Any) -> Generating:
        if body.model not in ("", self.name):
            raise Refusal(
                404, f"the model {body.model!r} is not served here: expected {self.name!r}", "model", "model_not_found"
            )
        copies, stream = body.n or 1, bool(body.stream)
        if body.stream_options is not None and not stream:
            raise Refusal(400, "stream_options: expected stream to be true with it", "stream_options")

        def prepare() -> Sequence[Ask]:
            found = prompts()
            if len(found) * copies > self.options.max_choices:
                raise Refusal(
                    400, f"expected at most {self.options.max_choices} texts of one request (prompts times n), got "
                    f"{len(found) * copies}", "n",
                )  # fmt: skip
            return [Ask(ids, self.sampling.params(body, len(ids), index)) for ids in found for index in range(copies)]

        return Generating(self.desk, form, prepare, copies, body.stops, stream)


def _stream_options(body: Generation) -> tuple[bool, bool]:
    asked = body.stream_options
    return (False, False) if asked is None else (asked.specdec, asked.include_usage)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = any(isinstance(route, APIRoute) and route.path == request.url.path for route in request.app.routes)
    if error.status_code == 404 and known and not isinstance(error, Refusal):
        error = Refusal(405, f"{request.url.path} is not asked for by {request.method}")  # the page's files come last
    elif error.status_code in (404, 405) and not known and not isinstance(error, Refusal):
        error = Refusal(404, f"there is no {request.url.path} here: GET /openapi.json says what there is")
    elif not isinstance(error, Refusal):
        error = Refusal(error.status_code, str(error.detail))
    return answer(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """The first mistake, in one line."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    cause = (first.get("ctx") or {}).get("error")
    if first["type"] == "json_invalid":
        return answer(Refusal(400, f"expected a body of JSON: {cause}", code="invalid_json"))
    if cause is not None:  # a field that asks for what is not here
        return answer(Refusal(400, str(cause), getattr(cause, "name", None) or where, "unsupported_value"))
    if first["type"] == "extra_forbidden":
        return answer(Refusal(400, f"{where}: there is no such field", where, "unknown_parameter"))
    got = json.dumps(first.get("input"), default=str)[:80]
    return answer(Refusal(400, f"{where}: {first['msg']}, got {got}", where or None, "invalid_value"))


async def _bug(request: Request, error: Exception) -> Response:
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return answer(refusal(RuntimeError()))
