"""Write a pair folder: both models in half precision, tokenizer, and their cards."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.experiments.corpus import corpus_record
from specdec.experiments.train_pair.state import TrainingState
from specdec.shown_errors import ExperimentError


def rounding_error(weights: list[Tensor], dtype: torch.dtype) -> float:
    """Sum of squared changes when the weights are stored in `dtype` (infinite if one overflows)."""
    return sum((weight - weight.to(dtype).float()).double().square().sum().item() for weight in weights)


def better_half(model: LlamaForCausalLM) -> torch.dtype:
    """float16 or bfloat16, whichever loses less of these weights."""
    weights = [parameter.detach().float() for parameter in model.parameters()]
    return min((torch.float16, torch.bfloat16), key=lambda dtype: rounding_error(weights, dtype))


def export_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> torch.dtype:
    """Save a half-precision copy of `model` with its tokenizer; returns the precision."""
    dtype = better_half(model)
    half = copy.deepcopy(model)
    torch.nn.Module.to(half, "cpu", dtype)
    half.config.use_cache = True
    half.save_pretrained(directory)
    for setting in ("local_files_only", "is_local"):  # how it was loaded here is no property of the tokenizer
        tokenizer.init_kwargs.pop(setting, None)
    tokenizer.save_pretrained(directory)
    return dtype


def export_pair(state: TrainingState, pair: Path) -> None:
    """Write `target/`, `draft/` and `training.json` (what was done, on what) below `pair`."""
    record = corpus_record()
    if record.sha256 != state.corpus_sha256:
        raise ExperimentError(f"expected the corpus {state.corpus_sha256} of the run, got {record.sha256}")
    dtypes = {
        role: str(export_model(model, state.tokenizer, pair / role)).removeprefix("torch.")
        for role, model in (("target", state.target), ("draft", state.draft))
    }
    training = {
        "recipe": asdict(state.recipe),
        "phase": state.phase,
        "step": state.step,
        "tokens_per_epoch": state.stream.num_tokens,
        "corpus": asdict(record),
        "dtypes": dtypes,
        "num_parameters": {
            role: sum(p.numel() for p in model.parameters())
            for role, model in (("target", state.target), ("draft", state.draft))
        },
        "torch": torch.__version__,
    }
    (pair / "training.json").write_text(json.dumps(training, indent=2) + "\n")
