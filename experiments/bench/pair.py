"""Loading the models under test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from specdec.experiments.bench.options import BenchOptions
from specdec.pairing.loading import load_pair


@dataclass(frozen=True)
class Pair:
    """A target, its draft model and their tokenizer."""

    target: PreTrainedModel
    draft: PreTrainedModel
    tokenizer: Any

    @staticmethod
    def load(options: BenchOptions) -> Pair:
        """The models that `options` name.

        Raises:
            PairError: no such pair; SpecdecError: models that cannot be loaded, or whose vocabularies differ.
        """
        target, draft, tokenizer = load_pair(options.chosen_pair(), getattr(torch, options.dtype), options.device)
        assert isinstance(draft, PreTrainedModel)
        for model in (target, draft):
            # Without an end token every peer generates exactly `new_tokens`. `min_new_tokens` would do so too, but with
            # a logits processor that costs each peer a different amount of time.
            model.generation_config = GenerationConfig(pad_token_id=0)
        return Pair(target, draft, tokenizer)


def prompt_batches(pair: Pair, options: BenchOptions) -> list[Tensor]:
    """Held-out prompts as int64 `[batch, prompt_tokens]` tensors, one per call."""
    from specdec.experiments.corpus import held_out_prompts

    prompts = held_out_prompts(pair.tokenizer, options.num_prompts, options.prompt_tokens, seed=options.seed)
    ids = torch.tensor(prompts, device=options.device)
    return list(ids.split(options.batch))
