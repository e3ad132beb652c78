"""Whole texts: tokens per second of transformers and specdec on one target, with drafters of known agreement."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.experiments.gpu.clock import Deadline, synchronize
from specdec.experiments.gpu.models import Oracle, counting_llama, successor
from specdec.experiments.gpu.options import GpuOptions
from specdec.report import SpecReport
from specdec.speculator import Speculator
from specdec.verify.passes.choose import GRAPHS

COMPILE_SECONDS = 90.0
"""Least time left for transformers' compiled static cache to be tried."""


class Peer(NamedTuple):
    """`generate(ids, new_tokens)` gives ids and, for specdec, a report."""

    entry: dict[str, Any]
    generate: Callable[[Tensor, int], tuple[Tensor, SpecReport | None]]
    graphs: bool = False


def generate(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
    """One entry per peer: tokens per second, milliseconds per step and part, and whether the text is the right one."""
    target = counting_llama(options.target, options.device, options.dtype, options.seed)
    vocab = options.target.vocab
    start = torch.arange(options.prompt_tokens, device=options.device)[None]
    prompt = (start * 7919 + 17) % vocab
    found = []
    for peer in _peers(options, target):
        if deadline.left < 10 or (peer.entry["peer"] == "hf-static" and deadline.left < COMPILE_SECONDS):
            found.append({**peer.entry, "skipped": "no time left"})
            continue
        found.append({**peer.entry, **_measure(options, peer, prompt, vocab)})
    return found


def _measure(options: GpuOptions, peer: Peer, prompt: Tensor, vocab: int) -> dict[str, Any]:
    try:
        with _graphs(peer.graphs):
            # As long as the real one: transformers compiles per cache length, graphs are captured per shape.
            peer.generate(prompt, options.new_tokens)
            synchronize(options.device)
            begin = time.perf_counter()
            ids, report = peer.generate(prompt, options.new_tokens)
            synchronize(options.device)
            seconds = time.perf_counter() - begin
    except (RuntimeError, ValueError) as fault:
        return {"failed": f"{type(fault).__name__}: {fault}"[:300]}
    new = ids[:, prompt.shape[1] :]
    right = torch.equal(new[:, 1:], successor(new[:, :-1], vocab)) and torch.equal(
        new[:, 0], successor(prompt[:, -1], vocab)
    )
    found: dict[str, Any] = {"tokens_per_second": new.numel() / seconds, "num_tokens": new.numel(), "right": right}
    if report is not None:
        steps = max(1, report.num_steps)
        found |= {
            "mean_acceptance_length": report.mean_acceptance_length,
            "ms_draft": report.ms_draft / steps,
            "ms_verify": report.ms_verify / steps,
            "ms_rest": report.ms_rest / steps,
            "notes": report.notes[:3],
        }
    return found


def _peers(options: GpuOptions, target: PreTrainedModel) -> Iterator[Peer]:
    """Lazily, so that one draft model is in memory at a time."""
    yield Peer({"peer": "hf-plain"}, partial(_hf, target, {}))
    cuda = options.device.startswith("cuda")
    for graphs in (False, True) if cuda else (False,):
        name = "specdec-graphs" if graphs else "specdec"
        yield Peer({"peer": f"{name}-plain"}, partial(_specdec, Speculator(target, None)), graphs)
        for k, alpha in _settings(options):
            oracle = Oracle(options.target.vocab, k, alpha, options.seed)
            entry = {"peer": f"{name}-oracle", "k": k, "alpha": alpha}
            yield Peer(entry, partial(_specdec, Speculator(target, oracle)), graphs)
    for alpha in options.alphas:
        draft = counting_llama(options.draft, options.device, options.dtype, options.seed + 1, alpha)
        for k, own in _settings(options):
            if own != alpha:
                continue
            entry = {"k": k, "alpha": alpha}
            yield Peer({"peer": "hf-assisted", **entry}, partial(_assisted, target, draft, k))
            for graphs in (False, True) if cuda else (False,):
                name = "specdec-graphs-model" if graphs else "specdec-model"
                spec = Speculator(target, draft, k=k)
                yield Peer({"peer": name, **entry}, partial(_specdec, spec), graphs)
    yield Peer({"peer": "hf-static"}, partial(_hf, target, {"cache_implementation": "static"}))


def _settings(options: GpuOptions) -> list[tuple[int, float]]:
    """Every k at the middle alpha, and every alpha at the middle k."""
    k, alpha = options.k[len(options.k) // 2], options.alphas[len(options.alphas) // 2]
    return [(each, a) for a in options.alphas for each in options.k if each == k or a == alpha]


def _hf(target: Any, arguments: dict[str, Any], ids: Tensor, new_tokens: int) -> tuple[Tensor, None]:
    mask = torch.ones_like(ids)
    return target.generate(
        ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, **arguments
    ), None  # fmt: skip


def _assisted(target: Any, draft: Any, k: int, ids: Tensor, new_tokens: int) -> tuple[Tensor, None]:
    config = draft.generation_config  # transformers reads these three there
    config.num_assistant_tokens = k
    config.num_assistant_tokens_schedule = "constant"
    config.assistant_confidence_threshold = 0.0
    return _hf(target, {"assistant_model": draft}, ids, new_tokens)


def _specdec(spec: Speculator, ids: Tensor, new_tokens: int) -> tuple[Tensor, SpecReport | None]:
    out = spec.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
    assert isinstance(out, Tensor)
    return out, spec.report


@contextlib.contextmanager
def _graphs(on: bool) -> Iterator[None]:
    before = os.environ.get(GRAPHS)
    os.environ[GRAPHS] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[GRAPHS]
        else:
            os.environ[GRAPHS] = before
