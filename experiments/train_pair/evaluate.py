"""The numbers of a finished pair: held-out loss, acceptance, cost of a step; independent of the library's loop."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from specdec.experiments.clock import timed
from specdec.experiments.corpus import held_out_texts
from specdec.experiments.pair import Models
from specdec.experiments.train_pair.acceptance import continue_text, greedy_agreement, sampled_acceptance, walk_chains
from specdec.kv.versions import cached

WINDOWS_PER_FILE = 8  # long files count no more than this, so that no single one decides the number


@dataclass(frozen=True)
class PairReport:
    """What `evaluate` prints. Losses are nats per token; rates are fractions."""

    held_out_loss_target: float
    held_out_loss_draft: float
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    k: int
    greedy_agreement: float
    acceptance_per_position: tuple[float, ...]
    mean_acceptance_length: float
    sampled_acceptance: float
    repeated_share: float
    target_step_ms: float
    draft_step_ms: float
    cost_ratio: float
    cost_ratio_fastest: float
    threads: int
    cpu: str


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, length: int = 512) -> float:
    """Mean cross-entropy per token over the first windows of every held-out file."""
    total, count = 0.0, 0
    for text in held_out_texts():
        ids = torch.tensor(tokenizer.backend_tokenizer.encode(text).ids[: WINDOWS_PER_FILE * length])
        for window in ids.split(length):
            if len(window) > 1:
                logits = model(window[None], use_cache=False).logits[0, :-1].float()
                total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
                count += len(window) - 1
    return total / count


@torch.inference_mode()
def step_costs(models: list[Any], context: int = 128, rounds: int = 200, warmup: int = 10) -> list[list[float]]:
    """Sorted milliseconds of cached single-token forwards of each model, measured in turn in one process."""
    ids = torch.full((1, context), 1)
    caches = []
    for model in models:
        cache = DynamicCache(config=model.config)
        model(ids, **cached(model, cache))
        caches.append(cache)
    times: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + warmup):
        for model, cache, spent in zip(models, caches, times, strict=True):
            spent.append(timed(partial(model, ids[:, :1], **cached(model, cache)))[1].ms)
    return [sorted(spent[warmup:]) for spent in times]


def repeated_share(rows: list[list[int]], n: int = 8) -> float:
    """Share of the texts' n-grams that occurred before in the same text: how much of it is loops."""
    repeated = total = 0
    for row in rows:
        seen: set[tuple[int, ...]] = set()
        for i in range(len(row) - n + 1):
            gram = tuple(row[i : i + n])
            repeated += gram in seen
            total += 1
            seen.add(gram)
    return repeated / max(1, total)


def evaluate_pair(
    pair: Path, *, num_prompts: int = 40, prompt_tokens: int = 64, new_tokens: int = 192, k: int = 4, rows: int = 20
) -> PairReport:
    """Measure the pair on held-out prompts; `rows` prompts run together."""
    models = Models.load(pair, ends=True)
    target, draft, tokenizer = models.target, models.draft, models.tokenizer
    generator = torch.Generator().manual_seed(0)
    agreements: list[list[bool]] = []
    texts: list[list[int]] = []
    overlaps: list[float] = []
    for batch in models.prompts(num_prompts, prompt_tokens, rows=rows):
        greedy: Tensor = continue_text(target, batch, new_tokens)
        agreements += greedy_agreement(draft, greedy, prompt_tokens, tokenizer.eos_token_id)
        texts += greedy[:, prompt_tokens:].tolist()
        sampled = continue_text(target, batch, new_tokens // 2, generator)
        overlaps += [sampled_acceptance(target, draft, sampled, prompt_tokens)] * len(batch)
    walks = [walk_chains(agreement, k) for agreement in agreements]
    reached = [sum(walk[0][j] for walk in walks) for j in range(k)]
    accepted = [sum(walk[1][j] for walk in walks) for j in range(k)]
    num_steps = sum(walk[2] for walk in walks)
    num_tokens = sum(map(len, agreements))
    times = step_costs([target, draft])
    target_ms, draft_ms = map(statistics.median, times)
    return PairReport(
        held_out_loss_target=held_out_loss(target, tokenizer), held_out_loss_draft=held_out_loss(draft, tokenizer),
        num_prompts=num_prompts, prompt_tokens=prompt_tokens, new_tokens=new_tokens, k=k,
        greedy_agreement=sum(map(sum, agreements)) / num_tokens,
        acceptance_per_position=tuple(a / max(1, r) for a, r in zip(accepted, reached, strict=True)),
        mean_acceptance_length=num_tokens / num_steps, sampled_acceptance=statistics.mean(overlaps),
        repeated_share=repeated_share(texts), target_step_ms=target_ms, draft_step_ms=draft_ms,
        cost_ratio=target_ms / draft_ms,
        cost_ratio_fastest=times[0][0] / times[1][0],  # what other work on the machine disturbs least
        threads=torch.get_num_threads(), cpu=platform.processor() or platform.machine(),
    )  # fmt: skip
