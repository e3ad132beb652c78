"""Whatever a pair's file says, an export runs the engine's programs with that in their arguments, nothing else."""

from __future__ import annotations

import ast
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.pairing import Drafting, Pair, find_pair
from specdec.pairing.checks import problems
from specdec.pairing.export import ENGINES, Export, export_pair
from specdec.pairing.schema import Draft

PROGRAMS = ("vllm", "serve", "python", "trtllm-serve", "hf", "llama-server", "text-generation-launcher", "touch", "id")
HOSTILE = (
    "a\ntouch owned\n",
    "a\r\ntouch owned",
    "$(touch owned)",
    "`touch owned`",
    "'; touch owned; '",
    '"; touch owned; "',
    "a'\"\\ b",
    "-x",
    "--trust",
    "~",
    "*",
    "END\ntouch owned",
    "a\\\ntouch owned",
    "\x1b[2J\x07",
    "a\x85b\u2028c",
    "\x7f",
    "# a",
    "!!",
    "{a,b}",
    "\U0001f600 \u00e9",
    "'''\nimport os\n",
    "a: b #c",
    "%s%n",
    "\u202ereversed",
)
STUB = '#!/bin/bash\n{ printf \'%s\\0\' "${0##*/}" "$@"; printf \'\\1\\0\'; } >> "$CALLS"\n'


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PATH of programs that write down how they were called, and `cat`."""
    folder = tmp_path_factory.mktemp("bin")
    for name in PROGRAMS:
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    (folder / "cat").symlink_to("/bin/cat")
    return folder


def calls(text: str, stubs: Path, place: Path) -> list[tuple[str, ...]]:
    """What a shell runs of `text`."""
    place.mkdir(exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    shell = {"env": {"PATH": str(stubs), "CALLS": str(place / "calls"), "LC_ALL": "C.UTF-8"}, "cwd": place}
    data = text.encode("utf-8", "surrogateescape")
    run: Any = partial(subprocess.run, capture_output=True, timeout=60, **shell)
    checked = run(["/bin/bash", "-n"], input=data)
    assert checked.returncode == 0, checked.stderr
    done = run(["/bin/bash", "-c", data])
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    found = (place / "calls").read_bytes().decode("utf-8", "surrogateescape") if (place / "calls").exists() else ""
    return [tuple(call.split("\0")[:-1]) for call in found.split("\1\0")[:-1]]


def hostile(text: str, kind: str = "model", other: str = "a\nb", **drafting: Any) -> Pair:
    """A pair of folders and revisions of that name."""
    pair = find_pair("qwen3-8b-0.6b")
    path = text.replace("\0", "")
    target = replace(pair.target, model=None, path=path, facts=None, revision=other)
    draft = Draft("ngram") if kind == "ngram" else Draft(kind, path=path + "x", revision=other)
    named = replace(pair, name=text, summary=text, target=target, draft=draft, drafting=Drafting(**drafting))
    return replace(named, folder=Path("/nowhere"))


def exports(pair: Pair) -> list[Export]:
    found = []
    for engine in ENGINES:
        if not (pair.draft.kind == "eagle3" and engine in ("transformers", "ray")):
            found.append(export_pair(pair, engine))
    return found


def check(pair: Pair, stubs: Path, place: Path) -> None:
    found = exports(pair)
    text = "\n".join(export.text() for export in found)  # of all engines: one shell
    assert calls(text, stubs, place) == [command for export in found for command in export.commands]
    files = {name: text for export in found for name, text in export.files.items()}
    assert {path.name for path in place.iterdir()} == {"calls", *files}
    for export in found:
        for name, text in export.files.items():
            assert (place / name).read_bytes().decode("utf-8", "surrogateescape") == text
        if export.engine == "transformers":
            program = ast.parse(export.files["generate.py"])
            strings = {node.value for node in ast.walk(program) if isinstance(node, ast.Constant)}
            assert {pair.location(pair.target), pair.target.revision} <= strings
            assert {type(node) for node in program.body} <= {ast.ImportFrom, ast.Assign, ast.Expr}
        if export.engine == "tensorrt-llm":
            settings = yaml.safe_load(export.files["speculative.yaml"])
            assert settings["speculative_config"] == export.arguments
            assert settings["revision"] == pair.target.revision
        if export.engine == "ray":
            (application,) = yaml.safe_load(export.files["ray.yaml"])["applications"]
            assert application["args"] == export.arguments
            assert application["args"]["pair"]["target"]["revision"] == pair.target.revision
        for line in export.text().splitlines():
            if line.startswith("#"):
                assert line.isprintable()


@pytest.mark.parametrize(("first", "kind"), list(enumerate(("model", "ngram", "eagle3"))))
def test_nothing_else_runs(first: int, kind: str, stubs: Path, tmp_path: Path) -> None:
    for text in HOSTILE[first::3]:
        check(
            hostile(text, kind, text.strip() or "x", tree=None if kind == "ngram" else (2, 1)), stubs, tmp_path / "run"
        )


@settings(max_examples=8)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0\1"), max_size=30).filter(bool),
       other=st.text(st.characters(codec="utf-8", exclude_characters="\0\1"), min_size=1, max_size=12))  # fmt: skip
def test_nothing_else_runs_whatever_it_says(text: str, other: str, stubs: Path, tmp_path_factory: Any) -> None:
    check(hostile(text, "model", other), stubs, tmp_path_factory.getbasetemp() / "whatever")


def test_the_stubs_see_what_runs(stubs: Path, tmp_path: Path) -> None:
    """Control: a remark that is not kept on its line is seen, and so is an argument without quotes."""
    export = export_pair(hostile("a\ntouch owned #", other="b"), "tgi")
    assert calls("\n".join(f"# {note}" for note in export.notes), stubs, tmp_path / "run") != []
    assert calls(" ".join(export.commands[0]), stubs, tmp_path / "run") != list(export.commands)
    assert calls(f"{export.text()}\ntouch owned", stubs, tmp_path / "run")[1:] == [("touch", "owned")]
    assert calls(export.text(), stubs, tmp_path / "run") == list(export.commands)


@pytest.mark.parametrize("text", ["--trust-remote-code", "-x", "a b", "a\nb", "", "\x7f"])
def test_a_revision_is_no_option(text: str) -> None:
    pair = find_pair("qwen3-8b-0.6b")
    found = problems(replace(pair, target=replace(pair.target, revision=text)))
    assert any("[target] revision: expected a branch, tag or commit" in problem for problem in found)
    assert problems(replace(pair, target=replace(pair.target, revision="refs/pr/1"))) == []
