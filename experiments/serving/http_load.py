"""The same workload over HTTP: streamed completions as any client of OpenAI's API asks for them.

One thread reads all connections and keeps what comes, and when; what it means is found out when the clock has stopped.
So a server that shares the machine with its client loses as little to it as possible.
"""

from __future__ import annotations

import json
import socket
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from selectors import EVENT_READ, DefaultSelector
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from specdec.experiments.serving.ways import Outcome, Served, Workload
from specdec.shown_errors import ExperimentError

SECONDS = 600
"""For anything to come from a server."""


@dataclass
class _Answer:
    """As it came. parts: times and bytes."""

    start: float = 0.0
    parts: list[tuple[float, bytes]] = field(default_factory=list)

    @property
    def status(self) -> int:
        head = self.parts[0][1].split(b" ", 2) if self.parts else []
        return int(head[1]) if len(head) > 1 else 0

    def lines(self) -> Iterator[tuple[float, bytes]]:
        """Of its body, transfer chunks taken apart."""
        ends, raw = [], b""
        for time, part in self.parts:
            raw += part
            ends.append((len(raw), time))
        place, body, times = raw.index(b"\r\n\r\n") + 4, b"", iter(ends)
        end, time = next(times)
        while place < len(raw):
            size = int(raw[place : (begin := raw.index(b"\r\n", place) + 2)], 16)
            place = begin + size + 2
            while end < begin + size:
                end, time = next(times)
            *whole, body = (body + raw[begin : begin + size]).split(b"\n")
            for line in whole:
                yield time, line


def serve_by_http(
    address: str, tokenizer: Any, body: Callable[[Workload, int], Mapping[str, Any]], work: Workload, seed: int
) -> Outcome:
    """Ask a server for everything. Prompts are sent as text; of answers, tokens are what their text is encoded to.

    Args:
        body: the fields of every request but its prompt, from the workload and a seed.
    """
    fields = {**body(work, seed), "stream": True}
    texts = [tokenizer.decode(list(prompt)) for prompt in work.prompts]
    answers = _answers(address, [json.dumps({**fields, "prompt": text}).encode() for text in texts], work.concurrency)
    return Outcome([_served(address, answer, tokenizer) for answer in answers], by_ids=False)


def _served(address: str, answer: _Answer, tokenizer: Any) -> Served:
    if answer.status != 200:
        told = b"".join(part for _, part in answer.parts)[-300:]
        raise ExperimentError(f"{address}: {answer.status} {told!r}")
    found = [(time, text) for time, line in answer.lines() if (text := _text(line))]
    tokens = tokenizer("".join(text for _, text in found), add_special_tokens=False).input_ids
    if not tokens:
        raise ExperimentError(f"{address}: expected a text, got none")
    # What came together is spread over the tokens that came by then.
    times = [time for time, _ in found]
    spread = [times[min(len(times) - 1, i * len(times) // len(tokens))] for i in range(len(tokens) - 1)]
    return Served(answer.start, [*spread, times[-1]], tokens)


def _text(line: bytes) -> str:
    if not line.startswith(b"data: {"):
        return ""
    choices = json.loads(line[6:]).get("choices") or [{}]
    return choices[0].get("text") or ""


def _answers(address: str, bodies: list[bytes], concurrency: int) -> list[_Answer]:
    place = urlsplit(address)
    at = (str(place.hostname), place.port or 80)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    answers = [_Answer() for _ in bodies]
    waiting, under_way = deque(zip(answers, bodies, strict=True)), 0
    with DefaultSelector() as selector:
        try:
            while waiting or under_way:
                while waiting and under_way < concurrency:
                    answer, body = waiting.popleft()
                    answer.start = perf_counter()
                    connection = socket.create_connection(at, SECONDS)
                    selector.register(connection, EVENT_READ, answer)
                    length = f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
                    connection.sendall(f"{head}{length}".encode() + body)
                    under_way += 1
                if not (ready := selector.select(SECONDS)):
                    raise ExperimentError(f"{address}: nothing came for {SECONDS} seconds")
                for key, _ in ready:
                    assert isinstance(key.fileobj, socket.socket)
                    if part := key.fileobj.recv(1 << 16):
                        key.data.parts.append((perf_counter(), part))
                        continue
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    under_way -= 1
        finally:
            for key in list(selector.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()
    return answers
