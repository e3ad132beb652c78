"""`specdec accept` and `specdec bench` take any pair of two models, and say in one line what is wrong with another."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from specdec.cli import app


@pytest.mark.parametrize("command", ["accept", "bench"])
@pytest.mark.parametrize(
    ("pair", "code", "said"),
    [
        ("no-such-pair", 2, "specdec pairs list"),
        ("llama-3.1-8b-ngram", 2, "expected a pair with a draft model"),
        ("llama-3.1-8b-eagle3", 2, "does not run eagle3 heads"),
        ("qwen3-8b-0.6b", 1, "hf download Qwen/Qwen3-8B"),  # known, but not on this machine, which is offline
    ],
)
def test_pairs_that_cannot_be_measured(command: str, pair: str, code: int, said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, "--pair", pair, "--out", str(tmp_path / "new")], env={"COLUMNS": "500"})
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output
