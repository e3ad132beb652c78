"""`specdec bench`: specdec against `transformers`' own ways to generate, alternating in one process.

Importing this package imports no torch; `run_from_cli` does when it is called.
"""

from __future__ import annotations

from specdec.experiments.bench.options import BenchOptions

__all__ = ["BenchOptions", "run_from_cli"]


def run_from_cli(options: BenchOptions) -> int:
    """Run the benchmark, print and write its results. Returns the process's exit code (see `runner.run`)."""
    from specdec.experiments.bench.runner import run

    return run(options)
