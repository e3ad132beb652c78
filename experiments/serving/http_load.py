"""The same workload over HTTP: streamed completions as any client of OpenAI's API asks for them, one thread each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from specdec.experiments.serving.ways import Outcome, Served, Workload
from specdec.shown_errors import ExperimentError

SECONDS = 600
"""For one answer."""


def serve_by_http(
    address: str, tokenizer: Any, body: Callable[[Workload, int], Mapping[str, Any]], work: Workload, seed: int
) -> Outcome:
    """Ask a server for everything. Prompts are sent as text; of answers, tokens are what their text is encoded to.

    Args:
        body: the fields of every request but its prompt, from the workload and a seed.
    """
    fields = dict(body(work, seed))

    def one(prompt: str) -> Served:
        start, times, texts = perf_counter(), [], []
        for text in _pieces(address, {**fields, "prompt": prompt, "stream": True}):
            times.append(perf_counter())
            texts.append(text)
        tokens = tokenizer("".join(texts), add_special_tokens=False).input_ids
        if not times or not tokens:
            raise ExperimentError(f"{address}: expected a text, got none")
        # What came together is spread over the tokens that came by then.
        spread = [times[min(len(times) - 1, i * len(times) // len(tokens))] for i in range(len(tokens) - 1)]
        return Served(start, [*spread, times[-1]], tokens)

    with ThreadPoolExecutor(work.concurrency) as clients:
        served = list(clients.map(one, [tokenizer.decode(list(prompt)) for prompt in work.prompts]))
    return Outcome(served, by_ids=False)


def _pieces(address: str, body: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a stream's chunks, as they come; empty ones are left out."""
    place = urlsplit(address)
    connection = HTTPConnection(str(place.hostname), place.port, timeout=SECONDS)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ExperimentError(f"{address}: {answer.status} {answer.read()[:300]!r}")
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices") or [{}]
            if text := choices[0].get("text"):
                yield text
    finally:
        connection.close()
