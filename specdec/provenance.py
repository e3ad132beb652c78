"""Where a number came from: everything a result file must say about the run that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from specdec.hardware import cpu_name, gpu_name
from specdec.version import __version__

DISTRIBUTIONS = ("torch", "transformers", "accelerate", "numpy", "safetensors", "flash-attn", "llama-cpp-python")
"""Distributions whose versions can change a measurement."""


def provenance(*, seed: int, threads: int, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Command, commit, versions, hardware, threads, seed and date of the running process, ready for JSON.

    Args:
        seed, threads, device: what the run uses.
        more: anything else worth keeping (options, checksums of models), as `placeless` has it.
    """
    return {
        "command": command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "specdec": __version__,
        **git_state(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "versions": {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "gpu": gpu_name() if device.startswith("cuda") else None,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": device,
        "threads": threads,
        "seed": seed,
        **placeless(more),
    }


def command() -> str:
    """The command line, with the names of the program and of files instead of their places on this machine."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        name = "python -m " + (spec.parent if spec is not None else Path(sys.argv[0]).parent.name)
    return " ".join([name, *map(placeless, sys.argv[1:])])


def placeless(value: Any) -> Any:
    """`value` (text, a path, or lists and dictionaries of such) without places of this machine.

    Absolute paths become relative to the checkout if they lie in it, and their last component otherwise, also behind
    "=", ":" or ",": "--out=/somewhere/runs/a" -> "--out=a".
    """
    if isinstance(value, dict):
        return {name: placeless(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [placeless(one) for one in value]
    if not isinstance(value, (str, Path)):
        return value
    return _ABSOLUTE.sub(lambda found: found[1] + _short(Path(found[2])), str(value))


_ABSOLUTE = re.compile(r"(^|[=:,])(/[^=:,\n]*)")


def _short(path: Path) -> str:
    root = Path(__file__).resolve().parent.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name or path.as_posix()


def git_state(folder: Path) -> dict[str, Any]:
    """Commit of the checkout that holds `folder` and whether it has uncommitted changes; None where there is none."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package inside somebody else's checkout must not claim their commit.
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": git("rev-parse", "HEAD"), "git_dirty": bool(git("status", "--porcelain", "-uno"))}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
