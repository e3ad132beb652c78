"""Timing ways against each other: all on the same prompts, in turns, so that the machine's moods hit all alike."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from specdec.experiments.planner.cases import Generate
from specdec.report import StepTrace


@dataclass(frozen=True)
class Call:
    """One call: CPU and wall seconds; `plan` is the report's `PlanReport`, with its two speeds. steps: milliseconds
    from the end of a step to that of the next, and whether that one drafted; the last row's in batches of one length.
    """

    way: str
    prompt: int
    cpu: float
    wall: float
    tokens_per_step: float
    plan: dict[str, Any] | None
    steps: tuple[tuple[float, bool], ...] = ()


def time_calls(
    ways: Mapping[str, Generate], prompts: Sequence[Tensor], title: str, repeats: int = 1
) -> Iterator[list[Call]]:
    """Every way on every prompt; the first prompt once more before, for what is done once per process.

    Args:
        repeats: times that every way meets every prompt, all of them in turns.

    Yields:
        all calls so far, after every prompt.
    """
    calls: list[Call] = []
    for number, ids in enumerate([prompts[0], *prompts]):
        order = list(ways) * (repeats if number else 1)
        random.Random(number).shuffle(order)
        for way in tqdm(order, desc=f"{title} {number}/{len(prompts)}", leave=False):
            gc.collect()
            stamps: list[tuple[float, bool]] = []

            def stamp(trace: StepTrace, stamps: list[tuple[float, bool]] = stamps) -> None:
                stamps.append((perf_counter(), any(trace.drafted)))

            wall, cpu = perf_counter(), process_time()
            report = ways[way](ids, number, stamp)
            cpu, wall = process_time() - cpu, perf_counter() - wall
            if number == 0:
                continue
            plan = None
            if report is not None and report.plan is not None:
                plan = asdict(report.plan) | {
                    "predicted_tokens_per_second": report.plan.predicted_tokens_per_second,
                    "realised_tokens_per_second": report.plan.realised_tokens_per_second,
                }
            steps = 0.0 if report is None else report.tokens_per_step
            took = tuple(
                (round(1e3 * (end - start), 4), drafted) for (start, _), (end, drafted) in pairwise(stamps)
            )  # fmt: skip
            calls.append(Call(way, number, round(cpu, 4), round(wall, 4), round(steps, 3), plan, took))
        if calls:
            yield calls


def seconds(calls: Sequence[Call], way: str) -> list[float]:
    """What one thread itself spent (wall time where several threads share the work), by prompt: the median of its
    calls. (Not the fastest: a virtual machine has lucky moments, too.)"""
    alone = torch.get_num_threads() == 1
    spent: dict[int, list[float]] = {}
    for call in calls:
        if call.way == way:
            spent.setdefault(call.prompt, []).append(call.cpu if alone else call.wall)
    return [statistics.median(times) for times in spent.values()]


def ratio(calls: Sequence[Call], way: str, against: str) -> dict[str, float]:
    """How many times as fast `way` is: the median over prompts, with its 90 % bootstrap interval, and the totals'."""
    pairs = list(zip(seconds(calls, against), seconds(calls, way), strict=True))
    each = [other / own for other, own in pairs]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(each, k=len(each))) for _ in range(1000))
    total = sum(other for other, _ in pairs) / sum(own for _, own in pairs)
    return {"median": round(statistics.median(each), 3), "low": round(medians[50], 3), "high": round(medians[949], 3),
            "total": round(total, 3)}  # fmt: skip


def ratio_by_steps(calls: Sequence[Call], way: str, against: str) -> float:
    """How many times as fast `way` is as `against`, which never drafts, from the steps alone: plain steps and drafted
    ones each at their median over all calls. A machine's bad moments, which a call's time is full of, hardly show.

    Both write the same number of tokens; whatever a drafted step gained shows in the number of plain ones.
    """
    own, other = ([step for call in calls if call.way == name for step in call.steps] for name in (way, against))
    kinds = [[ms for ms, drafted in own if drafted == kind] for kind in (False, True)]
    spent = sum(len(times) * statistics.median(times) for times in kinds if times)
    count = sum(call.way == way for call in calls) / sum(call.way == against for call in calls)
    return round(count * len(other) * statistics.median(ms for ms, _ in other) / spent, 4)
