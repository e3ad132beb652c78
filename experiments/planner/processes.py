"""Measuring in processes of their own, one after the other: each calls every way on every prompt of every part."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from specdec.experiments.planner.cases import WORKLOADS, Generate, Models, fixed, planned, prompts
from specdec.experiments.planner.clock import Call, time_calls

SWEEP = "sweep"
"""The only part of a sweep; those of never-slower are its workloads."""


class Batch(NamedTuple):
    """What was measured together: the calls of one part at one temperature and batch size, on one prompt."""

    run: str
    part: str
    calls: list[Call]


def measured(args: Namespace) -> Iterator[Batch]:
    """All batches of `args.processes` processes, as they come; nothing is measured until the next one is asked for.

    Later processes find the cost tables of earlier ones, as those of a user do.

    Raises:
        RuntimeError: a process failed; what it was is on standard error.
    """
    context = get_context("spawn")
    for number in range(args.processes):
        here, there = context.Pipe()
        child = context.Process(target=_send, args=(args, number, there))
        child.start()
        there.close()
        try:
            while True:
                yield here.recv()
                here.send(None)
        except (EOFError, OSError):  # it is done, or it died
            child.join()
        finally:
            child.kill()
            child.join()
        if child.exitcode:
            raise RuntimeError(f"measuring process {number + 1} of {args.processes} ended with {child.exitcode}")


def _send(args: Namespace, number: int, parent: Connection) -> None:
    torch.set_num_threads(args.threads)
    for batch in _batches(args, number):
        parent.send(batch)
        parent.recv()  # the parent computes meanwhile
    parent.close()


def _batches(args: Namespace, number: int) -> Iterator[Batch]:
    models = Models.load()
    for rows in args.batches:
        for temperature in args.temperatures:
            run = f"T={temperature} batch {rows}"
            for part, tokens_of, ways in _parts(models, temperature, args):
                texts = prompts(models, tokens_of, rows, args.prompts, args.prompt_tokens)
                title = f"{number + 1}/{args.processes} {part} {run}"
                for calls in time_calls(ways, texts, title, args.repeats, number):
                    yield Batch(run, part, calls)


def _parts(models: Models, temperature: float, args: Namespace) -> Iterator[tuple[str, str, dict[str, Generate]]]:
    """Name, kind of prompts, and ways."""
    if args.what == SWEEP:
        rule = args.rule if temperature > 0 else "auto"
        yield SWEEP, "held-out", {
            **fixed(models, temperature, args.tokens, rule),
            **planned(models, temperature, args.tokens, rule, args.seeded),
        }  # fmt: skip
        return
    for workload in (one for one in WORKLOADS if one.name in args.workloads):
        ways = workload.ways(models, temperature, args.seeded)
        if args.no_hf:
            del ways["hf plain"]
        yield workload.name, workload.prompts, ways
