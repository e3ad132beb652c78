"""The scripts of `examples/` run as they stand, where what they need is installed, and what they claim comes out."""

from __future__ import annotations

import io
import re
import runpy
import sys
from pathlib import Path

import pytest
from source_files import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
SAID = {
    "adapters": r"adapter on: equal to plain generate: True.*\nadapter off: equal to plain generate: True",
    "chat": r"> def read\(path\):\n(.*\n)+\(\d+ tokens per second\)\n\n> def write(.*\n)+\(\d+ tokens per second\)",
    "drop_in": r"emitted tokens +64 (.*\n)+equal to plain generate: True",
    "evaluate": r"same answers and score: True",
    "llm_plugin": r'"""Return the file',
    "pipeline": r"same texts: True",
    "train_grpo": r"same rewards and losses: True",
    "serving": r"--- import os\n(.*\n)+\d+ of \d+ drafted tokens were accepted",
}

NEEDS = {"evaluate": "lm_eval", "llm_plugin": "llm", "train_grpo": "trl"}
"""What `make test` does not install."""
ARGUMENTS = {"llm_plugin": ["-m", "specdec", "-o", "max_new_tokens", "12", "def read(path):"]}


def run(script: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", "off")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:  # of a command line
        if end.code:
            raise


def test_each_is_listed_and_checked() -> None:
    names = [script.stem for script in SCRIPTS]
    assert names == sorted(SAID)
    listed = re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "docs" / "recipes.md").read_text(), re.M)
    assert sorted(listed) == names


@pytest.mark.filterwarnings("ignore")  # of the packages: each calls what another deprecates
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    for variable in ("LLM_USER_PATH", "HF_DATASETS_CACHE"):  # where they keep what they are asked
        monkeypatch.setenv(variable, str(tmp_path))
    run(script, monkeypatch, *ARGUMENTS.get(script.stem, []))
    assert re.search(SAID[script.stem], capsys.readouterr().out)


def test_models_of_ones_own(
    tiny_pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ROOT / "examples" / "drop_in.py", monkeypatch, str(tiny_pair / "target"), str(tiny_pair / "draft"))
    assert "equal to plain generate: True" in capsys.readouterr().out
    run(ROOT / "examples" / "chat.py", monkeypatch, str(tiny_pair / "target"))
    assert capsys.readouterr().out.count("tokens per second)") == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_is_short_and_uses_public_names(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) < 60
    assert not re.search(r"specdec\.\w+\.\w+ import|from specdec\.", text)
