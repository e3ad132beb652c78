"""A server's application without a process or a socket: one request at a time, by httpx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import transformers as tf

from specdec.engine import Engine
from specdec.serve import ServeOptions, create_app

NAME = "tiny"


class InProcess:
    """Attributes: app, engine, tokenizer."""

    def __init__(self, folder: Path, options: ServeOptions | None = None, **engine: Any):
        self.tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder / "target")
        target, draft = (tf.AutoModelForCausalLM.from_pretrained(folder / role) for role in ("target", "draft"))
        sizes: dict[str, Any] = {"num_pages": 200, "page_size": 16, "drafters": {"ngram": "ngram"}, **engine}
        self.engine = Engine(target, draft, tokenizer=self.tokenizer, **sizes)
        self.app = create_app(self.engine, self.tokenizer, NAME, options)

    def request(self, method: str, path: str, prefix: str = "", **more: Any) -> httpx.Response:
        """prefix: where the application is mounted, which `path` begins with then."""

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, root_path=prefix)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, timeout=60, **more)

        return asyncio.run(ask())

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.request("POST", f"/v1/{path}", json=body)

    def text(self, path: str = "completions", **body: Any) -> Any:
        """The answer, which must be one."""
        found = self.post(path, **body)
        assert found.status_code == 200, found.text
        return found.json()

    def events(self, path: str = "completions", **body: Any) -> list[dict[str, Any]]:
        found = self.post(path, **body, stream=True)
        assert found.headers["content-type"].startswith("text/event-stream"), found.text
        *events, done, rest = found.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def in_process(folder: Path, options: ServeOptions | None = None, **engine: Any) -> Iterator[InProcess]:
    """With the engine's thread running inside the block."""
    made = InProcess(folder, options, **engine)
    with made.engine:
        yield made
    assert made.engine.pool.num_held_pages == 0
