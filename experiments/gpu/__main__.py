"""`python -m specdec.experiments.gpu all --out DIR`: tests and benchmarks on one GPU, within ten minutes."""

from __future__ import annotations

import dataclasses
import os
import sys

import typer

from specdec.experiments.frame import Command
from specdec.experiments.gpu.options import SECTIONS, GpuCommand, GpuOptions


def command(asked: GpuCommand) -> int:
    """Tests and benchmarks on one GPU, within ten minutes.

    Writes `gpu.json` (every figure, with the run's provenance; rewritten after each section, so that an interrupted run
    keeps what it has), `gpu.md` and pictures. --dry-run does all of it in seconds on a CPU, with tiny shapes.
    """
    import torch

    from specdec.experiments.gpu.sections import run
    from specdec.verify.attention.choose import VARIABLE as BACKEND

    os.environ.setdefault(BACKEND, "auto")  # what is to be measured is off otherwise
    options = GpuOptions.dry_run(asked.out) if asked.dry_run else GpuOptions(asked.out)
    if asked.budget is not None:
        options = dataclasses.replace(options, budget_seconds=asked.budget)
    if not asked.dry_run and not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device here; use --dry-run to see whether everything runs")
    return run(options, SECTIONS if asked.section == "all" else [asked.section])


main = Command(GpuCommand, command)

if __name__ == "__main__":
    sys.exit(main())
