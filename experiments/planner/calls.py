"""Timing ways against each other: all on the same prompts, in turns, so that the machine's moods hit all alike."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.experiments.clock import timed
from specdec.experiments.display import tracked
from specdec.experiments.intervals import bootstrap_median
from specdec.experiments.ways import Generate


@dataclass(frozen=True)
class Call:
    """One call. `plan` is the report's `PlanReport`, with its two speeds.

    cpu, wall: seconds. steps: milliseconds from the end of a step to that of the next, and whether that one drafted;
    the last row's in batches of one length. process: where memory happens to lie makes one process a few percent faster
    than another, for all its calls.
    """

    way: str
    prompt: int
    cpu: float
    wall: float
    tokens_per_step: float
    plan: dict[str, Any] | None
    steps: tuple[tuple[float, bool], ...] = ()
    process: int = 0
    threads: int = 1

    @property
    def seconds(self) -> float:
        """What one thread itself spent; wall time where several threads share the work."""
        return self.cpu if self.threads == 1 else self.wall


def time_calls(
    ways: Mapping[str, Generate], prompts: Sequence[Tensor], title: str, repeats: int = 1, process: int = 0
) -> Iterator[list[Call]]:
    """Every way on every prompt; the first prompt once more before, for what is done once per process.

    Args:
        repeats: times that every way meets every prompt, all of them in turns. process: number of this process, which
            decides whose turn it is.

    Yields:
        the calls on each prompt.
    """
    for number, ids in enumerate([prompts[0], *prompts]):
        order = list(ways) * (repeats if number else 1)
        random.Random(len(prompts) * process + number).shuffle(order)
        every = tracked(order, f"{title} {number}/{len(prompts)}")
        calls = [_call(way, ways[way], ids, number, process) for way in every]
        if number:
            yield calls


def _call(way: str, generate: Generate, ids: Tensor, number: int, process: int) -> Call:
    gc.collect()
    stamps: list[tuple[float, bool]] = []
    stamp = lambda trace: stamps.append((perf_counter(), any(trace.drafted)))  # noqa: E731
    output, spent = timed(partial(generate, ids, number, stamp))
    report, plan = output.report, None
    if report is not None and report.plan is not None:
        speeds = ("predicted_tokens_per_second", "realised_tokens_per_second")
        plan = asdict(report.plan) | {name: getattr(report.plan, name) for name in speeds}
    return Call(
        way, number, round(spent.cpu, 4), round(spent.wall, 4),
        0.0 if report is None else round(report.tokens_per_step, 3), plan,
        tuple((round(1e3 * (end - start), 4), drafted) for (start, _), (end, drafted) in pairwise(stamps)),
        process, torch.get_num_threads(),
    )  # fmt: skip


def seconds(calls: Sequence[Call], way: str) -> list[float]:
    """What calls took, by process and prompt: their median. (Not the fastest: a virtual machine has lucky moments,
    too.)"""
    spent: dict[tuple[int, int], list[float]] = {}
    for call in calls:
        if call.way == way:
            spent.setdefault((call.process, call.prompt), []).append(call.seconds)
    return [statistics.median(times) for times in spent.values()]


def ratio(calls: Sequence[Call], way: str, against: str) -> dict[str, float]:
    """How many times as fast `way` is: the median over processes and prompts, with its 90 % bootstrap interval, and
    the totals'."""
    pairs = list(zip(seconds(calls, against), seconds(calls, way), strict=True))
    found = bootstrap_median([other / own for other, own in pairs])
    return {name: round(value, 3) for name, value in {**found._asdict(), "total": _total(pairs)}.items()}


def ratio_to_others_best(calls: Sequence[Call], way: str, rivals: Sequence[str]) -> float | None:
    """How many times as fast `way` is, in total, as what a sweep over all other prompts finds best for each prompt.

    The best of many settings on the very calls it is compared by is partly the luckiest of them, not one that anybody
    could have chosen. None where there are no other prompts.
    """
    pairs: list[tuple[float, float]] = []
    for prompt in sorted({call.prompt for call in calls}):
        rest = [call for call in calls if call.prompt != prompt]
        here = [call for call in calls if call.prompt == prompt]
        if not rest:
            return None
        best = min(rivals, key=lambda name, rest=rest: sum(seconds(rest, name)))  # type: ignore[misc]
        pairs += zip(seconds(here, best), seconds(here, way), strict=True)
    return round(_total(pairs), 3)


def _total(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(other for other, _ in pairs) / sum(own for _, own in pairs)


def ratio_by_steps(calls: Sequence[Call], way: str, against: str) -> float:
    """How many times as fast `way` is as `against`, which never drafts, from the steps alone: plain steps and drafted
    ones each at their median over all calls of a process. A machine's bad moments, which a call's time is full of,
    hardly show. The mean over processes.

    Both write the same number of tokens; whatever a drafted step gained shows in the number of plain ones.
    """
    found = []
    for process in sorted({call.process for call in calls}):
        here = [call for call in calls if call.process == process]
        own, other = ([step for call in here if call.way == name for step in call.steps] for name in (way, against))
        kinds = [[ms for ms, drafted in own if drafted == kind] for kind in (False, True)]
        spent = sum(len(times) * statistics.median(times) for times in kinds if times)
        count = sum(call.way == way for call in here) / sum(call.way == against for call in here)
        found.append(count * len(other) * statistics.median(ms for ms, _ in other) / spent)
    return round(statistics.mean(found), 4)
