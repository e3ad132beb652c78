"""Cost tables on disk: one that cannot have been measured is measured again, one that cannot be written is a note."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_law import noisy_copy, tiny_llama

from specdec import Speculator
from specdec.planner import factory
from specdec.planner.costs import Costs
from specdec.planner.store import CostStore
from specdec.verify import folders
from specdec.verify.folders import VARIABLE, write_whole

TARGET: Any = tiny_llama(0)
DRAFT = noisy_copy(TARGET, 1)
PROMPT = torch.tensor([[3, 5, 2, 6, 3, 5]])
MEASURED = Costs(1, 1.0, {"model": {1: 1.1, 4: 1.3, 12: 3.0}, "ngram": {1: 1.1, 4: 1.3, 10: 3.0}}, 0.001, 0.05)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder; what is measured is MEASURED."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(factory, "measure", lambda *_, **__: MEASURED)
    monkeypatch.setattr(CostStore, "refine", lambda *_: None)  # what calls learn is another test's
    return tmp_path / "cache"


def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of a call in a process that has not seen a table yet; its text is the target's."""
    monkeypatch.setattr(factory, "STORE", CostStore())
    spec = Speculator(TARGET, [DRAFT, "ngram"])
    given: dict[str, Any] = dict(
        attention_mask=torch.ones_like(PROMPT), eos_token_id=None, pad_token_id=0, max_new_tokens=8, do_sample=False
    )
    out: Any = spec.generate(PROMPT, **given)
    assert torch.equal(out, TARGET.generate(PROMPT, **given))
    assert spec.report is not None
    return [note for note in spec.report.notes if "cost table" in note]


def step(value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda costs: costs["steps"]["model"].update({"4": value})


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "a negative step": step(-1.0),
    "no number": step(math.nan),
    "nothing": step(0.0),
    "for ever": step(math.inf),
    "a fifth": step(0.19),
    "a million times": step(1e6),
    "a word": step("fast"),
    "a list": step([1]),
    "null": step(None),
    "a huge integer": step(10**400),
    "a depth there is not": lambda costs: costs["steps"]["model"].update({"13": 3.0}),
    "depth 0": lambda costs: costs["steps"]["model"].update({"0": 3.0}),
    "a depth that is no number": lambda costs: costs["steps"]["model"].update({"deep": 3.0}),
    "no plain step": lambda costs: costs.update(plain=0.0),
    "a plain hour": lambda costs: costs.update(plain=1e7),
    "a negative plain step": lambda costs: costs.update(plain=-1.0),
    "another number of rows": lambda costs: costs.update(rows=2),
    "infinite rows": lambda costs: costs.update(rows=math.inf),
    "rows that are none": lambda costs: costs.update(rows="two"),
    "an option missing": lambda costs: costs["steps"].pop("ngram"),
    "an option of another name": lambda costs: costs["steps"].update(other=costs["steps"].pop("ngram")),
    "an empty option": lambda costs: costs["steps"].update(ngram={}),
    "a draft token of a day": lambda costs: costs.update(draft_token=1e8),
    "a prompt token below nothing": lambda costs: costs.update(prompt_token=-1.0),
    "more acceptances than decisions": lambda costs: costs.update(beliefs={"model": {"1": [[1.0], [2.0]]}}),
    "beliefs that would never change": lambda costs: costs.update(beliefs={"model": {"1": [[1e12], [1.0]]}}),
    "a share above one": lambda costs: costs.update(found={"ngram": 1.5}),
    "no steps": lambda costs: costs.pop("steps"),
}
GARBAGE = {
    "empty": b"",
    "no text": b"\xff\xfe\x00",
    "half": b'{"schema": 3, "key"',
    "a list": b"[1, 2]",
    "a word": b'"table"',
    "deep": b"[" * 100_000,
    "digits": b"9" * 10_000,
}


def the_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def test_a_table_that_cannot_have_been_measured_is_measured_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert notes(monkeypatch) == []
    good = the_file(folder).read_text()
    assert notes(monkeypatch) == []  # control: it is found and believed
    for name, change in WRONG.items():
        table = copy.deepcopy(json.loads(good))
        change(table["costs"])
        the_file(folder).write_text(json.dumps(table))
        [note] = notes(monkeypatch)
        assert "measured again" in note, name
        assert len(note) < 300
        assert the_file(folder).read_text() == good, name


def test_what_is_no_table_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes(monkeypatch)
    good = the_file(folder).read_text()
    for name, content in GARBAGE.items():
        the_file(folder).write_bytes(content)
        [note] = notes(monkeypatch)
        assert "measured again" in note, name
        assert the_file(folder).read_text() == good, name


@pytest.mark.parametrize("place", ["a folder in the table's place", "a file in the cache's place", "no such disk"])
def test_a_place_that_cannot_be_written_costs_a_note(place: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "a file in the cache's place":
        folder.write_text("mine")
    elif place == "no such disk":
        monkeypatch.setenv(VARIABLE, "/proc/nowhere")
    else:
        notes(monkeypatch)
        file = the_file(folder)
        file.unlink()
        file.mkdir()
    found = notes(monkeypatch)
    assert found
    assert any("not written" in note for note in found)
    assert not folder.is_dir() or [path.is_dir() for path in folder.iterdir()] == [True]
    assert not folder.is_file() or folder.read_text() == "mine"


def test_a_full_disk_costs_a_note_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folders.os, "fsync", full)
    [note] = notes(monkeypatch)
    assert "No space left" in note
    assert list(folder.iterdir()) == []


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays until all of the new one is on disk."""
    path = tmp_path / "table"
    path.write_text("old")
    order: list[str] = []
    sync, replace = os.fsync, os.replace

    def watched_sync(handle: int) -> None:
        order.append(f"flushed {path.read_text()}")
        sync(handle)

    def watched_replace(*names: Any) -> None:
        order.append("renamed")
        replace(*names)

    monkeypatch.setattr(folders.os, "fsync", watched_sync)
    monkeypatch.setattr(folders.os, "replace", watched_replace)
    write_whole(path, "new")
    assert order == ["flushed old", "renamed"]
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["table"]
