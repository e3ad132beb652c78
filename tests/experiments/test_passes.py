"""`python -m specdec.experiments.passes`: every way to run a pass is timed, and they compute the same."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from specdec.experiments import passes
from specdec.verify.native.library import why_not
from specdec.verify.passes.base import Output
from specdec.verify.passes.direct import Direct


def test_times_every_way(tiny_pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    few = ["--widths", "1", "3", "--repeats", "2", "--slots", "9", "--rows", "2", "--threads", "1"]
    passes.main(["--pair", str(tiny_pair), *few, "--out", str(out)])
    printed = capsys.readouterr().out
    result = json.loads(next(out.glob("passes-*.json")).read_text())
    ways = set(passes.NAMES) - ({"native"} if why_not() else set())
    for name in ("target", "draft"):
        for figures in result[name].values():
            assert set(figures) == ways
            assert all(ms > 0 for own in figures.values() for ms in own.values())
        assert f"{name}, median ms of 2" in printed
    assert result["provenance"]["threads"] == 1


def test_a_way_that_computes_something_else_is_refused(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Direct.__call__
    monkeypatch.setattr(Direct, "__call__", lambda *given: [Output(one.logits.flip(-1)) for one in own(*given)])
    with pytest.raises(AssertionError, match="direct computes something else"):
        passes.main(["--pair", str(tiny_pair), "--widths", "1", "--repeats", "1", "--slots", "4", "--threads", "1"])


@pytest.mark.skipif(shutil.which("gcc") is None or sys.platform == "win32", reason="no compiler")
def test_where_there_is_a_compiler_there_are_native_passes() -> None:
    """Or the tests of native passes would be skipped in silence."""
    assert why_not() is None
