"""Every command of the experiments keeps its options, and says what they are without a wait for torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, list[str]] = json.loads(Path(__file__).with_name("command_options.json").read_text())
ONE_FILE = {f"specdec.experiments.{name}" for name in ("passes", "strict")}
"""Commands that lie in one file with what they run."""
PROGRAM = """
import os, runpy, sys
os.environ["COLUMNS"] = "200"
module, sys.argv[1:] = sys.argv[1], [*sys.argv[2:], "--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code, end.code
print("\\ntorch" if "torch" in sys.modules else "\\nnothing heavy")
"""


def said(command: str) -> str:
    arguments = [sys.executable, "-c", PROGRAM, *command.split()]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, check=True).stdout


def options(text: str) -> list[str]:
    """Of a page of help: those that begin a line, with their other spellings."""
    starts = [line for line in text.splitlines() if re.match(r"[\s│*]*-", line)]
    return sorted({name for line in starts for name in re.findall(r"(?<![\w-])--?[a-z][\w-]*", line.split("  (")[0])})


@pytest.mark.parametrize("command", OPTIONS)
def test_commands_keep_their_options(command: str) -> None:
    text = said(command)
    assert set(OPTIONS[command]) <= set(options(text))
    assert text.splitlines()[-1] == "nothing heavy" or command in ONE_FILE
