"""Loading the models under test."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from specdec.experiments.bench.options import BenchOptions


@dataclass(frozen=True)
class Pair:
    """A target, its draft model and their tokenizer."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: Any

    @staticmethod
    def load(folder: Path, options: BenchOptions) -> Pair:
        dtype = getattr(torch, options.dtype)
        return Pair(
            target=_model(folder / "target", dtype, options.device),
            draft=_model(folder / "draft", dtype, options.device),
            tokenizer=AutoTokenizer.from_pretrained(folder / "target", trust_remote_code=False, local_files_only=True),
        )


def _model(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True
    )
    # Without an end token every peer generates exactly `new_tokens`. `min_new_tokens` would do so too, but with a
    # logits processor that costs each peer a different amount of time.
    model.generation_config = GenerationConfig(pad_token_id=0)
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def prompt_batches(pair: Pair, options: BenchOptions) -> list[Tensor]:
    """Held-out prompts as int64 `[batch, prompt_tokens]` tensors, one per call."""
    from specdec.experiments.corpus import held_out_prompts

    prompts = held_out_prompts(pair.tokenizer, options.num_prompts, options.prompt_tokens, seed=options.seed)
    ids = torch.tensor(prompts, device=options.device)
    return list(ids.split(options.batch))
