"""Every code block of the README and of docs/ runs as printed; the site builds; what the code cites is there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from source_files import ROOT, sources
from typer.testing import CliRunner

from specdec.cli.app import app

LOG = ROOT / "experiments" / "LOG.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?(?:<!-- needs: (?P<packages>[\w, ]+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
QUICK = {"cache", "doctor", "generate", "pairs"}
SLOW = {"check", "warmup"}
"""Commands that are run as they stand; of the others, which measure for minutes, only the options are checked."""
PROGRAMS = ("specdec", "make", "pip", "python", "accelerate", "torchrun", "jupytext", "serve")
"""What lines of shell begin with."""
MOST_NOT_RUN = 5
NOT_INSTALLED_HERE = {"lm_eval", "pyarrow", "torchao", "trl"}
"""Packages that `make test` does not install; blocks that need one run where it is there."""
LONGEST_LINE = 160
LONGEST_LINE_OF_THE_LOG = 200
LONGEST_CODE = 92
"""Characters of a line of Python or shell: what a page shows without breaking it."""
MOST_LINES = 5  # of one paragraph or list item


def blocks(page: Path, language: str, reason: bool = False) -> list[re.Match[str]]:
    found = [match for match in BLOCK.finditer(page.read_text()) if match["language"] == language]
    return [match for match in found if bool(match["reason"]) == reason]


def needed(block: re.Match[str]) -> list[str]:
    """Packages without which it is not run."""
    return (block["packages"] or "").replace(",", " ").split()


def shell_lines(page: Path) -> list[list[str]]:
    """Of shell blocks: as words, comments and continued lines resolved."""
    code = "\n".join(match["code"] for match in blocks(page, "sh")).replace("\\\n", " ")
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def commands(page: Path) -> list[list[str]]:
    """`specdec ...` lines of shell blocks."""
    return [line for line in shell_lines(page) if line[0] == "specdec"]


def run_python(page: Path) -> None:
    """In their order, in one namespace that holds nothing before the page's first line."""
    names = {"__name__": "docs"}
    for match in blocks(page, "python"):
        if any(importlib.util.find_spec(package) is None for package in needed(match)):
            continue
        line = page.read_text()[: match.start("code")].count("\n")
        exec(compile("\n" * line + match["code"], str(page), "exec", dont_inherit=True), names)


def run_commands(page: Path, which: set[str]) -> None:
    for command in commands(page):
        if command[1] in which:
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, f"{shlex.join(command)}: {result.output}"


def check_fences(page: Path) -> None:
    """Every fence of a page belongs to a block that BLOCK finds, in a language that somebody checks."""
    text = page.read_text()
    found = list(BLOCK.finditer(text))
    assert len(re.findall(r"^[ \t>]*(?:```|~~~)", text, re.M)) == 2 * len(found), "a block that no test sees"
    assert {match["language"] for match in found} <= {"python", "sh", "", "toml", "json", "text"}
    for match in found:
        if match["language"] in ("toml", "json"):
            {"toml": tomllib, "json": json}[match["language"]].loads(match["code"])


def check_line(words: list[str]) -> None:
    """What can be said of a line of shell without running it."""
    program, rest = words[0], words[1:]
    assert program in PROGRAMS, f"{shlex.join(words)}: nobody checks {program}"
    if program == "specdec":
        check_options(words)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest[0] in targets, f"make {rest[0]}: no such target"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (what,) = [word for word in rest[1:] if not word.startswith("-")]
        asked = re.fullmatch(r"(?:specdec-lm|\.)(?:\[([\w,]+)\])?", what)
        ours = {re.split("[=>]", one)[0] for extra in extras.values() for one in extra}
        assert asked or re.split("[=>]", what)[0] in ours, (
            f"{shlex.join(words)}: neither this library nor of its extras"
        )
        if asked is None:
            return
        assert set((asked[1] or "").split(",")) <= {*extras, ""}, f"{shlex.join(words)}: no such extra"
    elif program == "serve":
        assert rest[:2] == ["run", "specdec.serve.ray:app"], f"{shlex.join(words)}: not this library's application"
        if importlib.util.find_spec("ray") is not None:
            from specdec.serve.ray import Arguments

            Arguments.model_validate(dict(word.split("=") for word in rest[2:]))
    elif program == "jupytext":
        assert all(list(ROOT.glob(word)) for word in rest if not word.startswith("-"))
    elif rest[0].endswith(".py"):
        assert (ROOT / rest[0]).is_file(), f"{shlex.join(words)}: no such script"
    else:  # python, accelerate launch, torchrun
        assert "-m" in rest, f"{shlex.join(words)}: neither a script nor a module"
        module, asked_of_it = rest[rest.index("-m") + 1], rest[rest.index("-m") + 2 :]
        check_module(module, asked_of_it)


def check_module(module: str, words: list[str]) -> None:
    known = json.loads((ROOT / "tests" / "experiments" / "command_options.json").read_text())
    assert module in known, f"python -m {module}: no such command"
    options = {word.split("=")[0] for word in words if word.startswith("-")}
    assert options <= set(known[module]), f"python -m {module}: unknown {options - set(known[module])}"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft and trl ask for it
