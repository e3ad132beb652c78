"""Who generates what: the ways that are compared, and their prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdec.drafters import NgramDrafter
from specdec.experiments.pair import Models
from specdec.experiments.planner.options import Workload
from specdec.experiments.ways import Generate, speculating, transformers_own
from specdec.speculator import Speculator

MODEL_KS = (1, 2, 3, 4, 6, 8, 10, 12)
NGRAM_KS = (1, 2, 4, 6, 10)
TREES = ((2, 1, 1), (2, 1, 1, 1, 1))
"""The fixed settings of a sweep."""


class Ways:
    """Ways to generate from one pair at one temperature, by name. What is drawn comes from the global generator."""

    def __init__(self, models: Models, temperature: float, seeded: bool):
        """`seeded`: planned calls get `seed=` instead, with which every row of a sampled call is planned by itself."""
        self._models, self._temperature, self._seeded = models, temperature, seeded
        self._drafts: dict[str, Any] = {"model": models.draft, "ngram": "ngram", "both": [models.draft, "ngram"]}

    def sweep(self, tokens: int, rule: str) -> dict[str, Generate]:
        """Plain decoding, every fixed setting, and every drafter, planned."""
        draft = self._models.draft
        fixed: dict[str, dict[str, Any]] = {
            "none": {},
            **{f"model k={k}": dict(draft=draft, k=k) for k in MODEL_KS},
            **{f"model tree={tree}": dict(draft=draft, tree=tree) for tree in TREES},
            **{f"ngram k={k}": dict(draft=NgramDrafter(k=k)) for k in NGRAM_KS},
        }
        planned = {"model": "model", "ngram": "ngram", "model+ngram": "both"}
        return {
            **{name: self._own(tokens, rule=rule, **how) for name, how in fixed.items()},
            **{f"planned {name}": self._planned(tokens, self._drafts[draft], rule) for name, draft in planned.items()},
        }

    def never_slower(self, workload: Workload) -> dict[str, Generate]:
        """Plain generation, specdec without a drafter (twice: how far equal ways differ), and the planned drafter."""
        drafts = {**self._drafts, "junk": untrained(self._models.draft)}
        return {
            "hf plain": transformers_own(self._models.target, workload.tokens, self._temperature),
            "none": self._own(workload.tokens),
            "none again": self._own(workload.tokens),
            "planned": self._planned(workload.tokens, drafts[workload.draft]),
        }

    def _own(self, tokens: int, seeded: bool = False, **how: Any) -> Generate:
        return speculating(Speculator(self._models.target, **how), tokens, self._temperature, seeded)

    def _planned(self, tokens: int, draft: Any, rule: str = "auto") -> Generate:
        return self._own(tokens, self._seeded, draft=draft, rule=rule)


def untrained(draft: Any) -> Any:
    """A draft model of the same shape that has learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return type(draft)._from_config(draft.config, dtype=draft.dtype).eval()


def prompts(models: Models, kind: str, rows: int, count: int, length: int) -> list[Tensor]:
    """`count` batches of `rows` prompts, int64 `[rows, length]`: "held-out" text or "random" tokens."""
    if kind == "held-out":
        return models.prompts(rows * count, length, rows=rows)
    generator = torch.Generator().manual_seed(7)
    vocab = int(models.target.config.vocab_size)
    return [torch.randint(3, vocab, (rows, length), generator=generator) for _ in range(count)]
