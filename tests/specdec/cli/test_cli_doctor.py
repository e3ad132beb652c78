"""`specdec doctor`: it must find what is broken, not only confirm what works."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import specdec
from specdec.cli import app
from specdec.cli.doctor import check_dependencies, compare


def doctor(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["doctor", "--device", "cpu", *map(str, arguments)])


def test_a_working_installation(tiny_pair: Path) -> None:
    result = doctor("--pair", tiny_pair)
    assert result.exit_code == 0, result.output
    assert "everything works" in result.stdout
    found = json.loads(doctor("--pair", tiny_pair, "--json").stdout)
    assert found["ok"] is True
    details = {check["name"]: check for check in found["checks"]}
    assert details["torch"]["detail"] == metadata.version("torch")
    assert details["attention"]["detail"].startswith("specdec for ")
    assert (details["pair"]["status"], details["generate"]["status"]) == ("ok", "ok")


def test_a_missing_pair_is_broken(tmp_path: Path) -> None:
    result = doctor("--pair", tmp_path, "--json")
    assert result.exit_code == 1
    failed = [check for check in json.loads(result.stdout)["checks"] if check["status"] == "failed"]
    assert [check["name"] for check in failed] == ["pair"]
    assert "target/ and draft/" in failed[0]["detail"]


def test_weights_that_do_not_load_are_broken(tmp_path: Path) -> None:
    for role in ("target", "draft"):
        (tmp_path / role).mkdir()
    result = doctor("--pair", tmp_path)
    assert result.exit_code == 1
    assert "could not load a causal language model" in result.stdout


def test_another_text_than_plain_generates_is_broken(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = specdec.Speculator.generate

    def off_by_one(self: specdec.Speculator, *arguments: Any, **fields: Any) -> Any:
        out: Any = generate(self, *arguments, **fields)
        out[0, -1] += 1
        return out

    monkeypatch.setattr(specdec.Speculator, "generate", off_by_one)
    result = doctor("--pair", tiny_pair)
    assert result.exit_code == 1
    assert "leaves plain generate's at token" in result.stdout


def test_a_drafter_that_fails_is_broken(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no drafts today")

    monkeypatch.setattr("specdec.drafters.ModelDrafter.propose", broken)
    with pytest.warns(UserWarning, match="no drafts today"):
        result = doctor("--pair", tiny_pair)
    assert result.exit_code == 1
    assert "no drafts today" in result.stdout


def test_dependencies_out_of_range() -> None:
    installed = {"torch": "2.13.0+cpu", "transformers": "6.0.0"}

    def version_of(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    required = ["torch>=2.11", "transformers>=5.17,<6", "numpy>=1.26", 'pytest>=8; extra == "dev"']
    found = {check.name: (check.status, check.detail) for check in check_dependencies(version_of, required)}
    assert found["torch"] == ("ok", "2.13.0+cpu")
    assert found["transformers"][0] == "failed"
    assert "6.0.0, expected transformers<6" in found["transformers"][1]
    assert found["numpy"] == ("failed", "not installed, expected numpy>=1.26")
    assert "pytest" not in found


@pytest.mark.parametrize(("ours", "where"), [([1, 2, 9, 4], "token 2"), ([1, 2, 3], "token 3")])
def test_the_first_difference_is_named(ours: list[int], where: str) -> None:
    check = compare([1, 2, 3, 4], ours, "")
    assert check.status == "failed"
    assert where in check.detail
