"""`python -m specdec.experiments.gpu all --out DIR`: tests and benchmarks on one GPU, within ten minutes.

Writes `gpu.json` (every figure, with the run's provenance; rewritten after each section, so that an interrupted run
keeps what it has), `gpu.md` and pictures. `--dry-run` does all of it in seconds on a CPU, with tiny shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from specdec.experiments.gpu.attention import attention
from specdec.experiments.gpu.bandwidth import bandwidth
from specdec.experiments.gpu.clock import Deadline
from specdec.experiments.gpu.generation import generate
from specdec.experiments.gpu.options import SECTIONS, GpuOptions
from specdec.experiments.gpu.passes import passes
from specdec.experiments.gpu.plot import draw
from specdec.experiments.gpu.show import Results, page
from specdec.experiments.gpu.suite import tests
from specdec.experiments.provenance import provenance
from specdec.verify.attention.choose import VARIABLE as BACKEND

RUNS = {"tests": tests, "bandwidth": bandwidth, "attention": attention, "passes": passes, "generate": generate}


def run(options: GpuOptions, sections: Sequence[str]) -> int:
    """Run the sections in order; one that fails is reported and the others go on.

    Returns:
        0, or 1 when a section, a test or a measurement failed, or a text was wrong.
    """
    hf_logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(options.budget_seconds)
    plain = {name: str(value) for name, value in dataclasses.asdict(options).items() if name != "out"}
    source = provenance(seed=options.seed, threads=torch.get_num_threads(), device=options.device, options=plain)
    title = f"{source['gpu'] or source['cpu']}, torch {torch.__version__}"
    title = f"DRY RUN, figures mean nothing ({title})" if options.dry else title
    results: Results = {}
    seconds: dict[str, float] = {}
    for name in sections:
        begin = time.monotonic()
        try:
            results[name] = RUNS[name](options, deadline)
        except Exception as fault:  # what is known by now must still be written
            traceback.print_exc()
            results[name] = [{"failed": f"{type(fault).__name__}: {fault}"[:500]}]
        seconds[name] = time.monotonic() - begin
        print(f"{name}: {len(results[name])} entries in {seconds[name]:.1f} s", file=sys.stderr)
        whole = {"dry_run": options.dry, "provenance": source, "seconds": seconds, "results": results}
        (options.out / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    text = page(results, title)
    (options.out / "gpu.md").write_text(text, encoding="utf-8")
    drawn = draw(results, options.out)
    print(text)
    print(f"written: {', '.join(['gpu.json', 'gpu.md', *(path.name for path in drawn)])}", file=sys.stderr)
    return int(any(_bad(entry) for entries in results.values() for entry in entries))


def _bad(entry: dict[str, Any]) -> bool:
    return bool(entry.get("failed")) or entry.get("right") is False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m specdec.experiments.gpu", description=__doc__)
    parser.add_argument("section", choices=["all", *SECTIONS])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, gpu.md and the pictures")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU: does everything run?")
    parser.add_argument("--budget", type=float, help="seconds after which no measurement is begun")
    given = parser.parse_args(arguments)
    os.environ.setdefault(BACKEND, "auto")  # what is to be measured is off otherwise
    options = GpuOptions.dry_run(given.out) if given.dry_run else GpuOptions(given.out)
    if given.budget is not None:
        options = dataclasses.replace(options, budget_seconds=given.budget)
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device here; use --dry-run to see whether everything runs")
    return run(options, SECTIONS if given.section == "all" else [given.section])


if __name__ == "__main__":
    sys.exit(main())
