"""A run, section by section: each takes the options and how much time is left, and gives its entries."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.utils import logging as hf_logging

from specdec.experiments.clock import Deadline
from specdec.experiments.gpu.attention import attention
from specdec.experiments.gpu.bandwidth import bandwidth
from specdec.experiments.gpu.generation import generate
from specdec.experiments.gpu.options import GpuOptions
from specdec.experiments.gpu.passes import passes
from specdec.experiments.gpu.plot import draw
from specdec.experiments.gpu.show import Results, page
from specdec.experiments.gpu.suite import tests
from specdec.provenance import provenance

RUNS: dict[str, Callable[[GpuOptions, Deadline], list[dict[str, Any]]]] = {
    "tests": tests, "bandwidth": bandwidth, "attention": attention, "passes": passes, "generate": generate,
}  # fmt: skip


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
