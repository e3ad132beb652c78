"""What the supported versions of `transformers` differ in: by which name they pass a K/V cache, and which were tested.

Up to 5.23 a cache is called `past_key_values` wherever it appears; from 5.24 on `cache`: in a model's forward, in what
`generate` hands to a custom method, and in outputs. Code that users bring along may keep the other name, so a model is
asked by its signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
import transformers
from packaging.version import Version
from transformers import Cache, PreTrainedModel
from transformers.generation import GenerateDecoderOnlyOutput

from specdec.kv.errors import UnsupportedModelError

Given = ParamSpec("Given")
Checked = TypeVar("Checked")

OLDEST_TESTED, NEWEST_TESTED = "5.17", "5.24"
"""The test-suite passes with these versions of transformers; what lies between them is supported."""

CACHE_KEYWORDS = ("cache", "past_key_values")
"""What a K/V cache is called, the newest name first."""

_OUTPUT_FIELDS = {field.name for field in fields(GenerateDecoderOnlyOutput)}
CACHE_KEYWORD = next((name for name in CACHE_KEYWORDS if name in _OUTPUT_FIELDS), CACHE_KEYWORDS[0])
"""What the installed transformers calls it, in `generate`'s arguments, model kwargs and outputs."""


def cache_argument(model: PreTrainedModel) -> str | None:
    """The name under which `model.forward` takes a K/V cache; None where it takes none."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE_KEYWORD, *CACHE_KEYWORDS) if name in taken), None)


def cached(model: PreTrainedModel, cache: Cache | None) -> dict[str, Any]:
    """Keyword arguments for `model(...)` that make it read and extend `cache` (None: start a new one)."""
    return {cache_argument(model) or CACHE_KEYWORD: cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache in what a model or `generate` returned, whatever it is called there.

    Raises:
        AttributeError: there is none, under no name.
    """
    for name in (CACHE_KEYWORD, *CACHE_KEYWORDS):
        if hasattr(output, name):
            return getattr(output, name)
    raise AttributeError(f"expected an output with one of {CACHE_KEYWORDS}, got {type(output).__name__}")


def cache_in(model_kwargs: Mapping[str, Any]) -> Any:
    """The cache among the model kwargs that `generate` hands to a custom method; None if there is none."""
    return model_kwargs.get(CACHE_KEYWORD)


def decoder_output(cache: Cache | None, sequences: torch.Tensor, **parts: Any) -> GenerateDecoderOnlyOutput:
    """What plain `generate` returns as a dictionary, with `cache` under this version's name."""
    named: dict[str, Any] = {**parts, CACHE_KEYWORD: cache}
    return GenerateDecoderOnlyOutput(sequences=sequences, **named)  # type: ignore[arg-type]


def tested_range() -> str:
    """The tested versions, the installed one, and where that lies outside: half a sentence, for messages."""
    said = f"tested with transformers {OLDEST_TESTED} to {NEWEST_TESTED}, installed is {transformers.__version__}"
    return said + {-1: ", which is older", 0: "", 1: ", which is newer"}[_side()]


def naming_the_tested_range(check: Callable[Given, Checked]) -> Callable[Given, Checked]:
    """Outside of the tested range the refusals of `check` say so: the reason may be a change of transformers."""

    @wraps(check)
    def checked(*args: Given.args, **kwargs: Given.kwargs) -> Checked:
        try:
            return check(*args, **kwargs)
        except UnsupportedModelError as error:
            if _side() == 0 or tested_range() in str(error):
                raise
            raise UnsupportedModelError(f"{error} ({tested_range()}.)") from None

    return checked


def _side() -> int:
    """Where the installed transformers lies: -1 before the tested range, 0 in it, 1 behind it."""
    installed = Version(transformers.__version__).release[:2]
    return (installed > Version(NEWEST_TESTED).release) - (installed < Version(OLDEST_TESTED).release)
