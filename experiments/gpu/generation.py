"""Whole texts: tokens per second of transformers and specdec on one target, with drafters of known agreement."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.experiments.clock import Deadline, timed
from specdec.experiments.gpu.models import Oracle, counting_llama, successor
from specdec.experiments.gpu.options import GpuOptions
from specdec.experiments.ways import Way, assisted, speculating, transformers_own
from specdec.speculator import Speculator
from specdec.verify.passes.choose import GRAPHS

COMPILE_SECONDS = 90.0
"""Least time left for transformers' compiled static cache to be tried."""


def generate(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
    """One entry per way: tokens per second, milliseconds per step and part, and whether the text is the right one."""
    target = counting_llama(options.target, options.device, options.torch_dtype, options.seed)
    vocab = options.target.vocab
    start = torch.arange(options.prompt_tokens, device=options.device)[None]
    prompt = (start * 7919 + 17) % vocab
    found = []
    for way in _ways(options, target):
        entry = {"peer": way.name, **way.facts}
        if deadline.left < 10 or (way.name == "hf-static" and deadline.left < COMPILE_SECONDS):
            found.append({**entry, "skipped": "no time left"})
        else:
            found.append({**entry, **_measure(options, way, prompt, vocab)})
    return found


def _measure(options: GpuOptions, way: Way, prompt: Tensor, vocab: int) -> dict[str, Any]:
    try:
        with graphs("graphs" in way.name):
            call = partial(way.ready(), prompt, options.seed)
            call()  # as long as the real one: transformers compiles per cache length, graphs are captured per shape
            output, spent = timed(call, options.device)
    except (RuntimeError, ValueError) as fault:
        return {"failed": f"{type(fault).__name__}: {fault}"[:300]}
    new, report = output.ids[:, prompt.shape[1] :], output.report
    before = torch.cat([prompt[:, -1:], new[:, :-1]], 1)
    found: dict[str, Any] = {
        "tokens_per_second": new.numel() / spent.wall, "num_tokens": new.numel(),
        "right": torch.equal(new, successor(before, vocab)),
    }  # fmt: skip
    if report is not None:
        steps = max(1, report.num_steps)
        found |= {name: getattr(report, name) / steps for name in ("ms_draft", "ms_verify", "ms_rest")}
        found |= {"mean_acceptance_length": report.mean_acceptance_length, "notes": report.notes[:3]}
    return found


def _ways(options: GpuOptions, target: PreTrainedModel) -> Iterator[Way]:
    """Lazily, so that one draft model is in memory at a time."""
    names = ("specdec", "specdec-graphs") if options.device.startswith("cuda") else ("specdec",)
    tokens = options.new_tokens

    def own(draft: Any, **how: Any) -> Callable[[], Any]:
        return lambda: speculating(Speculator(target, draft, **how), tokens, seeded=False)

    yield Way("hf-plain", lambda: transformers_own(target, tokens))
    for name in names:
        yield Way(f"{name}-plain", own(None))
        for k, alpha in _settings(options):
            oracle = Oracle(options.target.vocab, k, alpha, options.seed)
            yield Way(f"{name}-oracle", own(oracle), facts={"k": k, "alpha": alpha})
    for alpha in options.alphas:
        draft = counting_llama(options.draft, options.device, options.torch_dtype, options.seed + 1, alpha)
        for k in (k for k, wanted in _settings(options) if wanted == alpha):
            facts = {"k": k, "alpha": alpha}
            yield Way("hf-assisted", partial(assisted, target, draft, k, tokens), facts=facts)
            for name in names:
                yield Way(f"{name}-model", own(draft, k=k), facts=facts)
    yield Way("hf-static", lambda: transformers_own(target, tokens, cache_implementation="static"))


def _settings(options: GpuOptions) -> list[tuple[int, float]]:
    """Every k at the middle alpha, and every alpha at the middle k."""
    k, alpha = options.k[len(options.k) // 2], options.alphas[len(options.alphas) // 2]
    return [(each, a) for a in options.alphas for each in options.k if each == k or a == alpha]


def graphs(on: bool) -> contextlib.AbstractContextManager[Any]:
    """Inside, passes run as CUDA graphs, or do not."""
    return mock.patch.dict(os.environ, {GRAPHS: "1" if on else "0"})
