"""Where rows of pictures stand, and what is said to be missing."""

from __future__ import annotations

from specdec.experiments.display import grouped, lacking


def test_rows_of_one_name_stand_together() -> None:
    assert grouped(["a", "a", "b", "c", "c"]) == [0.0, 1.0, 2.5, 4.0, 5.0]
    assert grouped([]) == []


def test_only_packages_that_are_not_there_lack() -> None:
    assert lacking("json", "no_such_package_of_ours") == ["no_such_package_of_ours"]
