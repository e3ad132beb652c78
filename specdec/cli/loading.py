"""From a choice on the command line to loaded models. Imports torch: commands import this module when they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import typer
from transformers import PreTrainedModel
from transformers.utils import logging

from specdec.cli.options import ModelChoice
from specdec.kv.errors import SpecdecError
from specdec.pairing import Pair
from specdec.pairing.loading import check_vocabularies, load_part, pair_tokenizer
from specdec.prompt_files import Prompt, has_template, prompt_ids
from specdec.speculator import Speculator


@dataclass(frozen=True)
class Loaded:
    """What a command works with."""

    speculator: Speculator
    tokenizer: Any
    device: torch.device

    def encode(self, text: str, chat: bool = False) -> dict[str, Any]:
        """`input_ids` and `attention_mask`, int64 `[1, tokens]`; an empty text becomes the begin-of-sequence token.
        chat: as the first message of a conversation."""
        if chat and not has_template(self.tokenizer):
            raise typer.BadParameter("--chat: this model has no chat template; leave it out to continue the text")
        ids = (
            prompt_ids(self.tokenizer, Prompt("prompt", "own", (text,), chat)) if text else self.tokenizer("").input_ids
        )
        if not ids:
            start = self.tokenizer.bos_token_id
            if start is None:
                raise typer.BadParameter(
                    "the prompt is empty and this model has no begin-of-sequence token: give a text"
                )
            ids = [start]
        return self.batch(ids)

    def batch(self, ids: list[int]) -> dict[str, Any]:
        """One row of model inputs."""
        tokens = torch.tensor([ids], device=self.device)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


@dataclass(frozen=True)
class LoadedModels:
    """draft: a model, a word, or None for plain decoding."""

    target: PreTrainedModel
    draft: PreTrainedModel | str | None
    tokenizer: Any
    device: torch.device


def load(choice: ModelChoice) -> Loaded:
    """What a command generates with. Raises as `load_models`."""
    models = load_models(choice)
    speculator = Speculator(
        models.target, models.draft, k=choice.k, tree=choice.tree, rule=choice.rule, lossy=choice.lossy,
        tokenizer=models.tokenizer,
    )  # fmt: skip
    return Loaded(speculator, models.tokenizer, models.device)


def load_models(choice: ModelChoice) -> LoadedModels:
    """Load the target, its tokenizer and the drafter.

    Raises:
        typer.BadParameter: a device this machine does not have.
        SpecdecError: a model that cannot be loaded, or cannot be decoded speculatively.
    """
    # Progress bars and advice on generation settings do not belong between a prompt and its answer.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if choice.threads is not None:
        torch.set_num_threads(choice.threads)
    device = pick_device(choice.device)
    dtype = pick_dtype(choice.dtype, device)
    if choice.dtype == "auto" and device.type != "cpu":
        dtype = pick_dtype(choice.pair.dtype, device)
    tokenizer = pair_tokenizer(choice.pair)
    has_model = choice.pair.draft.kind == "model"
    if has_model and choice.own_draft:
        check_vocabularies(choice.pair, tokenizer)
    target = load_part(choice.pair, "target", dtype, device)
    draft: PreTrainedModel | str | None = choice.draft
    if has_model:
        draft = load_part(choice.pair, "draft", dtype, device)
        _warn_if_tokenizers_differ(tokenizer, choice.pair)
    return LoadedModels(target, draft, tokenizer, device)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise typer.BadParameter(f"--device: expected auto, cpu, cuda or cuda:<index>, got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"--device: got {name!r}, but this machine shows torch {torch.cuda.device_count()} CUDA devices; use cpu"
        )
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """Half precision is slower than float32 on most CPUs, so "auto" means float32 there."""
    if name == "auto":
        return "auto" if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _warn_if_tokenizers_differ(tokenizer: Any, pair: Pair) -> None:
    """A drafter with other token ids is never wrong, only useless; say so. A draft saved without one is trusted."""
    try:
        other = pair_tokenizer(pair, "draft")
    except SpecdecError:
        return
    if other.get_vocab() != tokenizer.get_vocab():
        typer.echo(
            "warning: target and draft have different vocabularies; the text stays right, but hardly any draft will be "
            "accepted. Use a draft model of the target's family, or --draft ngram.",
            err=True,
        )
