"""`specdec check`: a table, JSON with provenance, and the exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.kv.shared import SharedKVCache
from specdec.shipped import DEFAULT_PAIR


def invoke(pair: Path | str, *arguments: object) -> Any:
    given = ["check", "--pair", pair, "--device", "cpu", "--threads", 1, *arguments]
    return CliRunner().invoke(app, [str(argument) for argument in given])


def test_an_exact_pair_passes(tiny_pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    result = invoke(tiny_pair, "--budget", 4, "--k", 2, "--prompt", "def f", "--json", path)
    assert result.exit_code == 0, result.output
    for word in ("greedy text", "K/V cache", "law of token 1", "accepted | draft", "nothing found that contradicts"):
        assert word in result.stdout
    out = json.loads(path.read_text())
    assert out["passed"] is True
    assert out["settings"]["num_rows"] > 0
    assert out["provenance"]["models"] == {"target": "target", "draft": "draft"}
    assert {"specdec", "versions", "cpu", "seed", "threads"} <= out["provenance"].keys()


def test_a_pair_that_would_be_planned_is_checked_while_it_drafts(tiny_pair: Path) -> None:
    """The planner decodes this pair plainly: then nothing of the drafts would be checked."""
    result = invoke(tiny_pair, "--budget", 2, "--prompt", "def f", "--json", "-")
    found = {finding["name"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert found["accepted | draft"]["figures"]["num"] > 0
    assert found["draft law, q"]["status"] == "pass"


def test_json_alone_on_stdout(tiny_pair: Path) -> None:
    result = invoke(tiny_pair, "--budget", 1, "--draft", "none", "--prompt", "a", "--json", "-")
    assert json.loads(result.stdout)["settings"]["drafter"] == "none"


def test_a_broken_library_exits_with_1(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = SharedKVCache.commit
    monkeypatch.setattr(
        SharedKVCache, "commit", lambda self, paths: original(self, [list(range(len(path))) for path in paths])
    )
    # However little a busy machine leaves of two seconds: so many tokens move K/V that the bug shows.
    monkeypatch.setattr(sys.modules["specdec.lab.check"], "LEAST_TOKENS", 32)
    result = invoke(tiny_pair, "--budget", 2, "--prompt", "def f")
    assert result.exit_code == 1
    assert "FAILED: " in result.stdout
    assert "K/V cache" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "0"], 2, "--temperature"),
        (["--rule", "greedy"], 1, "does not sample"),
        (["--budget", "0"], 2, "--budget"),
    ],
)
def test_usage_errors(tiny_pair: Path, arguments: list[str], code: int, message: str) -> None:
    result = invoke(tiny_pair, *arguments)
    assert result.exit_code == code
    assert message in result.stderr


@pytest.mark.slow
def test_the_shipped_pair_passes() -> None:
    """A short check; the statistics of a long one are the command's own default."""
    result = invoke(DEFAULT_PAIR, "--budget", 8, "--prompt", "def parse_args(argv=None):\n    ")
    assert result.exit_code == 0, result.output
