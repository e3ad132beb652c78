"""Every code block of the README and of docs/ runs; the site builds without a warning; what the code cites is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from source_files import ROOT, sources
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import specdec
from specdec.cli.app import app
from specdec.shipped import pair_folder

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)
QUICK = {"doctor", "generate", "pairs"}
"""Commands that are run as they stand; of the others only the options are checked."""
MOST_NOT_RUN = 5
LONGEST_LINE = 200


def blocks(page: Path, language: str, reason: bool = False) -> list[re.Match[str]]:
    found = [match for match in BLOCK.finditer(page.read_text()) if match["language"] == language]
    return [match for match in found if bool(match["reason"]) == reason]


def commands(page: Path) -> list[list[str]]:
    """`specdec ...` lines of shell blocks, comments and continued lines resolved."""
    code = "\n".join(match["code"] for match in blocks(page, "sh")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [line for line in lines if line[:1] == ["specdec"]]


@lru_cache(maxsize=1)
def prepared() -> dict[str, Any]:
    """What the pages take for given: two loaded models, their tokenizer, one tokenized prompt."""
    folder = pair_folder("stdlib-python")
    tokenizer = AutoTokenizer.from_pretrained(folder / "target")
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("target", "draft")
    }
    inputs = tokenizer("def parse_args(argv=None):", return_tensors="pt")
    prompts = [tokenizer(text).input_ids for text in ("def read(", "class Node", "import os")]
    return {**models, "tokenizer": tokenizer, "inputs": inputs, "prompts": prompts, "pipe": lambda text: text}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDEC_CACHE", "off")
    names = {"specdec": specdec, **prepared(), "__name__": "docs"}
    for match in blocks(page, "python"):
        line = page.read_text()[: match.start("code")].count("\n")
        exec(compile("\n" * line + match["code"], str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_or_at_least_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in commands(page):
        if command[1] in QUICK:
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, f"{shlex.join(command)}: {result.output}"
        else:
            check_options(command)


def check_options(command: list[str]) -> None:
    """Every option that the command line names exists."""
    group: Any = typer.main.get_command(app)
    rest = command[1:]
    while rest and rest[0] in getattr(group, "commands", {}):
        group, rest = group.commands[rest[0]], rest[1:]
    known = {name for parameter in group.params for name in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if word.startswith("-") and word.split("=")[0] not in known]
    assert not unknown, f"{shlex.join(command)}: unknown {unknown}"


def test_an_unknown_option_is_found() -> None:
    check_options(["specdec", "check", "--pair", "stdlib-python"])
    with pytest.raises(AssertionError, match="--no-such-option"):
        check_options(["specdec", "check", "--no-such-option"])


def test_nothing_is_shown_in_a_language_that_nobody_checks() -> None:
    known = {"python", "sh", "", "toml", "json", "text"}
    for page in PAGES:
        assert {match["language"] for match in BLOCK.finditer(page.read_text())} <= known, page
    every = [(page.name, match["reason"]) for page in PAGES for match in BLOCK.finditer(page.read_text())]
    skipped = [(name, reason) for name, reason in every if reason]
    assert len(skipped) <= MOST_NOT_RUN, skipped


def test_every_cited_section_of_the_algorithms_is_there() -> None:
    """Code cites "algorithms A.4, B.5" or, where the page is clear, "A.4" alone."""
    headings = re.findall(r"^#+ ([ABC]\.\d+[a-z]?(?:\.\d+)?) ", (ROOT / "docs" / "algorithms.md").read_text(), re.M)
    cited = {
        section: f"{path.relative_to(ROOT)} cites {section}"
        for path in [*sources(), *(ROOT / "tests").rglob("*.py")]
        for section in re.findall(r"(?<![\w.])[ABC]\.\d+[a-z]?(?:\.\d+)?(?!\w)", path.read_text())
    }
    assert len(cited) > 12
    assert len(set(headings)) == len(headings)
    assert not set(cited) - set(headings), [cited[section] for section in set(cited) - set(headings)]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "experiments" / "LOG.md"], ids=lambda page: page.name)
def test_no_line_is_too_long_to_read_or_to_compare(page: Path) -> None:
    long = [i for i, line in enumerate(page.read_text().splitlines(), 1) if len(line) > LONGEST_LINE]
    assert not long, f"lines {long} have more than {LONGEST_LINE} characters"


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "api.html").read_text().count("Speculator") > 10
