"""One random call as data: it can be built again for each side, printed, and made smaller one piece at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import models
import torch
from torch import Tensor
from transformers import DynamicCache

import specdec
from fuzz.log import Log
from specdec.kv.versions import CACHE_KEYWORD, cache_of, cached


@dataclass(frozen=True)
class Fresh:
    """An argument that must not be shared between two runs: built anew for each, writing into that run's log.

    text: how a report prints it.
    """

    text: str
    make: Callable[[Log], Any]

    def __repr__(self) -> str:
        return self.text


def stands_for(value: Any, log: Log) -> Any:
    """The value itself, with everything `Fresh` in it built."""
    if isinstance(value, Fresh):
        return value.make(log)
    if isinstance(value, (list, tuple)) and any(isinstance(part, Fresh) for part in value):
        return type(value)(stands_for(part, log) for part in value)
    return value.copy() if isinstance(value, (list, dict)) else value


@dataclass(frozen=True)
class Call:
    """`generate` on the random model `family`, as `form` calls it, with these arguments.

    draft: a name from `subjects.DRAFTS`; options: of the Speculator or Engine. lengths: tokens per row of the prompt,
    padded on the left. look: how the prompt is handed over (see `inputs`). cached: columns that a cache of the caller's
    holds already, None for no cache; cached_by_us: who filled it. seed: of a sampled call, None for a greedy one.
    """

    name: str
    family: str
    form: str
    draft: str
    options: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (4,)
    prompt_seed: int = 0
    period: int = 0
    look: str = "keywords"
    cached: int | None = None
    cached_by_us: bool = False
    seed: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        return models.target(self.family)

    @property
    def samples(self) -> bool:
        return self.seed is not None

    @property
    def pad(self) -> int:
        """What finished rows are filled up with: without a pad of its own, a model's end of text."""
        given = self.arguments.get("pad_token_id", models.PAD)
        ends = self.arguments.get("eos_token_id", models.EOS)
        given = given if given is not None else ends[0] if isinstance(ends, list) and ends else ends
        return given if isinstance(given, int) else models.PAD

    def prompt(self) -> tuple[Tensor, Tensor]:
        """int64 `[rows, columns]` ids and mask."""
        return models.prompts(self.lengths, self.model.config.vocab_size, self.prompt_seed, self.period)

    def noise(self) -> dict[str, Any]:
        """Where ours takes randomness from: one seed, one for each row, or a generator."""
        if self.seed is None:
            return {}
        if self.seed % 5 == 0 and self.form != "engine":
            return {"generator": torch.Generator().manual_seed(self.seed)}
        if self.seed % 5 == 1 and self.form != "engine" and "num_return_sequences" not in self.arguments:
            return {"seed": [self.seed + row for row in range(len(self.lengths))]}
        return {"seed": self.seed}

    def inputs(self) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Positional and named arguments that hold the prompt."""
        ids, mask = self.prompt()
        named: dict[str, Any] = {"attention_mask": mask}
        if self.cached is not None:
            named[CACHE_KEYWORD] = filled_cache(self.model, ids, mask, self.cached, self.cached_by_us)
        if self.look == "positional":
            return (ids,), named
        if self.look == "no mask":
            named.pop("attention_mask")
        elif self.look in _MASKS:
            named["attention_mask"] = mask.to(_MASKS[self.look])
        return (), {"input_ids": ids.int() if self.look == "int32" else ids, **named}

    def built(self, log: Log) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Everything plain `generate` is given. An argument the prompt has under the same name is replaced."""
        positional, named = self.inputs()
        usual = {"max_new_tokens": 6, "do_sample": self.samples, "pad_token_id": models.PAD}
        given = {name: stands_for(value, log) for name, value in self.arguments.items()}
        if "max_length" in given:
            del usual["max_new_tokens"]
        return positional, {**named, **usual, **given}

    def smaller(self) -> Iterator[Call]:
        """The same call without one of its pieces, the largest pieces first."""
        if self.form != "speculator":
            yield replace(self, form="speculator")
        if len(self.lengths) > 1:
            yield replace(self, lengths=self.lengths[:1])
            yield replace(self, lengths=self.lengths[1:])
        if self.seed is not None:
            yield replace(self, seed=None)
        for name in self.arguments:
            yield replace(self, arguments={key: value for key, value in self.arguments.items() if key != name})
        for name in self.options:
            yield replace(self, options={key: value for key, value in self.options.items() if key != name})
        if self.cached is not None:
            yield replace(self, cached=None)
        if self.cached_by_us:
            yield replace(self, cached_by_us=False)
        if self.look != "keywords":
            yield replace(self, look="keywords")
        if self.draft != "none" and not self.options:
            yield replace(self, draft="none")
        if self.draft not in ("none", "near"):
            yield replace(self, draft="near", options={"k": 3})
        if max(self.lengths) > 2:
            yield replace(self, lengths=tuple(max(1, length // 2) for length in self.lengths))
        if self.family != "llama-gqa":
            yield replace(self, family="llama-gqa")
        for name, value in self.arguments.items():
            if isinstance(value, list) and len(value) > 1:
                for i in range(len(value)):
                    yield replace(self, arguments={**self.arguments, name: value[:i] + value[i + 1 :]})


_MASKS = {"bool mask": torch.bool, "float mask": torch.float32}
LOOKS = ("keywords", "positional", "int32", "no mask", *_MASKS)


def filled_cache(model: Any, ids: Tensor, mask: Tensor, columns: int, ours: bool) -> Any:
    """A cache as an earlier call leaves it, plain or `ours`, with `columns` of the prompt in it."""
    if ours and columns and bool(mask[:, columns - 1].all()):
        earlier: Any = specdec.Speculator(model, "ngram", k=2)
        out = earlier.generate(
            ids[:, :columns], attention_mask=mask[:, :columns], max_new_tokens=1, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        return cache_of(out)
    cache = DynamicCache(config=model.config)
    if columns:
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(
                ids[:, :columns], attention_mask=mask[:, :columns], position_ids=places[:, :columns],
                **cached(model, cache),
            )  # fmt: skip
    return cache
