"""`specdec cache`: shows what the library keeps, removes that, and never anything that is not its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from specdec.cli import app
from specdec.verify.folders import VARIABLE

OURS = {
    f"costs-{'0a' * 12}.json": b"{}",
    f"native/{'1b' * 12}.so": b"\x7fELF" * 500,
    f"native/{'1b' * 12}.so.sum": b"2000 abc\n",
    "native/building-x1/llama.o": b"half",
    "tmpab12.part": b"half",
}
OTHERS = {
    "notes.txt": b"mine", "costs.json": b"mine", "native/libmine.so": b"mine", "models/costs-000.json": b"mine",
    "native/deep/costs.json": b"mine", f"native/costs-{'0a' * 12}.json": b"mine", "tmp.part": b"mine",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    for name, content in {**OURS, **OTHERS}.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"{'2c' * 12}.so").write_bytes(b"mine")
    (place / f"costs-{'2c' * 12}.json").symlink_to(outside / f"{'2c' * 12}.so")
    (place / "native" / "building-link").symlink_to(outside)
    monkeypatch.setenv(VARIABLE, str(place))
    return place


def invoke(*arguments: str, **fields: Any) -> Any:
    return CliRunner().invoke(app, ["cache", *arguments], **fields)


def files(place: Path) -> set[str]:
    return {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file() and not path.is_symlink()}


def test_it_lists_what_where_how_large_and_how_old(folder: Path) -> None:
    text = invoke().stdout
    assert str(folder) in text
    for name in OURS:
        [line] = [line for line in text.splitlines() if line.endswith(f" {name}")]
        assert " B " in line or " kB " in line
        assert " s " in line
    assert "cost table" in text
    assert "in 5 files" in text
    assert "not this library's" in text
    table = json.loads(invoke("--json").stdout)
    assert {Path(one["path"]).relative_to(folder).as_posix(): one["bytes"] for one in table["files"]} == {
        name: len(content) for name, content in OURS.items()
    }
    assert table["bytes"] == sum(map(len, OURS.values()))


def test_it_removes_its_own_and_nothing_else(folder: Path) -> None:
    result = invoke("clear", "--yes")
    assert result.exit_code == 0, result.output
    assert "removed 5 files" in result.stdout
    assert files(folder) == set(OTHERS)
    assert all((folder / name).read_bytes() == content for name, content in OTHERS.items())
    assert [path.read_bytes() for path in (folder.parent / "outside").iterdir()] == [b"mine"]
    assert not (folder / "native" / "building-x1").exists()
    again = json.loads(invoke("clear", "--yes", "--json").stdout)
    assert again == {"removed": 0, "bytes": 0, "errors": {}}


def test_it_asks_first(folder: Path) -> None:
    refused = invoke("clear", input="n\n")
    assert refused.exit_code == 1
    assert "Remove 5 files" in refused.stderr
    assert set(OURS) <= files(folder)
    assert invoke("clear", input="y\n").exit_code == 0
    assert not set(OURS) & files(folder)


@pytest.mark.parametrize("place", ["off", "", "/proc/nowhere", "~nobody-of-that-name/x"])
def test_without_a_folder_there_is_nothing(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, place)
    for arguments in ((), ("--json",), ("clear", "--yes"), ("clear",)):
        result = invoke(*arguments)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
    assert json.loads(invoke("--json").stdout)["files"] == []


def test_a_file_that_cannot_be_removed_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    result = invoke("clear", "--yes")
    assert result.exit_code == 1
    assert "Permission denied" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_the_library_writes_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are written in two places: where files are made, and where they are known again."""
    from specdec.planner.costs import Costs
    from specdec.planner.store import CostStore
    from specdec.verify.kept import kept_files
    from specdec.verify.native import build

    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(build, "_compiler", lambda: ["true"])
    monkeypatch.setattr(build, "_run", lambda command: (0, b""))
    CostStore().put({"some": "key"}, Costs(1, 1.0, {}))
    (tmp_path / "native").mkdir()

    def touched(compiler: Any, flags: Any, target: Path) -> None:
        target.touch()
        build.seal_of(target).touch()

    monkeypatch.setattr(build, "_compile", touched)
    build.compiled(tmp_path / "native")
    assert sorted(one.what for one in kept_files(tmp_path)) == ["compiled pass", "compiled pass", "cost table"]
