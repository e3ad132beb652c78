"""The folder of a run: what was asked in `run.json`, one JSON line per finished unit, summaries in `logs/`.

Lines are appended and flushed one at a time, so that a run that is killed loses the unit it was in and no more. A torn
last line is dropped; anything else that does not read is an error that names file and line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specdec.experiments.frame import append_lines
from specdec.shown_errors import ExperimentError

SCHEMA = 1
REQUIRED = {
    "run": ("cell", "prompt", "domain", "turns"),
    "log": ("temperature", "prompt", "domain", "file"),
    "provenance": ("command", "date"),
    "forms": ("linear",),
}
REPEATED = frozenset({"provenance", "forms"})
"""Kinds of lines that stand for no unit of work."""


class ResultsError(ExperimentError):
    """Result files cannot be used; the message names the file, the line and what is wrong."""


class Store:
    """Results of one run in `folder`. `rank`: this process's number among those that share the work."""

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank
        self._path = folder / f"runs-{rank}.jsonl"

    def open(self, asked: dict[str, Any]) -> None:
        """Begin, or resume what was begun with the same options.

        Raises:
            ResultsError: the folder holds a run of other options, or damaged files.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        known = self.folder / "run.json"
        if known.exists():
            before = self.asked()
            differing = sorted(name for name in {*before, *asked} if before.get(name) != asked.get(name))
            if differing:
                changes = "; ".join(f"{name}: {before.get(name)} -> {asked.get(name)}" for name in differing)
                raise ResultsError(
                    f"{self.folder.name} holds a run of other options ({changes}): give the same ones to resume it, or "
                    "another --out"
                )
        else:
            _write_whole(known, json.dumps({"schema": SCHEMA, "options": asked}, indent=1) + "\n")
        if self._path.exists():
            _drop_torn_line(self._path)

    def asked(self) -> dict[str, Any]:
        """The options the run was begun with.

        Raises:
            ResultsError: there is no run here, or its file does not read.
        """
        path = self.folder / "run.json"
        if not path.is_file():
            raise ResultsError(
                f"{self.folder}: expected the folder of a run (run.json in it); run `specdec accept` first"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found, schema = content["options"], content["schema"]
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"{path.name}: does not read ({error!r}); the run cannot be resumed") from None
        if schema != SCHEMA or not isinstance(found, dict):
            raise ResultsError(f"{path.name}: expected schema {SCHEMA}, got {schema!r}: written by another version")
        return found

    def append(self, kind: str, entry: dict[str, Any]) -> None:
        """Add one line and hand it to the operating system."""
        append_lines(self._path, kind, [entry])

    def entries(self, kind: str) -> Iterator[dict[str, Any]]:
        """All lines of a kind, of all processes; units that were run twice count once.

        Raises:
            ResultsError: a line that does not read, or lacks what its kind must have.
        """
        seen = set()
        for path in sorted(self.folder.glob("runs-*.jsonl")):
            for entry in _lines(path):
                if entry["kind"] == kind:
                    key = None if kind in REPEATED else unit_key(entry)
                    if key is None or key not in seen:
                        seen.add(key)
                        yield entry

    def forms(self) -> dict[str, str]:
        """How earlier sessions multiplied (see `verify.linear.FormTable.names`); what was written first holds."""
        found: dict[str, str] = {}
        for entry in self.entries("forms"):
            found = {**entry["linear"], **found}
        return found

    def finished(self) -> set[str]:
        """Keys of the units that need not be run again."""
        return {unit_key(entry) for kind in ("run", "log") for entry in self.entries(kind)}


def unit_key(entry: dict[str, Any]) -> str:
    """What identifies a unit of work: its cell (a log: its temperature) and prompt."""
    cell = entry["cell"] if "cell" in entry else f"log T={entry.get('temperature')}"
    return f"{cell} | {entry.get('prompt')}"


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_bytes()
    lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == len(lines):
                return  # no newline yet: the process that wrote it was stopped, or is still writing
            raise ResultsError(
                f"{path.name} line {number} is not JSON; remove the line to lose that unit only"
            ) from None
        kind = entry.get("kind") if isinstance(entry, dict) else None
        missing = [name for name in REQUIRED.get(str(kind), ()) if name not in entry]
        if kind not in REQUIRED or missing:
            wrong = f"lacks {', '.join(missing)}" if missing else f"has kind {kind!r}, expected {', '.join(REQUIRED)}"
            raise ResultsError(f"{path.name} line {number} {wrong}; remove the line to lose that unit only")
        yield entry


def _drop_torn_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def _write_whole(path: Path, text: str) -> None:
    """Write so that nobody ever sees half a file."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
