"""Measuring in processes of their own, one after the other: each calls every way on every prompt of every part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from specdec.experiments.pair import Models
from specdec.experiments.planner.calls import Call, time_calls
from specdec.experiments.planner.options import SWEEP, WORKLOADS, PlannerOptions
from specdec.experiments.planner.ways import Ways, prompts
from specdec.experiments.processes import yielded
from specdec.experiments.ways import Generate


class Batch(NamedTuple):
    """What was measured together: the calls of one part at one temperature and batch size, on one prompt.

    part: of a sweep there is only one; those of never-slower are its workloads.
    """

    run: str
    part: str
    calls: list[Call]


def measured(options: PlannerOptions) -> Iterator[Batch]:
    """All batches of all processes, as they come; nothing is measured until the next one is asked for.

    Later processes find the cost tables of earlier ones, as those of a user do.

    Raises:
        RuntimeError: a process failed.
    """
    for number in range(options.processes):
        try:
            yield from yielded(_batches, options, number)
        except Exception as error:
            which = f"measuring process {number + 1} of {options.processes}"
            raise RuntimeError(f"{which} ended with {type(error).__name__}: {error}") from error


def _batches(options: PlannerOptions, number: int) -> Iterator[Batch]:
    torch.set_num_threads(options.threads)
    models = Models.load()
    for rows in options.batches:
        for temperature in options.temperatures:
            run = f"T={temperature} batch {rows}"
            for part, kind, ways in _parts(Ways(models, temperature, options.seeded), temperature, options):
                texts = prompts(models, kind, rows, options.prompts, options.prompt_tokens)
                title = f"{number + 1}/{options.processes} {part} {run}"
                for calls in time_calls(ways, texts, title, options.repeats, number):
                    yield Batch(run, part, calls)


def _parts(ways: Ways, temperature: float, options: PlannerOptions) -> Iterator[tuple[str, str, dict[str, Generate]]]:
    """Name, kind of prompts, and ways."""
    if options.what == SWEEP:
        yield SWEEP, "held-out", ways.sweep(options.tokens, options.rule if temperature > 0 else "auto")
        return
    for workload in (one for one in WORKLOADS if one.name in options.workloads):
        found = ways.never_slower(workload)
        if options.no_hf:
            del found["hf plain"]
        yield workload.name, workload.prompts, found
