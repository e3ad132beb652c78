"""`specdec warmup`: the next process compiles and measures nothing; and who waits for a first call is told why."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from specdec.cli import app
from specdec.cli.waiting import WAITING, Spinner, spinner
from specdec.planner import factory
from specdec.planner.store import CostStore
from specdec.verify.first_use import LOGGER, first_use, levels

SAID = "first use of this model on this machine"


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has said and measured nothing yet."""
    monkeypatch.setattr(factory, "STORE", CostStore())
    levels.cache_clear()
    yield
    levels.cache_clear()


def test_the_first_call_says_why_it_takes_longer_and_says_it_once(
    fresh: None, tiny_pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = ["generate", "--pair", str(tiny_pair), "-p", "abc", "-n", "4", "--device", "cpu"]
    for _ in range(2):
        assert CliRunner().invoke(app, common).exit_code == 0
    assert [record.name for record in caplog.records if SAID in record.message] == ["specdec"]


def test_a_call_that_measures_nothing_says_nothing(
    fresh: None, tiny_pair: Path, caplog: pytest.LogCaptureFixture
) -> None:
    common = ["generate", "--pair", str(tiny_pair), "-p", "abc", "-n", "4", "--device", "cpu", "-k", "2"]
    assert CliRunner().invoke(app, common).exit_code == 0
    assert SAID not in caplog.text


def test_in_a_terminal_a_spinner_turns_and_leaves_nothing(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOGGER.name)
    screen = io.StringIO()
    handler = Spinner(Console(file=screen, force_terminal=True, width=100))
    LOGGER.addHandler(handler)
    try:
        with first_use():
            while WAITING not in screen.getvalue():
                time.sleep(0.05)
        LOGGER.warning("something else")
    finally:
        LOGGER.removeHandler(handler)
    erase = "\x1b[2K"
    shown = screen.getvalue()
    assert erase in shown[shown.rindex(WAITING) :]
    assert shown.endswith("something else\n")


def test_without_a_terminal_the_line_is_the_logs(fresh: None, caplog: pytest.LogCaptureFixture) -> None:
    with spinner(), first_use():
        assert not [one for one in LOGGER.handlers if isinstance(one, Spinner)]
    assert SAID in caplog.text


def specdec(cache: Path, *arguments: object) -> Any:
    environment = {**os.environ, "SPECDEC_CACHE": str(cache)}
    command = [sys.executable, "-m", "specdec", *map(str, arguments), "--device", "cpu", "--threads", "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)


def test_after_a_warmup_the_next_process_finds_everything(tiny_pair: Path, tmp_path: Path) -> None:
    warmed = specdec(tmp_path, "warmup", tiny_pair)
    assert SAID in warmed.stderr
    assert f"kept in {tmp_path}" in warmed.stdout
    assert [line.split(":")[0] for line in warmed.stdout.splitlines()[:2]] == ["batch 1, greedy", "batch 1, sampled"]
    call = ("generate", "--pair", tiny_pair, "-p", "abc", "-n", "4")
    assert SAID not in specdec(tmp_path, *call).stderr
    assert SAID in specdec(tmp_path / "other", *call).stderr  # without it there is something to wait for


def test_what_is_warmed_up_is_a_pair_or_a_target(tiny_pair: Path) -> None:
    for model in (tiny_pair, tiny_pair / "target"):
        done = CliRunner().invoke(app, ["warmup", str(model), "--device", "cpu", "--batch", "2"])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("batch 2, greedy: first call ")
        assert "nothing is kept" in done.stderr  # tests keep their tables in memory
    both = CliRunner().invoke(app, ["warmup", str(tiny_pair), "--target", "x/y"])
    assert (both.exit_code, "got several" in both.stderr) == (2, True)
