"""Who is called: Speculators and engines, built once and used for many calls, with every kind of drafter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import fault_cases
import models
import torch

import specdec
from fuzz.call import Call
from specdec.drafters import BestFirst, DySpec, NgramDrafter

SPOILT = ("exception", "q is NaN", "q does not sum to 1", "ids too large", "wrong root", "num_nodes zero", "nothing")


def _model(kind: str) -> Callable[[str], Any]:
    return lambda family: models.draft(kind, family)


def _grown(shape: Callable[[], Any]) -> Callable[[str], Any]:
    return lambda family: specdec.ModelDrafter(models.draft("near", family), tree=shape())


def _faulty(name: str) -> Callable[[str], Any]:
    return lambda family: fault_cases.Faulty(fault_cases.SPOILS[name], {0, 2, 3, 7}, models.draft("near", family), k=3)


MODELS = ("near", "far", "other", "self", "padded-vocab")
"""Drafts that take k and tree."""

DRAFTS: dict[str, Callable[[str], Any]] = {
    "none": lambda family: None,
    "ngram": lambda family: "ngram",
    "ngram branches": lambda family: NgramDrafter(k=4, branches=3),
    **{kind: _model(kind) for kind in MODELS},
    "near or ngram": lambda family: [models.draft("near", family), "ngram"],
    "best first": _grown(lambda: BestFirst(depth=3, top_k=3, num_nodes=8)),
    "dyspec": _grown(lambda: DySpec(depth=3, num_nodes=8)),
    "mixed children": lambda family: specdec.ModelDrafter(models.draft("far", family), tree=(3, 2), children="mixed"),
    "sampled children": lambda family: specdec.ModelDrafter(
        models.draft("far", family), tree=(2, 2), children="sampled"
    ),
    **{f"faulty: {name}": _faulty(name) for name in SPOILT},
}
ONE_SHOT = ("k", "tree", "rule", "exactness")
"""Options that `specdec.generate` takes; `patch` takes the first three."""


class Subjects:
    """Every Speculator and engine of a fuzz run: the same objects serve thousands of calls, as a user's would."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()  # how calls ended: "served", "refused" by ours, or "both refuse"
        self._speculators: dict[str, Any] = {}
        self._engines: dict[str, Any] = {}

    def speculator(self, call: Call) -> Any:
        key = f"{call.family} {call.draft} {sorted(call.options.items(), key=str)}"
        if key not in self._speculators:
            self._speculators[key] = specdec.Speculator(call.model, DRAFTS[call.draft](call.family), **call.options)
        return self._speculators[key]

    def engine(self, call: Call) -> Any:
        shape = {name: value for name, value in call.options.items() if name in ("k", "tree", "page_size")}
        key = f"{call.family} {call.draft} {sorted(shape.items(), key=str)}"
        if key not in self._engines:
            self._engines[key] = specdec.Engine(
                call.model, DRAFTS[call.draft](call.family), num_pages=200, **{"page_size": 4, **shape}
            )
        return self._engines[key]

    def forget(self) -> None:
        """What a call may have broken is not used again: one fault is one finding."""
        self._speculators.clear()
        self._engines.clear()

    def run(self, call: Call, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Any:
        """The call in its form. An engine's answer is a list of tokens, those of every other form what plain gives."""
        return getattr(self, "_" + call.form.replace("-", "_"))(call, positional, {**named, **call.noise()})

    def _speculator(self, call: Call, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Any:
        return self.speculator(call).generate(*positional, **named)

    def _one_shot(self, call: Call, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Any:
        options = {name: value for name, value in call.options.items() if name in ONE_SHOT}
        generate: Any = specdec.generate
        return generate(call.model, DRAFTS[call.draft](call.family), *positional, **options, **named)

    def _hook(self, call: Call, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Any:
        named = {"spec_streamer" if name == "streamer" else name: value for name, value in named.items()}
        return call.model.generate(*positional, **named, custom_generate=self.speculator(call))

    def _patch(self, call: Call, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> Any:
        options = {name: value for name, value in call.options.items() if name in ONE_SHOT[:3]}
        with specdec.patch(call.model, DRAFTS[call.draft](call.family), **options):
            return call.model.generate(*positional, **named)

    def _engine(self, call: Call, positional: tuple[torch.Tensor, ...], named: dict[str, Any]) -> list[int]:
        """One request among others, whose texts are known."""
        engine = self.engine(call)
        prompt = positional[0] if positional else named["input_ids"]
        usual = {"input_ids"} if "attention_mask" in call.arguments else {"input_ids", "attention_mask"}
        named = {name: value for name, value in named.items() if name not in usual}
        rule = {"rule": call.options["rule"]} if "rule" in call.options else {}
        with companions(engine, call):
            result = engine.submit(prompt, **rule, **named).result(timeout=20)
        check_reason(call, result)
        emitted: list[int] = result.token_ids
        return emitted


def check_reason(call: Call, result: Any) -> None:
    """Where nothing but length and ends of text can stop a request, its last token says which it was."""
    ends = call.arguments.get("eos_token_id", models.EOS)
    ends = [ends] if isinstance(ends, int) else ends or []
    if {"stopping_criteria", "generation_config", "max_time"} & call.arguments.keys() or not isinstance(ends, list):
        return
    wanted = "stop" if result.token_ids and result.token_ids[-1] in ends else "length"
    assert result.finish_reason == wanted, f"{result.token_ids} ended by {result.finish_reason!r}, not {wanted!r}"


COMPANIONS = ([5, 6, 7], [9, 8])
SIMPLE: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": models.PAD}


@lru_cache(maxsize=64)
def known_texts(family: str) -> list[list[int]]:
    """Plain greedy decoding of the companions' prompts."""
    model: Any = models.target(family)
    prompts = [torch.tensor([text]) for text in COMPANIONS]
    return [
        model.generate(ids, attention_mask=torch.ones_like(ids), **SIMPLE)[0, ids.shape[1] :].tolist()
        for ids in prompts
    ]


@contextmanager
def companions(engine: Any, call: Call) -> Iterator[None]:
    """Two other requests beside this one: whatever becomes of it, they get their texts."""
    handles = [engine.submit(text, **SIMPLE) for text in COMPANIONS]
    try:
        yield
    finally:
        for wanted, handle in zip(known_texts(call.family), handles, strict=True):
            try:
                got = handle.result(timeout=20).token_ids
            except Exception as error:
                raise AssertionError(f"another request of the engine ended in {error!r}") from error
            assert got == wanted, f"another request of the engine: expected {wanted}, got {got}"
        engine.run()
        engine.pool.check_integrity()
        assert engine.pool.num_held_pages == 0, f"{engine.pool.num_held_pages} pages are still held"
