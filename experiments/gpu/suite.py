"""The tests that need a GPU, run by pytest in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import specdec
from specdec.experiments.clock import Deadline
from specdec.experiments.gpu.options import GpuOptions


def tests(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
    """How many tests passed, failed and were skipped; a dry run only collects them."""
    root = Path(specdec.__file__).resolve().parent.parent
    if not (root / "tests" / "gpu").is_dir():
        return [{"skipped": "the tests are in a checkout of the repository, not in the installed library"}]
    command = [sys.executable, *"-m pytest -q -m gpu tests/gpu -p no:cacheprovider --durations=5".split()]
    command += ["--collect-only"] if options.dry else []
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=max(1.0, deadline.left - 20), check=False
        )
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else str(late.stdout)
        return [{"failed": "no time left", "output": text[-4000:]}]
    entry: dict[str, Any] = {"exit_code": done.returncode, "output": done.stdout[-4000:]}
    counts = re.findall(r"(\d+) (passed|failed|skipped|error|tests collected|deselected)", done.stdout)
    entry |= {kind.replace(" ", "_"): int(number) for number, kind in counts}
    number = re.search(r"^(\d+)(?:/\d+)? tests? collected", done.stdout, flags=re.MULTILINE)
    if number is not None:
        entry["tests_collected"] = int(number[1])
    if done.returncode:
        entry["failed"] = entry.get("failed") or f"pytest ended with {done.returncode}: {done.stderr[-500:]}"
    return [entry]
