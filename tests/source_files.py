"""The library's source files, and the floors of the house they stand on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ["kv", "verify", "drafters", "specdec", "experiments", "specdec.serve", "specdec.cli"]
"""Lowest first. A floor imports itself and what lies below it."""
FOLDERS = ["kv", "verify", "drafters", "experiments"]
"""Folders at the top of the repository that are imported as `specdec.<folder>` through a symlink."""


def floor_of_file(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[:2] == ("specdec", "cli") or parts == ("specdec", "__main__.py"):
        return "specdec.cli"
    return "specdec.serve" if parts[:2] == ("specdec", "serve") else parts[0]


def floor_of_module(name: str) -> str | None:
    """The floor a dotted module name belongs to, None if it is not ours."""
    parts = name.split(".")
    if parts[0] != "specdec":
        return None
    if len(parts) > 1 and parts[1] in FOLDERS:
        return parts[1]
    return f"specdec.{parts[1]}" if parts[1:2] in (["cli"], ["serve"]) else "specdec"


def sources() -> Iterator[Path]:
    """Every Python file of the library, each once: symlinks are not followed. Notebooks are no part of it."""
    for top in ["specdec", *FOLDERS]:
        for folder, names, files in os.walk(ROOT / top):
            skipped = {"__pycache__", "notebooks"}
            names[:] = [name for name in names if name not in skipped and not Path(folder, name).is_symlink()]
            yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def module_name(path: Path) -> str:
    """The dotted name that a source file is imported under; a package's is that of its `__init__.py`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "specdec" else ("specdec", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
