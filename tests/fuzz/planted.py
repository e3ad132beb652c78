"""Faults to plant into the library, one kind of loss each, and the calls among which the fuzz must find them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import models
import pytest
import torch
from fuzz.callbacks import AvoidsLast, Remembers, criterion, prefix_function, processor, streamer
from fuzz.log import UsersError
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as hf

import specdec
from specdec import speculator
from specdec.deciding import Decider
from specdec.engine.handle import Handle
from specdec.kv import SharedKVCache
from specdec.loop import DecodeLoop
from specdec.outputs import Collector
from specdec.speculator import Speculator
from specdec.stopping import StopRules
from specdec.verify import Rows, SamplingLaw
from specdec.verify.race import RaceStream

Patch = pytest.MonkeyPatch
CHAIN: dict[str, Any] = {"draft": "near", "options": {"k": 4}, "seed": None, "form": "speculator", "cached": None}
LONG = {"max_new_tokens": 14}


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """`change(original, *args)` is called in the place of `owner.name(*args)`."""

    def plant(patch: Patch) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return plant


def _skips_below_the_root(call: Any, law: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    scores = call(law, logits, *args, **kwargs).clone()
    scores[:, 1:] = logits[:, 1:].float()
    return scores


def _forgets_the_path(call: Any, law: Any, logits: Any, rows: Any, tokens: Any, parents: Any, *args: Any) -> Any:
    return call(law, logits, rows, tokens, parents.clamp(max=0), *args)


def _last_token_only(scan: Any, stop: Any, row: int, tokens: Any, scores: Any) -> None:
    scan(stop, row, tokens[-1:], None if scores is None else scores[-1:])


def _no_gather(commit: Any, cache: Any, paths: Any) -> None:
    commit(cache, [list(range(len(path))) for path in paths])


def _reads_a_pad(init: Any, rows: Any, prompt: Any, real: Any, capacity: int) -> None:
    if real is not None:
        real = real | torch.nn.functional.pad(real, (0, 1))[:, 1:]
    init(rows, prompt, real, capacity)


def _shifted_scores(record: Any, collector: Any, row: int, scores: Any, logits: Any) -> Any:
    return record(collector, row, scores.roll(1, 0), logits)


def _lossy_streamer(init: Any, collector: Any, request: Any, rows: Any) -> None:
    class Lossy:
        puts = 0

        def put(self, value: Any) -> None:
            self.puts += 1
            if self.puts != 5:
                request.streamer.put(value)

        def end(self) -> None:
            request.streamer.end()

    init(collector, replace(request, streamer=Lossy()) if request.streamer is not None else request, rows)


def _other_request(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Callable[[Patch], None]:
    """`change(processors, criteria, ids)` before a request is built."""

    def build(original: Any, ids: Any, processors: Any, criteria: Any, *args: Any, **kwargs: Any) -> Any:
        processors, criteria = change(processors, criteria, ids)
        return original(ids, processors, criteria, *args, **kwargs)

    return wrapped(speculator, "build_request", build)


def _wrong_row(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    for one in processors:
        if isinstance(one, hf.PrefixConstrainedLogitsProcessor):
            asked = one._prefix_allowed_tokens_fn
            one._prefix_allowed_tokens_fn = lambda row, prefix, asked=asked: asked(0, prefix)
    return processors, criteria


def _penalised_pads(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    penalty = hf.RepetitionPenaltyLogitsProcessor
    changed = [penalty(one.penalty) if isinstance(one, penalty) else one for one in processors]
    return LogitsProcessorList(changed), criteria


def _deaf_criterion(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    class Deaf(hf.LogitsProcessor):
        def __init__(self, inner: Any):
            self.inner = inner

        def __call__(self, prefix: Any, scores: Any, **kwargs: Any) -> Any:
            if prefix.shape[1] < ids.shape[1] + 3:
                return torch.zeros(len(prefix), dtype=torch.bool)
            return self.inner(prefix, scores, **kwargs)

    return processors, StoppingCriteriaList([Deaf(one) if hasattr(one, "rule") else one for one in criteria])


def _uses_the_global_generator(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    torch.rand(1)
    return processors, criteria


def _noise_by_call(draw: Any, race: Any, rows: Any, positions: Any, depths: int) -> Any:
    race.calls = getattr(race, "calls", 0) + 1
    return draw(race, rows, [race.calls] * len(positions), depths)


def _swallows(decide: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return decide(*args, **kwargs)
    except UsersError as error:
        raise KeyError(3) from error


def _spins(run: Any, loop: Any) -> Any:
    while loop.request.streamer is not None:
        pass
    return run(loop)


def _stays_busy(alone: Any, owner: Any) -> Any:
    @contextmanager
    def inner() -> Iterator[None]:
        with alone(owner):
            yield
        owner._busy = False

    @contextmanager
    def outer() -> Iterator[None]:
        try:
            with inner():
                yield
        except BaseException:
            owner._busy = True
            raise

    return outer()


def _changes_the_config(decode: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    owner.target.generation_config.top_k = 3
    return decode(owner, *args, **kwargs)


def _appends_to_the_users_list(generate: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(kwargs.get("logits_processor"), list):
        kwargs["logits_processor"].append(hf.LogitNormalization())
    return generate(owner, *args, **kwargs)


def _drops_the_last(finish: Any, handle: Any, result: Any, error: Any = None) -> None:
    if result is not None and len(result.token_ids) > 10:
        result = replace(result, token_ids=result.token_ids[:-1])
    finish(handle, result, error)


def _leaves_generate(patch: Patch) -> None:
    original = specdec.patch

    @contextmanager
    def forgetful(target: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(target, *args, **kwargs) as spec:
            yield spec
        target.generate = spec.generate

    patch.setattr(specdec, "patch", forgetful)


class Fault(NamedTuple):
    """plant: into the library; calls: fields of the calls among which it must show; kinds: as what it is found."""

    plant: Callable[[Patch], None]
    calls: dict[str, Any]
    kinds: tuple[str, ...]


def _chain(arguments: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**CHAIN, "arguments": {**LONG, **arguments}, **fields}


_TEXT = ("other text", "broken afterwards")
_SEEN = ("other text", "callbacks saw something else")
_KEPT: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True}
FAULTS: dict[str, Fault] = {
    "processors are skipped below the root": Fault(
        wrapped(SamplingLaw, "__call__", _skips_below_the_root), _chain({"repetition_penalty": 1.4}), _TEXT
    ),
    "processors see a node without its path": Fault(
        wrapped(SamplingLaw, "__call__", _forgets_the_path), _chain({"no_repeat_ngram_size": 2}), _TEXT
    ),
    "an end of text inside a run is missed": Fault(
        wrapped(StopRules, "scan", _last_token_only), _chain({"eos_token_id": [2, 4, 6, 8, 10, 12]}), _TEXT
    ),
    "a commit keeps wrong slots": Fault(
        wrapped(SharedKVCache, "commit", _no_gather), _chain({}, options={"tree": (3, 2, 1)}), _TEXT
    ),
    "a pad is read as text": Fault(wrapped(Rows, "__init__", _reads_a_pad), _chain({}, lengths=(3, 6)), _TEXT),
    "the repetition penalty sees pads": Fault(
        _other_request(_penalised_pads),
        _chain({"repetition_penalty": 1.9, "pad_token_id": 0, **_KEPT}, lengths=(2, 8)),
        ("other text", "other scores"),
    ),
    "scores of another step are returned": Fault(
        wrapped(Collector, "record", _shifted_scores), _chain(_KEPT), ("other scores",)
    ),
    "the streamer misses a token": Fault(
        wrapped(Collector, "__init__", _lossy_streamer),
        _chain({"streamer": streamer()}),
        ("callbacks saw something else",),
    ),
    "the prefix function is asked about another row": Fault(
        _other_request(_wrong_row),
        _chain({"prefix_allowed_tokens_fn": prefix_function("by row")}, lengths=(4, 4)),
        _SEEN,
    ),
    "a criterion is not asked at first": Fault(
        _other_request(_deaf_criterion), _chain({"stopping_criteria": [criterion("pair%7")]}, lengths=(5,)), _SEEN
    ),
    "the global generator is used by a greedy call": Fault(
        _other_request(_uses_the_global_generator), _chain({}), ("harm or internal error",)
    ),
    "noise follows calls instead of positions": Fault(
        wrapped(RaceStream, "__call__", _noise_by_call),
        _chain({}, seed=3, options={"k": 4, "rule": "coupled"}),
        ("coupled text depends on the draft",),
    ),
    "a user's error becomes an internal one": Fault(
        wrapped(Decider, "decide", _swallows),
        _chain({"logits_processor": [processor(Remembers)], "prefix_allowed_tokens_fn": prefix_function("raises later")},
               lengths=(5,), options={"k": 1}),
        ("unclear error: KeyError",),
    ),
    "a call never ends": Fault(wrapped(DecodeLoop, "run", _spins), _chain({"streamer": streamer()}), ("hang",)),
    "the object is broken after an error": Fault(
        wrapped(Speculator, "_alone", _stays_busy),
        _chain({"prefix_allowed_tokens_fn": prefix_function("raises later")}, lengths=(5,)),
        ("broken afterwards",),
    ),
    "the model's own configuration is changed": Fault(
        wrapped(Speculator, "_decode", _changes_the_config), _chain({}), ("harm or internal error",)
    ),
    "the user's list is changed": Fault(
        wrapped(Speculator, "generate", _appends_to_the_users_list),
        _chain({"logits_processor": [processor(AvoidsLast)]}, lengths=(3,)),
        ("harm or internal error",),
    ),
    "an engine drops the last token": Fault(
        wrapped(Handle, "finish", _drops_the_last), _chain({}, form="engine", lengths=(4,)), ("other text",)
    ),
    "generate stays patched": Fault(_leaves_generate, _chain({}, form="patch"), ("harm or internal error",)),
}
"""Every one is a loss that users have met somewhere; the calls are the narrowest that leave the finding to chance."""
assert models.PAD == 0
