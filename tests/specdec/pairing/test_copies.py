"""Copies of models in the cache folder, whoever else writes them: one of them is used, and nothing else stays there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from specdec.pairing.copies import kept_copy
from specdec.verify.folders import VARIABLE


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(VARIABLE, str(folder))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    return file


def the_copy(cache: Path) -> Path:
    [copy] = (cache / "models").iterdir()
    return copy


def written(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors").write_text(content)


def test_of_two_processes_at_once_the_first_to_finish_is_used(model: Path, cache: Path) -> None:
    def second(folder: Path) -> None:
        written("second")(folder)
        assert kept_copy(model, "form", written("first")) == cache / "models" / the_name(cache)

    copy = kept_copy(model, "form", second)
    assert copy == the_copy(cache)
    assert (copy / "model.safetensors").read_text() == "first"
    assert kept_copy(model, "another form", written("third")) != copy


def the_name(cache: Path) -> str:
    """Of the finished copy, beside those that are being written."""
    [name] = [entry.name for entry in (cache / "models").iterdir() if not entry.name.startswith("building-")]
    return name


def test_of_two_processes_that_find_a_damaged_copy_one_repairs_it(model: Path, cache: Path) -> None:
    copy = kept_copy(model, "form", written("old"))
    assert copy is not None
    (copy / "model.safetensors").write_text("damaged")

    def second(folder: Path) -> None:
        written("second")(folder)
        assert kept_copy(model, "form", written("first")) == copy

    assert kept_copy(model, "form", second) == the_copy(cache) == copy
    assert (copy / "model.safetensors").read_text() == "first"


def test_a_copy_that_could_not_be_written_leaves_nothing(model: Path, cache: Path) -> None:
    def interrupted(folder: Path) -> None:
        written("half")(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_copy(model, "form", interrupted)
    assert list((cache / "models").iterdir()) == []
