"""Ways to serve many requests, each timed by the same rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from specdec.engine import Engine
from specdec.experiments.pair import Models
from specdec.experiments.ways import Way, sampling


class Workload(NamedTuple):
    """`concurrency` requests are under way at any time until all prompts are done; greedy, or sampled when
    temperature > 0; each ends after `new_tokens`."""

    prompts: Sequence[Sequence[int]]
    concurrency: int
    new_tokens: int
    temperature: float


class Served(NamedTuple):
    """One request: when it was taken up, when each of its tokens was there (seconds on one clock), and the tokens."""

    start: float
    times: list[float]
    tokens: list[int]


@dataclass(frozen=True)
class Outcome:
    """All requests of one run, and accepted draft tokens per draft where there are any. by_ids: tokens are what was
    generated, and not what text is encoded to. cpu_seconds: of the process that served, where it is another one."""

    served: list[Served]
    acceptance_length: float | None = None
    by_ids: bool = True
    cpu_seconds: float | None = None


Serve = Callable[[Workload, int], Outcome]
"""A way to serve everything, ready to be timed: a workload and a seed."""


def all_ways(k: int) -> list[Way]:
    """The engine as it is by default, with fixed chains of k, without drafts; and `transformers`' two ways. Made ready
    from the models, the most requests under way at once, and where to leave what must be ended."""

    def engine(k: int | None, adaptive: bool, models: Models, most: int, ending: object) -> Serve:
        draft = None if k is None else models.draft_model or "ngram"
        made = Engine(models.target, draft, k=k, adaptive=adaptive, max_rows=most, num_bytes=256 << 20)
        return partial(serve_by_engine, made)

    return [
        Way("engine", partial(engine, k, True)),
        Way(f"engine-k{k}", partial(engine, k, False)),
        Way("engine-plain", partial(engine, None, False)),
        Way("hf-generate", lambda models, most, ending: partial(serve_in_batches, models.target)),
        Way("hf-generate-batch", lambda models, most, ending: partial(serve_continuously, models.target)),
    ]


def serve_by_engine(engine: Engine, work: Workload, seed: int) -> Outcome:
    """`specdec.Engine`; a new request is submitted whenever one is done."""
    torch.manual_seed(seed)
    before = engine.metrics()
    waiting = list(enumerate(work.prompts))
    running: dict[int, Any] = {}
    served = [Served(0.0, [], []) for _ in work.prompts]
    while waiting or running:
        while waiting and len(running) < work.concurrency:
            i, prompt = waiting.pop(0)
            served[i] = Served(perf_counter(), [], [])
            running[i] = engine.submit(prompt, max_new_tokens=work.new_tokens, **sampling(work.temperature))
        engine.step()
        now = perf_counter()
        for i, handle in list(running.items()):
            served[i].times.extend([now] * (len(handle.token_ids) - len(served[i].times)))
            if handle.done:
                served[i].tokens.extend(handle.result().token_ids)
                del running[i]
    after = engine.metrics()
    drafts = after.num_drafts - before.num_drafts
    kept = after.num_accepted_tokens - before.num_accepted_tokens
    return Outcome(served, 1 + kept / drafts if drafts else None)


def serve_in_batches(target: Any, work: Workload, seed: int) -> Outcome:
    """`target.generate` on batches of `concurrency` prompts of one length."""
    torch.manual_seed(seed)
    served = []
    for first in range(0, len(work.prompts), work.concurrency):
        ids = torch.tensor([list(prompt) for prompt in work.prompts[first : first + work.concurrency]])
        clock = _Clock()
        start = perf_counter()
        out = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=work.new_tokens, streamer=clock,
            **sampling(work.temperature),
        )  # fmt: skip
        served += [Served(start, list(clock.times), row[ids.shape[1] :].tolist()) for row in out]
    return Outcome(served)


def serve_continuously(target: Any, work: Workload, seed: int) -> Outcome:
    """`target.generate_batch`: the continuous batching of `transformers`. Its start-up is left out of the clock."""
    config = GenerationConfig(
        max_new_tokens=work.new_tokens, pad_token_id=0, eos_token_id=-1, **sampling(work.temperature)
    )
    blocks = work.concurrency * (2 + (len(work.prompts[0]) + work.new_tokens) // 256)
    batching = ContinuousBatchingConfig(
        max_requests_per_batch=work.concurrency, num_blocks=blocks, max_batch_tokens=512, seed=seed
    )
    outputs = target.generate_batch(
        inputs=[list(prompt) for prompt in work.prompts], generation_config=config,
        continuous_batching_config=batching, record_timestamps=True, progress_bar=False,
    )  # fmt: skip
    ordered = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
    return Outcome([Served(one.lifespan[0], list(one.timestamps), list(one.generated_tokens)) for one in ordered])


class _Clock(BaseStreamer):
    """When each column of tokens was there; the first `put` is the prompt."""

    def __init__(self) -> None:
        self._seen_prompt = False
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self._seen_prompt:
            self.times.append(perf_counter())
        self._seen_prompt = True

    def end(self) -> None:
        """Nothing to flush."""
