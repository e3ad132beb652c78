"""The library is called `specdec-lm` on a package index; `specdec` there is somebody else's."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import specdec
from specdec.namesake import DISTRIBUTION, namesake


def install(folder: Path, name: str, version: str, record: str) -> None:
    """As pip would leave a distribution in `folder`, its files left out."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{record},,\n{info.name}/METADATA,,\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that distributions are found in."""
    folder = str(tmp_path)

    def found(name: str) -> Any:
        return next(iter(metadata.distributions(name=name, path=[folder])), None) or missing(name)

    def missing(name: str) -> Any:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", found)
    return tmp_path


def test_alone_nothing_is_said(site: Path) -> None:
    install(site, "specdec_lm", "0.2.0", "specdec/__init__.py")
    assert namesake() == []
    with pytest.raises(AttributeError) as refused:
        specdec.Benchmark  # noqa: B018
    assert DISTRIBUTION not in str(refused.value)


def test_an_editable_install_under_the_old_name_is_no_namesake(site: Path) -> None:
    install(site, "specdec", "0.1.0", "__editable__.specdec-0.1.0.pth")
    assert namesake() == []


def test_another_specdec_beside_it_is_named_where_things_fail(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "specdec", "9.9", "specdec/benchmark.py")
    (line,) = namesake()
    assert "'specdec' (9.9)" in line
    assert "pip uninstall specdec &&" in line
    with pytest.raises(
        AttributeError, match=r"no attribute 'Benchmark'; another distribution called 'specdec' \(9.9\)"
    ):
        specdec.Benchmark  # noqa: B018

    def broken(name: str) -> Any:
        raise ImportError(f"cannot import {name}")

    monkeypatch.setattr(specdec, "import_module", broken)
    with pytest.raises(ImportError, match=r"cannot import specdec\.engine") as failed:
        specdec.Engine  # noqa: B018
    assert failed.value.__notes__ == [line]


def test_the_doctor_says_it(site: Path) -> None:
    from specdec.cli.doctor import run_checks

    install(site, "specdec", "9.9", "specdec/benchmark.py")
    checks = run_checks("no pair", "cpu", None)
    assert [next(checks).status, next(checks).status] == ["info", "failed"]
