"""Bugs to plant into the library, one function each, and how they are planted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process as hf

import specdec
from fuzz.log import UsersError
from specdec import preparation

Patch = pytest.MonkeyPatch


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[Patch], None]:
    """`change(original, *args)` is called in the place of `owner.name(*args)`."""

    def plant(patch: Patch) -> None:
        original = getattr(owner, name)
        patch.setattr(owner, name, lambda *args, **kwargs: change(original, *args, **kwargs))

    return plant


def skips_below_the_root(call: Any, law: Any, logits: Any, *args: Any, **kwargs: Any) -> Any:
    scores = call(law, logits, *args, **kwargs).clone()
    scores[:, 1:] = logits[:, 1:].float()
    return scores


def forgets_the_path(call: Any, law: Any, logits: Any, rows: Any, tokens: Any, parents: Any, *args: Any) -> Any:
    return call(law, logits, rows, tokens, parents.clamp(max=0), *args)


def last_token_only(scan: Any, stop: Any, row: int, tokens: Any, scores: Any) -> None:
    scan(stop, row, tokens[-1:], None if scores is None else scores[-1:])


def no_gather(commit: Any, cache: Any, paths: Any) -> None:
    commit(cache, [list(range(len(path))) for path in paths])


def reads_a_pad(init: Any, rows: Any, prompt: Any, real: Any, capacity: int) -> None:
    if real is not None:
        real = real | torch.nn.functional.pad(real, (0, 1))[:, 1:]
    init(rows, prompt, real, capacity)


def shifted_scores(record: Any, collector: Any, row: int, scores: Any, logits: Any) -> Any:
    return record(collector, row, scores.roll(1, 0), logits)


def lossy_streamer(init: Any, collector: Any, request: Any, rows: Any) -> None:
    class Lossy:
        puts = 0

        def put(self, value: Any) -> None:
            self.puts += 1
            if self.puts != 5:
                request.streamer.put(value)

        def end(self) -> None:
            request.streamer.end()

    init(collector, replace(request, streamer=Lossy()) if request.streamer is not None else request, rows)


def other_request(change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> Callable[[Patch], None]:
    """`change(processors, criteria, ids)` before a request is built."""

    def build(original: Any, ids: Any, processors: Any, criteria: Any, *args: Any, **kwargs: Any) -> Any:
        processors, criteria = change(processors, criteria, ids)
        return original(ids, processors, criteria, *args, **kwargs)

    return wrapped(preparation, "build_request", build)


def wrong_row(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    for one in processors:
        if isinstance(one, hf.PrefixConstrainedLogitsProcessor):
            one._prefix_allowed_tokens_fn = partial(_of_row_zero, one._prefix_allowed_tokens_fn)
    return processors, criteria


def _of_row_zero(asked: Any, row: int, prefix: Any) -> Any:
    return asked(0, prefix)


def penalised_pads(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    penalty = hf.RepetitionPenaltyLogitsProcessor
    changed = [penalty(one.penalty) if isinstance(one, penalty) else one for one in processors]
    return LogitsProcessorList(changed), criteria


def deaf_criterion(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    class Deaf(hf.LogitsProcessor):
        def __init__(self, inner: Any):
            self.inner = inner

        def __call__(self, prefix: Any, scores: Any, **kwargs: Any) -> Any:
            if prefix.shape[1] < ids.shape[1] + 3:
                return torch.zeros(len(prefix), dtype=torch.bool)
            return self.inner(prefix, scores, **kwargs)

    return processors, StoppingCriteriaList([Deaf(one) if hasattr(one, "rule") else one for one in criteria])


def uses_the_global_generator(processors: Any, criteria: Any, ids: Any) -> tuple[Any, Any]:
    torch.rand(1)
    return processors, criteria


def noise_by_call(draw: Any, race: Any, rows: Any, positions: Any, depths: int) -> Any:
    race.calls = getattr(race, "calls", 0) + 1
    return draw(race, rows, [race.calls] * len(positions), depths)


def swallows(decide: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return decide(*args, **kwargs)
    except UsersError as error:
        raise KeyError(3) from error


def spins(run: Any, loop: Any) -> Any:
    while loop.request.streamer is not None:
        pass
    return run(loop)


def stays_busy(alone: Any, turn: Any) -> Any:
    @contextmanager
    def forgetful() -> Iterator[None]:
        try:
            with alone(turn):
                yield
        except BaseException:
            turn.busy = True
            raise

    return forgetful()


def changes_the_config(decode: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    owner.target.generation_config.top_k = 3
    return decode(owner, *args, **kwargs)


def appends_to_the_users_list(generate: Any, owner: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(kwargs.get("logits_processor"), list):
        kwargs["logits_processor"].append(hf.LogitNormalization())
    return generate(owner, *args, **kwargs)


def drops_the_last(finish: Any, handle: Any, result: Any, error: Any = None) -> None:
    if result is not None and len(result.token_ids) > 10:
        result = replace(result, token_ids=result.token_ids[:-1])
    finish(handle, result, error)


def leaves_generate(patch: Patch) -> None:
    original = specdec.patch

    @contextmanager
    def forgetful(target: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with original(target, *args, **kwargs) as spec:
            yield spec
        target.generate = spec.generate

    patch.setattr(specdec, "patch", forgetful)
