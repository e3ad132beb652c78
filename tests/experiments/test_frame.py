"""The frame of every experiment: options that are the command line, exit codes, result files, turns and processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from specdec.experiments import clock
from specdec.experiments.frame import Command, ResultFile, RunOptions, argument, option, spread, started
from specdec.experiments.intervals import Spread, bootstrap_median
from specdec.experiments.processes import yielded
from specdec.shown_errors import ExperimentError


@dataclass(frozen=True, kw_only=True)
class SieveOptions(RunOptions):
    """Of an experiment that there is not."""

    what: Annotated[str, argument("What is sieved.")]
    sizes: Annotated[tuple[int, ...], option("How much of it.", "--size", "-s")] = (3, 4)
    slow: Annotated[bool, option("Take your time.", "--slow")] = False
    least: Annotated[float | None, option("No less.")] = None
    inner: int = 7

    def __post_init__(self) -> None:
        self.one_of(("sand", "flour"), "what")
        self.at_least(1, "threads")


@dataclass(frozen=True, kw_only=True)
class OtherOptions(RunOptions):
    """Of a part with a word of its own."""

    sizes: Annotated[tuple[int, ...], option("How much.")] = ()


seen: list[RunOptions] = []


def sieve(options: SieveOptions) -> int | None:
    """Sieve something."""
    seen.append(options)
    if options.slow:
        raise ExperimentError("the sieve is too slow")
    return 3 if options.least is not None else None


def other(options: OtherOptions) -> None:
    """Do something else."""
    seen.append(options)
    if options.sizes == (0,):
        raise ZeroDivisionError


@pytest.fixture(autouse=True)
def _forget() -> None:
    seen.clear()


def test_options_are_the_command_line(tmp_path: Path) -> None:
    main = Command(SieveOptions, sieve)
    assert main(["sand"]) == 0
    assert main(["flour", "-s", "1", "2", "--least", "-0.5", "--size", "9", "--out", str(tmp_path)]) == 3
    assert seen == [
        SieveOptions(what="sand"), SieveOptions(what="flour", sizes=(1, 2, 9), least=-0.5, out=tmp_path),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["stones"], "expected some of sand, flour, got stones"),
        (["sand", "--threads", "0"], "expected threads >= 1, got 0"),
        (["sand", "--inner", "8"], "--inner"),  # not described: not on the command line
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_explained_and_nothing_runs(
    wrong: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        Command(SieveOptions, sieve)(wrong)
    assert said in capsys.readouterr().err
    assert not seen


def test_errors_for_the_user_are_one_line_and_bugs_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert Command(SieveOptions, sieve)(["sand", "--slow"]) == 1
    assert capsys.readouterr().err == "error: the sieve is too slow\n"
    with pytest.raises(ZeroDivisionError):
        Command(OtherOptions, other)(["--sizes", "0"])


def test_a_part_has_options_of_its_own() -> None:
    main = Command(OtherOptions, other, sieve=Command(SieveOptions, sieve))
    assert main(["--sizes", "1", "2"]) == 0
    assert main(["sieve", "sand", "-s", "5", "6"]) == 0
    assert seen == [OtherOptions(sizes=(1, 2)), SieveOptions(what="sand", sizes=(5, 6))]


def test_values_follow_each_other_where_an_option_takes_several() -> None:
    given = ["a", "--many", "1", "-2", "x y", "--one", "3", "4", "--many", "5"]
    wanted = ["a", "--many", "1", "--many", "-2", "--many", "x y", "--one", "3", "4", "--many", "5"]
    assert spread(given, ["--many"]) == wanted
    assert spread(wanted, ["--many"]) == wanted


def test_a_result_file_has_its_source_and_is_whole_after_every_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = started(SieveOptions(what="sand", out=tmp_path), seed=5, options={"a": 1})
    result = ResultFile(tmp_path / "new", "sieve", source, found=[])
    for number in range(2):
        result.content["found"].append(number)
        result.write()
        written = json.loads(result.path.read_text())
        assert written["found"] == list(range(number + 1))
    assert (written["provenance"]["seed"], written["provenance"]["options"]) == (5, {"a": 1})
    result.finish()
    assert capsys.readouterr().out == f"written: {result.path.name}\n"


def test_everybody_comes_first_once() -> None:
    orders = [clock.rotated("abc", turn) for turn in range(4)]
    assert ["".join(order) for order in orders] == ["abc", "bca", "cab", "abc"]


def test_the_first_call_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([9.0, 1.0, 3.0, 2.0])
    monkeypatch.setattr(clock, "timed", lambda call, device: (call(), clock.Spent(next(spent), 0.0)))
    calls: list[int] = []
    assert clock.median_ms(lambda: calls.append(1), "cpu", repeats=3) == 2000.0
    assert len(calls) == 4


def test_quartiles_and_the_interval_of_a_median() -> None:
    assert Spread.of([4.0]) == (4.0, 4.0, 4.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert Spread(1.0, 0.5, 2.0).text("{:.1f}") == "1.0 [0.5-2.0]"
    rng = np.random.default_rng(0)
    intervals = [bootstrap_median(rng.normal(size=25).tolist(), draws=200) for _ in range(200)]
    held = sum(one.low <= 0.0 <= one.high for one in intervals) / len(intervals)
    assert 0.82 < held < 0.97  # of 0.9; the control: intervals of half the level
    narrow = [bootstrap_median(rng.normal(size=25).tolist(), level=0.45, draws=200) for _ in range(200)]
    assert sum(one.low <= 0.0 <= one.high for one in narrow) / len(narrow) < 0.7


def test_another_process_gives_what_it_yields_and_its_errors() -> None:
    assert list(yielded(range, 3)) == [0, 1, 2]
    found = yielded(map, int, ["1", "x"])
    assert next(found) == 1
    with pytest.raises(ValueError, match="invalid literal"):
        next(found)
