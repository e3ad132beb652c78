"""`python -m specdec.experiments.bench`: the same benchmark as `specdec bench`."""

from __future__ import annotations

import sys

from specdec.experiments.bench.options import BenchOptions
from specdec.experiments.frame import Command


def bench(options: BenchOptions) -> int:
    """Compare specdec with transformers' plain, assisted and prompt-lookup generation on this machine."""
    from specdec.experiments.bench.runner import run

    return run(options)


main = Command(BenchOptions, bench)

if __name__ == "__main__":
    sys.exit(main())
