"""A storm over a server: clients of every kind at once, and what each must have got."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as tf
from live_server import Connection, LiveServer

from specdec import Speculator

K = 4
"""What an engine drafts with a draft model that is given no k."""
PATIENT = ("stream", "stream", "slow", "whole", "several", "stop")
"""Clients that want their text to its end."""
RUDE = ("leaves", "leaves", "leaves at once", "malformed", "malformed")
MALFORMED: list[bytes] = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": 5}', b'{"prompt": []}',
    b'{"prompt": [-1]}', b'{"prompt": "x", "max_tokens": 0}',
    b'{"prompt": "x", "max_tokens": 1e9}', b'{"prompt": "x", "temperature": NaN}',
    b'{"prompt": "x", "n": 1000}', b'{"prompt": "x", "stop": ["a", "b", "c", "d", "e"]}', b'{"prompt": [999999]}',
    b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", b"[" * 100_000, b'{"prompt": "' + b"x" * 100_000 + b'"}',
    b'{"prompt": "x", "logit_bias": {"999": 1}}', b'{"prompt": "x", "draft": "tea"}', b'{"prompt": "x", "tools": [1]}',
]  # fmt: skip
RAW = [
    b"GET / HTTP/9.9\r\n\r\n", b"\x00\x01\x02\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 9999999999\r\n\r\n",
]  # fmt: skip
VICTIM = """
import json, socket, sys
body = json.dumps({"prompt": "kill me", "max_tokens": 400, "stream": True, "ignore_eos": True}).encode()
head = b"POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Type: application/json\\r\\n"
open_ones = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(5)]
for one in open_ones:
    one.sendall(head + b"Content-Length: %d\\r\\n\\r\\n" % len(body) + body)
print(open_ones[0].recv(100)[:15].decode(), flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Ask:
    """Seed None is greedy."""

    prompt: str
    max_tokens: int
    seed: int | None
    draft: str

    @property
    def body(self) -> dict[str, Any]:
        law = {"temperature": 0} if self.seed is None else {"seed": self.seed}
        return {"prompt": self.prompt, "max_tokens": self.max_tokens, "draft": self.draft, **law}


class Oracle:
    """Texts by `Speculator.generate` alone, of the models in a folder."""

    def __init__(self, folder: Path):
        self.tokenizer: Any = tf.AutoTokenizer.from_pretrained(folder / "target")
        target, draft = (tf.AutoModelForCausalLM.from_pretrained(folder / role) for role in ("target", "draft"))
        self._by_draft = {
            "model": Speculator(target, draft, k=K), "none": Speculator(target, None),
            "ngram": Speculator(target, "ngram"),
        }  # fmt: skip
        self._known: dict[tuple[Ask, int], str] = {}

    def text(self, ask: Ask, index: int = 0) -> str:
        if (ask, index) not in self._known:
            ids = self.tokenizer(ask.prompt, return_tensors="pt").input_ids
            law: dict[str, Any] = {"do_sample": False}
            if ask.seed is not None:
                law = {"do_sample": True, "top_k": 0, "temperature": 1.0, "seed": ask.seed + index}
            out: Any = self._by_draft[ask.draft].generate(ids, max_new_tokens=ask.max_tokens, **law)
            made = out[0, ids.shape[1] :].tolist()
            self._known[ask, index] = self.tokenizer.decode(made, skip_special_tokens=True)
        return self._known[ask, index]


class ServingStorm:
    """Args: seed: of everything but the clock. count: clients, all at once."""

    def __init__(self, server: LiveServer, oracle: Oracle, seed: int, count: int):
        self.server, self.oracle, self.count = server, oracle, count
        rng = self.rng = random.Random(seed)
        heads = ["the same beginning of several prompts ", "für 日本語 ", "🙂 "]
        self.asks = [
            Ask(rng.choice(heads) + chr(97 + i % 26) * rng.randrange(1, 9), rng.randrange(4, 40),
                rng.choice([None, rng.randrange(2**40)]), rng.choice(["model", "model", "none"]))
            for i in range(max(10, min(60, count // 8)))
        ]  # fmt: skip
        for ask in self.asks:
            oracle.text(ask)
        self.ends: Counter[str] = Counter()

    def run(self) -> None:
        """All of it; raises where anybody got something wrong."""
        kinds = [*PATIENT, *RUDE]
        plans = [
            (kinds[i % len(kinds)], self.rng.choice(self.asks), self.rng.randrange(2**30)) for i in range(self.count)
        ]
        victim = subprocess.Popen(
            [sys.executable, "-S", "-c", VICTIM, str(self.server.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            asyncio.run(self._all(plans))
            assert victim.stdout is not None
            assert victim.stdout.readline().startswith(b"HTTP/1.1 200")
        finally:
            victim.kill()
            victim.communicate()

    async def _all(self, plans: list[tuple[str, Ask, int]]) -> None:
        async with asyncio.TaskGroup() as clients:
            for kind, ask, luck in plans:
                clients.create_task(self._client(kind, ask, random.Random(luck)))

    async def _client(self, kind: str, ask: Ask, rng: random.Random) -> None:
        await asyncio.sleep(rng.random() * self.count / 1000)
        self.ends[kind] += 1
        if kind == "malformed":
            await self._malformed(rng)
        elif kind == "leaves at once":
            (await Connection.post(self.server.port, "/v1/completions", {**ask.body, "stream": True})).abort()
        elif kind in ("whole", "several", "stop"):
            await self._whole(kind, ask, rng)
        else:
            await self._stream(kind, ask, rng)

    async def _malformed(self, rng: random.Random) -> None:
        if rng.random() < 0.2:
            one = await Connection.raw(self.server.port, rng.choice(RAW))
        else:
            one = await Connection.post(self.server.port, "/v1/completions", rng.choice(MALFORMED))
        status = await one.begun()
        assert 400 <= status < 500, status
        await one.close()

    async def _whole(self, kind: str, ask: Ask, rng: random.Random) -> None:
        expected = [self.oracle.text(ask)]
        body = {**ask.body}
        if kind == "several":
            body["n"] = 2
            expected.append(self.oracle.text(ask, 1 if ask.seed is not None else 0))
        if kind == "stop":
            place = rng.randrange(len(expected[0]) or 1)
            stop = expected[0][place : place + 2]
            if stop and "\ufffd" not in stop:
                body["stop"] = [stop, "never said by anybody"]
                expected[0] = expected[0][: expected[0].index(stop)]
        one = await Connection.post(self.server.port, "/v1/completions", body)
        assert await one.begun() == 200
        found = await one.whole()
        assert [choice["text"] for choice in found["choices"]] == expected, (kind, ask)
        await one.close()

    async def _stream(self, kind: str, ask: Ask, rng: random.Random) -> None:
        expected, text, steps = self.oracle.text(ask), "", 0
        one = await Connection.post(self.server.port, "/v1/completions", {**ask.body, "stream": True})
        assert await one.begun() == 200
        last = rng.randrange(1, 6) if kind == "leaves" else None
        async for event in one.events():
            text += event["choices"][0]["text"]
            steps += 1
            if steps == last:
                assert expected.startswith(text), (kind, ask)
                one.abort()
                return
            if kind == "slow":
                await asyncio.sleep(rng.random() * 0.05)
        assert text == expected, (kind, ask)
        await one.close()