@pytest.mark.filterwarnings(r"ignore:::ray\.")  # it uses what others, and itself, deprecate
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDEC_CACHE", "off")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes that a block starts
    run_python(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_users_write_is_exported_by_specdec_itself(page: Path) -> None:
    code = "".join(match["code"] for match in BLOCK.finditer(page.read_text()) if match["language"] == "python")
    inner = re.findall(r"^\s*(?:from|import) specdec\.(\w+)", code, re.M)
    assert not [name for name in inner if name != "experiments"], "what measures is no part of the public face"


@pytest.mark.filterwarnings(r"ignore:::ray\.")  # it uses what others, and itself, deprecate
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run_or_at_least_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    for line in shell_lines(page):
        check_line(line)
    run_commands(page, QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_slow_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    run_commands(page, SLOW)


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


PLANTED = {
    "a statement that raises": ("```python\nassert False\n```\n", run_python),
    "a name of another page": ("```python\nprint(target)\n```\n", run_python),
    "a command that fails": ("```sh\nspecdec pairs show no-such-pair\n```\n", lambda page: run_commands(page, QUICK)),
    "an unknown option": ("```sh\nspecdec bench --no-such-option\n```\n", lambda page: check_line(*shell_lines(page))),
    "no such target": ("```sh\nmake tea\n```\n", lambda page: check_line(*shell_lines(page))),
    "another's distribution": ("```sh\npip install specdec\n```\n", lambda page: check_line(*shell_lines(page))),
    "no such extra": ("```sh\npip install 'specdec-lm[gold]'\n```\n", lambda page: check_line(*shell_lines(page))),
    "no such module": ("```sh\npython -m specdec.tea\n```\n", lambda page: check_line(*shell_lines(page))),
    "a program nobody checks": ("```sh\ncurl tea\n```\n", lambda page: check_line(*shell_lines(page))),
    "an argument of no server": (
        "```sh\nserve run specdec.serve.tea:app\n```\n",
        lambda page: check_line(*shell_lines(page)),
    ),
    "an indented block": ("- so:\n\n  ```python\n  assert False\n  ```\n", check_fences),
    "a block with a title": ('```python title="so"\nassert False\n```\n', check_fences),
    "a block without an end": ("```python\nassert False\n", check_fences),
    "an unknown language": ("```pyhton\nassert False\n```\n", check_fences),
    "a file that does not read": ("```toml\na =\n```\n", check_fences),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_broken_block_is_found(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, check = PLANTED[what]
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises((AssertionError, NameError, tomllib.TOMLDecodeError)):
        check(page)


def test_every_block_is_one_that_somebody_checks() -> None:
    for page in PAGES:
        check_fences(page)
    every = [(page.name, match["reason"]) for page in PAGES for match in BLOCK.finditer(page.read_text())]
    skipped = [(name, reason) for name, reason in every if reason]
    assert len(skipped) <= MOST_NOT_RUN, skipped
    asked = {package for page in PAGES for match in BLOCK.finditer(page.read_text()) for package in needed(match)}
    assert asked - {"ray"} == NOT_INSTALLED_HERE


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


@pytest.mark.parametrize("page", [*PAGES, LOG], ids=lambda page: page.name)
def test_no_line_is_too_long_to_read_or_to_compare(page: Path) -> None:
    most = LONGEST_LINE_OF_THE_LOG if page == LOG else LONGEST_LINE
    long = [i for i, line in enumerate(page.read_text().splitlines(), 1) if len(line) > most]
    assert not long, f"lines {long} have more than {most} characters"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_line_of_code_is_too_long_to_be_shown(page: Path) -> None:
    shown = [match["code"] for match in BLOCK.finditer(page.read_text()) if match["language"] in ("python", "sh")]
    assert not [line for code in shown for line in code.splitlines() if len(line) > LONGEST_CODE]


def walls(text: str) -> list[str]:
    """Paragraphs and list items of more than MOST_LINES lines; code, tables and headings are none."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    parts = re.split(r"\n[ \t]*\n|\n(?=[ ]*(?:[-*]|\d+\.) )", prose)
    return [part for part in parts if len(part.strip().splitlines()) > MOST_LINES and not part.lstrip().startswith("|")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_paragraph_is_a_wall(page: Path) -> None:
    assert not walls(page.read_text())


def test_a_wall_is_seen() -> None:
    lines = [f"line {number}" for number in range(MOST_LINES + 1)]
    assert walls("\n".join(["# heading", "", *lines])) == ["\n".join(lines)]
    assert not walls("\n".join(["| a |", *lines]) + "\n\n" + "\n".join(f"- {line}" for line in lines))


def test_the_pictures_are_those_of_the_results(tmp_path: Path) -> None:
    """Their words and points; the rest may differ by version of matplotlib."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    for drawn in pictures.draw(tmp_path):
        kept = ROOT / "docs" / "img" / drawn.name
        page = "serving.md" if drawn.name == "request.svg" else "planner.md"
        assert f"img/{drawn.name}" in (ROOT / "docs" / page).read_text()
        new, old = drawn.read_text(), kept.read_text()
        for part in (
            r"<text[^>]*>([^<]*)<",
            r"<use xlink:(href)=" if page == "planner.md" else r'<path class="l" d="(.*)"',
        ):
            assert re.findall(part, new) == re.findall(part, old)
            assert len(re.findall(part, new)) > 12


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "api.html").read_text().count("Speculator") > 10
    for script in (ROOT / "experiments" / "notebooks").glob("*.py"):
        assert "import specdec" in re.sub(r"<[^>]+>", "", (tmp_path / "notebooks" / f"{script.stem}.html").read_text())
