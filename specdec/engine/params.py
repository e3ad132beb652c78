"""What a request may ask for, and `generate`'s own preparation of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.engine.step_output import MOST_LOGPROBS
from specdec.kv import UnsupportedArgumentError
from specdec.kv.versions import CACHE_KEYWORDS
from specdec.preparation import Preparation
from specdec.request import Request

PLAIN = "none"
"""The name under which every engine offers plain decoding."""

_NOT_HERE = {
    "inputs": "the prompt is submit's first argument",
    "input_ids": "the prompt is submit's first argument",
    "num_return_sequences": "submit the prompt once for each text: equal prompts are prefilled once",
    "return_dict_in_generate": "the engine returns tokens and counts; use Speculator.generate for scores and caches",
    "streamer": "iterate over the handle instead",
    **dict.fromkeys(CACHE_KEYWORDS, "the engine keeps K/V itself and finds equal prefixes on its own"),
    "attention_mask": "prompts are given without pads",
    "generator": "pass seed=",
    "on_step": "read engine.metrics() or the handle's result",
}


@dataclass(frozen=True)
class Params:
    """How one request is decoded.

    seed: makes a sampled text reproducible: the same tokens as `Speculator.generate(..., seed=seed)` gives for this
        prompt alone with the same drafter, whatever else the engine is doing. Such a request's drafts are never cut to
        what pays off for the whole batch, because that would change its text (not its law). None: a seed is drawn from
        torch's global generator, and the engine may decide how much to draft.
    draft: name of one of the engine's drafters, "none" for plain decoding, None for the engine's first.
    rule, lossy: as in Speculator.
    priority: smaller is served first; waiting requests grow more urgent with time, so that none starves.
    timeout: seconds after which the request ends with what it has; None = never.
    logprobs: for every emitted token its log-probability and so many likeliest alternatives, 0 to 20, in the handle's
        `steps()`; None for none. The target's own, before temperature and all processors (see `TokenLogprobs`).
    arguments: of `transformers`' `generate` (max_new_tokens, do_sample, temperature, eos_token_id, stop_strings, ...).
    """

    seed: int | None = None
    draft: str | None = None
    rule: str = "auto"
    lossy: bool = False
    priority: int = 0
    timeout: float | None = None
    logprobs: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, why in _NOT_HERE.items():
            value = self.arguments.get(name)
            harmless = value is None or value is False or (name == "num_return_sequences" and value == 1)
            if not harmless:
                raise UnsupportedArgumentError(f"{name} is not taken by an engine: {why}")
        if self.timeout is not None:
            self._set("timeout", _seconds(self.timeout))
        self._set("priority", _whole("priority: expected an int, smaller is sooner", self.priority))
        if self.seed is not None:
            self._set("seed", _whole("seed: expected an int or None", self.seed))
        if self.logprobs is not None:
            wanted = f"logprobs: expected 0 to {MOST_LOGPROBS} alternatives per token, or None for no log-probabilities"
            self._set("logprobs", _whole(wanted, self.logprobs))
            if not 0 <= self.logprobs <= MOST_LOGPROBS:
                raise UnsupportedArgumentError(f"{wanted}, got {self.logprobs}")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # frozen: only here, before anybody has seen it

    def changed(self, options: Mapping[str, Any]) -> Params:
        """These parameters with `options` in place: names of this class's own fields, else arguments of `generate`."""
        if not options:
            return self
        own = {f.name for f in fields(self)} - {"arguments"}
        mine = {name: value for name, value in options.items() if name in own}
        rest = {name: value for name, value in options.items() if name not in own}
        rest = {**rest.pop("arguments", {}), **rest}
        return replace(self, **mine, arguments={**self.arguments, **rest})


def _seconds(value: Any) -> float:
    """A timeout as a number of its own."""
    try:
        seconds = float("nan") if isinstance(value, (bool, str)) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = float("nan")
    if not 0 < seconds < float("inf"):
        raise UnsupportedArgumentError(f"timeout: expected seconds > 0, or None for never, got {value!r}")
    return seconds


def _whole(expected: str, value: Any) -> int:
    """An integer of any library's as Python's own."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UnsupportedArgumentError(f"{expected}, got {value!r}")


def prepare(preparation: Preparation, prompt: Tensor, params: Params) -> Request:
    """The checked request `Speculator.generate` would decode for this prompt alone.

    Args:
        prompt: int64 `[1, tokens]`.

    Raises:
        UnsupportedArgumentError, ValueError: as `Speculator.generate`.
    """
    made: list[Request] = []

    def keep(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        options = {"seed": params.seed, "generator": None, "streamer": None, "on_step": None}
        made.append(
            preparation.request(
                input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, **options
            )
        )
        return input_ids

    arguments = {**params.arguments, "attention_mask": torch.ones_like(prompt)}
    for name in ("streamer", "generator", "on_step"):  # whatever they are here means none (see `_NOT_HERE`)
        arguments.pop(name, None)
    ways = {name: arguments.pop(name, None) for name in ("assistant_model", "custom_generate", "synced_gpus")}
    config, criteria = arguments.pop("generation_config", None), arguments.pop("stopping_criteria", None)
    tokenizer = arguments.pop("tokenizer", None)
    preparation.check(prompt, config, arguments, ways)
    preparation.run(
        keep, prompt, config, criteria, preparation.tokenizer if tokenizer is None else tokenizer, arguments
    )
    (request,) = made
    return request


def prompt_ids(prompt: Sequence[int] | Tensor, target: PreTrainedModel, vocab: int) -> list[int]:
    """The prompt's token ids, checked.

    Raises:
        UnsupportedArgumentError: empty, not one row of ints, or ids outside the vocabulary.
    """
    if isinstance(prompt, Tensor):
        flat = prompt[0] if prompt.dim() == 2 and prompt.shape[0] == 1 else prompt
        if flat.dim() != 1 or flat.dtype not in (torch.int64, torch.int32):
            raise UnsupportedArgumentError(
                f"prompt: expected token ids [tokens] or [1, tokens], got {prompt.dtype} {tuple(prompt.shape)}"
            )
        ids = flat.tolist()
    elif isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        raise UnsupportedArgumentError(f"prompt: expected token ids, got {type(prompt).__name__}: tokenize it first")
    else:
        ids = list(prompt)
    if not ids:
        raise UnsupportedArgumentError("prompt: expected at least one token, got none")
    ids = [_whole("prompt: expected token ids (ints)", token) for token in ids]
    wrong = [token for token in ids if not 0 <= token < vocab]
    if wrong:
        raise UnsupportedArgumentError(
            f"prompt: expected ids in 0..{vocab - 1} ({type(target).__name__}), got {wrong[:5]}"
        )
    return ids
