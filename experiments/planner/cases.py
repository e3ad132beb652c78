"""Who generates what: the ways that are compared, and the workloads meant to make drafting look bad."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.drafters import NgramDrafter
from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.bench.pair import Pair, prompt_batches
from specdec.report import SpecReport
from specdec.trace import StepTrace

MODEL_KS = (1, 2, 3, 4, 6, 8, 10, 12)
NGRAM_KS = (1, 2, 4, 6, 10)
TREES = ((2, 1, 1), (2, 1, 1, 1, 1))
"""The fixed settings of a sweep."""


class Generate(Protocol):
    """One way to generate: prompts, seed, and who hears of every step (if the way has steps)."""

    def __call__(
        self, ids: Tensor, seed: int, on_step: Callable[[StepTrace], None] | None = None
    ) -> SpecReport | None: ...


@dataclass(frozen=True)
class Models:
    """The shipped pair and a draft model that has learned nothing."""

    pair: Pair
    junk: PreTrainedModel

    @staticmethod
    def load() -> Models:
        pair = Pair.load(BenchOptions())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: Any = type(pair.draft)._from_config(pair.draft.config, dtype=pair.draft.dtype)
        return Models(pair, made.eval())


def sampling(temperature: float) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    # transformers would otherwise cut every law to its default of 50 tokens
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


def hugging_face(models: Models, temperature: float, tokens: int) -> Generate:
    target: Any = models.pair.target

    def generate(ids: Tensor, seed: int, on_step: object = None) -> None:
        torch.manual_seed(seed)
        target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **sampling(temperature))

    return generate


def speculating(
    models: Models, temperature: float, tokens: int, draft: Any = None, seeded: bool = False, **options: Any
) -> Generate:
    """Like `hugging_face`, with the global generator set before the call.

    Args:
        seeded: by `seed=` instead, with which every row of a sampled call is planned by itself.
    """
    spec = specdec.Speculator(models.pair.target, draft, **options)

    def generate(ids: Tensor, seed: int, on_step: Callable[[StepTrace], None] | None = None) -> SpecReport | None:
        torch.manual_seed(seed)
        spec.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, seed=seed if seeded else None,
            on_step=on_step, **sampling(temperature),
        )  # fmt: skip
        return spec.report

    return generate


def planned(models: Models, temperature: float, tokens: int, rule: str, seeded: bool = False) -> dict[str, Generate]:
    """Every drafter, planned."""
    drafts: dict[str, Any] = {"model": models.pair.draft, "ngram": "ngram", "model+ngram": [models.pair.draft, "ngram"]}
    return {f"planned {name}": speculating(models, temperature, tokens, draft, seeded, rule=rule)
            for name, draft in drafts.items()}  # fmt: skip


def fixed(models: Models, temperature: float, tokens: int, rule: str) -> dict[str, Generate]:
    """Every fixed setting, and plain decoding."""

    def way(draft: Any = None, **options: Any) -> Generate:
        return speculating(models, temperature, tokens, draft, rule=rule, **options)

    ways = {"none": way()}
    for k in MODEL_KS:
        ways[f"model k={k}"] = way(models.pair.draft, k=k)
    for tree in TREES:
        ways[f"model tree={tree}"] = way(models.pair.draft, tree=tree)
    for k in NGRAM_KS:
        ways[f"ngram k={k}"] = way(NgramDrafter(k=k))
    return ways


def prompts(models: Models, kind: str, rows: int, count: int, length: int) -> list[Tensor]:
    """`count` batches of `rows` prompts, int64 `[rows, length]`: "held-out" text or "random" tokens."""
    if kind == "held-out":
        options = BenchOptions(num_prompts=rows * count, batch=rows, prompt_tokens=length)
        return prompt_batches(models.pair, options)
    generator = torch.Generator().manual_seed(7)
    vocab = int(models.pair.target.config.vocab_size)
    return [torch.randint(3, vocab, (rows, length), generator=generator) for _ in range(count)]


@dataclass(frozen=True)
class Workload:
    """One adversarial workload: prompts, how long the texts get, and what drafts."""

    name: str
    prompts: str
    tokens: int
    draft: str

    def ways(self, models: Models, temperature: float, seeded: bool = False) -> dict[str, Generate]:
        """Plain generation, specdec without a drafter (twice: how far equal ways differ), and the planned drafter."""
        draft: Any = {
            "model": models.pair.draft, "junk": models.junk, "ngram": "ngram", "both": [models.pair.draft, "ngram"]
        }[self.draft]  # fmt: skip
        return {
            "hf plain": hugging_face(models, temperature, self.tokens),
            "none": speculating(models, temperature, self.tokens),
            "none again": speculating(models, temperature, self.tokens),
            "planned": speculating(models, temperature, self.tokens, draft, seeded),
        }


WORKLOADS = (
    Workload("random prompts, model", "random", 96, "model"),
    Workload("random prompts, both", "random", 96, "both"),
    Workload("untrained drafter", "held-out", 96, "junk"),
    Workload("long outputs, untrained drafter", "held-out", 256, "junk"),
    Workload("long outputs, ngram", "held-out", 256, "ngram"),
    Workload("long outputs, both", "held-out", 256, "both"),
)
