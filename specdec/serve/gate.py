"""What happens to a request before anybody reads it: its id, its key, and how much body it may have, and how fast."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from uuid import uuid4

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.kv.errors import UnsupportedArgumentError
from specdec.serve.errors import Refusal
from specdec.serve.options import ServeOptions

_PORT = re.compile(r":\d*$")
_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
GUARDED = ("/v1/", "/specdec/", "/metrics", "/openapi.json")
"""Where a key is asked for, whatever stands before it: behind a proxy or a mount, paths begin with a prefix. The page
and /health say nothing that needs one."""


class Keys:
    """The keys of a file, kept as digests; asking takes the same time whatever is asked.

    Raises:
        UnsupportedArgumentError: a file without a key.
    """

    def __init__(self, path: Path):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        self._digests = [_digest(line) for line in lines if line]
        if not self._digests:
            raise UnsupportedArgumentError("api_key_file: expected one key a line, the file holds none")

    def admit(self, authorization: str) -> bool:
        """Whether the header carries one of them."""
        scheme, _, given = authorization.partition(" ")
        asked = _digest(given.strip())
        found = [hmac.compare_digest(asked, digest) for digest in self._digests]
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """ASGI middleware. Every answer carries `X-Request-Id`, the client's own if it sent a sound one.

    Where a body is too large or too slow, whoever reads it gets the refusal raised.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions, keys: Keys | None, answered: Callable[[int], None]):
        """`answered` is told every status."""
        self._app, self._options, self._keys, self._answered = app, options, keys, answered
        self._hosts = _hosts(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        number = given if _ID.fullmatch(given) else uuid4().hex
        scope.setdefault("state", {})["request_id"] = number

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = number
                self._answered(message["status"])
            await send(message)

        refused = self._refusal(scope, headers)
        if refused is not None:
            await answer(refused)(scope, receive, marked)
            return
        await self._app(scope, self._limited(receive), marked)

    def _refusal(self, scope: Scope, headers: Headers) -> Refusal | None:
        host = _PORT.sub("", headers.get("host", "localhost")).lower()
        if self._hosts is not None and host not in self._hosts:
            return Refusal(
                421, f"the header Host: expected one of {sorted(self._hosts)}, got {host[:80]!r}: behind a proxy, name "
                "its host with --allowed-host", code="unknown_host",
            )  # fmt: skip
        guarded = any(part in scope["path"] for part in GUARDED) and scope["method"] != "OPTIONS"
        if guarded and self._keys is not None and not self._keys.admit(headers.get("authorization", "")):
            return Refusal(
                401, "expected a valid key in the header 'Authorization: Bearer KEY'", code="invalid_api_key"
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return Refusal(400, f"Content-Length: expected a number, got {length[:20]!r}")
        if int(length) > self._options.max_body_bytes:
            return self._too_large()
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            # A page of another origin may send other kinds without asking the server first.
            return Refusal(415, f"expected the header 'Content-Type: application/json', got {kind or 'none'!r}")
        return None

    def _too_large(self) -> Refusal:
        most = self._options.max_body_bytes
        return Refusal(413, f"expected a body of at most {most} bytes: shorten it", code="body_too_large")

    def _limited(self, receive: Receive) -> Receive:
        size, complete = 0, False
        deadline = monotonic() + self._options.body_seconds

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - monotonic()))
            except TimeoutError:
                seconds = self._options.body_seconds
                raise Refusal(408, f"expected the whole body within {seconds:g} seconds", code="body_timeout") from None
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self._options.max_body_bytes:
                raise self._too_large()
            return message

        return limited


def _hosts(options: ServeOptions) -> frozenset[str] | None:
    """Names that a client may ask by; None: any.

    Who listens on this machine only is asked by the names of this machine only. Another name is that of a web page
    whose owner lets it resolve to here (DNS rebinding): for the browser our answers would be the page's own.
    """
    here_only = options.host.startswith("127.") or options.host in ("localhost", "::1")
    if not (here_only or options.allowed_hosts):
        return None
    own = f"[{options.host}]" if ":" in options.host else options.host
    return frozenset({"localhost", "127.0.0.1", "[::1]", own.lower(), *map(str.lower, options.allowed_hosts)})


def answer(refused: Refusal) -> JSONResponse:
    """The refusal as a response."""
    return JSONResponse(refused.body, refused.status_code, headers=refused.headers)
