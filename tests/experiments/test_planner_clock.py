"""How planned calls are timed: every way on every prompt, in turns, and the median of several calls counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.experiments.planner import calls as clock
from specdec.experiments.planner.__main__ import main
from specdec.experiments.planner.findings import close, never_slower, right_forecasts, sweep
from specdec.experiments.ways import Output


def test_every_way_meets_every_prompt_as_often() -> None:
    met: list[tuple[str, int, int]] = []

    def way(name: str) -> Any:
        def generate(ids: torch.Tensor, number: int, on_step: object) -> Output:
            met.append((name, int(ids), number))
            return Output(ids)

        return generate

    prompts = [torch.tensor(10), torch.tensor(11)]
    sizes = [len(calls) for calls in clock.time_calls({"a": way("a"), "b": way("b")}, prompts, "", repeats=3)]
    assert sizes == [6, 6]
    assert sorted(met[:2]) == [("a", 10, 0), ("b", 10, 0)]  # for what is done once per process
    for number in (1, 2):
        assert sorted(one for one in met[2:] if one[2] == number) == [
            (name, 9 + number, number) for name in ("a", "b") for _ in range(3)
        ]


def test_the_median_call_counts_and_ratios_pair_the_prompts() -> None:
    spent = {("a", 1): [9.0, 1.0, 0.5], ("a", 2): [4.0], ("b", 1): [2.0], ("b", 2): [6.0, 5.0, 1.0]}
    calls = [clock.Call(way, prompt, s, s, 1.0, None) for (way, prompt), times in spent.items() for s in times]
    assert clock.seconds(calls, "a") == [1.0, 4.0]
    found = clock.ratio(calls, "a", "b")
    assert found["median"] == pytest.approx((2 / 1 + 5 / 4) / 2, abs=1e-3)
    assert found["total"] == pytest.approx(7 / 5)


def test_processes_are_paired_each_with_itself() -> None:
    """One process is twice as slow as the other, for every way: no ratio shows it."""
    took = {"a": 2.0, "b": 3.0}
    calls = [
        clock.Call(way, 1, factor * s, factor * s, 1.0, None, ((factor * s, False),) * 5, process)
        for process, factor in enumerate((1, 2)) for way, s in took.items()
    ]  # fmt: skip
    assert clock.seconds(calls, "a") == [2.0, 4.0]
    assert clock.ratio(calls, "a", "b") == {"median": 1.5, "low": 1.5, "high": 1.5, "total": 1.5}
    assert clock.ratio_by_steps(calls, "a", "b") == 1.5


def test_the_best_of_other_prompts_is_not_the_luckiest_here() -> None:
    """Two equal settings, each lucky on one prompt: the best in hindsight is faster than any that could be chosen."""
    spent = {"own": (1.0, 1.0, 1.0), "x": (0.5, 1.0, 1.0), "y": (1.0, 0.5, 1.1), "worse": (2.0, 2.0, 2.0)}
    calls = [clock.Call(way, i, s, s, 1.0, None) for way, times in spent.items() for i, s in enumerate(times)]
    assert clock.ratio(calls, "own", "x")["total"] == pytest.approx(2.5 / 3, abs=1e-3)
    # prompt 0: y is best elsewhere (1.6 against 2), prompt 1: x (1.5), prompt 2: x and y (1.5 each): the first named
    assert clock.ratio_to_others_best(calls, "own", ["x", "y", "worse"]) == pytest.approx((1 + 1 + 1) / 3, abs=1e-3)
    assert clock.ratio_to_others_best(calls[:1], "own", ["own"]) is None


def test_the_time_that_counts_is_the_one_of_the_process_that_measured() -> None:
    """Whoever computes the findings may have other threads."""
    alone, shared = (clock.Call("a", 1, cpu=2.0, wall=5.0, tokens_per_step=1.0, plan=None, threads=n) for n in (1, 2))
    assert (clock.seconds([alone], "a"), clock.seconds([shared], "a")) == ([2.0], [5.0])


def test_ratios_by_steps_ignore_bad_moments() -> None:
    """Ten tokens each: one way in ten steps of 2 ms, the other with a draft that takes 3 ms and saves a step."""
    plain, bad = (2.0, False), (90.0, False)
    none = clock.Call("none", 1, 0, 0, 1.0, None, (plain,) * 9 + (bad,))
    planned = clock.Call("planned", 1, 0, 0, 1.0, None, (plain, bad) + (plain,) * 6 + ((3.0, True),))
    assert clock.ratio_by_steps([none, planned, none], "planned", "none") == pytest.approx(20 / (8 * 2 + 3), abs=1e-4)


def test_a_forecast_is_right_within_15_percent_either_way() -> None:
    assert close(1.15)
    assert close(1 / 1.15)
    assert not close(1.16)
    assert not close(1 / 1.16)


def _call(way: str, prompt: int, s: float, foretold: float = 100.0, realised: float = 100.0) -> clock.Call:
    plan = {"predicted_tokens_per_second": foretold, "realised_tokens_per_second": realised}
    return clock.Call(way, prompt, s, s, 2.0, plan, ((1e3 * s, way != "none"),) * 3)


def test_a_sweep_names_the_best_setting_a_planned_drafter_could_have_taken() -> None:
    spent = {
        "none": 4.0,
        "model k=2": 2.0,
        "model k=8": 3.0,
        "ngram k=2": 1.0,
        "planned model": 2.5,
        "planned ngram": 1.0,
    }
    found = sweep([_call(way, prompt, s) for way, s in spent.items() for prompt in (1, 2)])
    assert found["planned model"]["best_fixed"] == "model k=2"
    assert found["planned model"]["against_best_fixed"]["total"] == found["planned model"][
        "against_best_fixed_on_other_prompts"] == 0.8  # fmt: skip
    assert found["planned ngram"]["best_fixed"] == "ngram k=2"
    assert found["speed_up_over_none"]["model k=8"]["total"] == pytest.approx(4 / 3, abs=1e-3)


def test_what_never_slower_finds() -> None:
    calls = [
        _call("none", 1, 2.0), _call("planned", 1, 2.5, foretold=130.0), _call("none again", 1, 2.1),
        _call("hf plain", 1, 5.0),
    ]  # fmt: skip
    found = never_slower(calls)
    assert found["none_against_itself"]["total"] == pytest.approx(2 / 2.1, abs=1e-3)
    assert (found["against_none"]["total"], found["against_hf_plain"]["total"]) == (0.8, 2.0)
    assert found["against_none_by_steps"] == 0.8
    assert right_forecasts([found]) == (0, 1)
    assert "against_hf_plain" not in never_slower(calls[:3])


@pytest.mark.slow
def test_every_process_is_measured_and_a_failed_one_is_said(tmp_path: Path) -> None:
    """Fresh processes, the shipped pair: the file has the calls of both, with what they found."""
    asked = ["never-slower", "--no-hf", "--prompts", "1", "--processes", "2", "--batches", "1", "--temperatures", "0",
             "--prompt-tokens", "8", "--out", str(tmp_path)]  # fmt: skip
    main([*asked, "--workloads", "untrained drafter"])
    (path,) = tmp_path.glob("planner-never-slower-*.json")
    written = json.loads(path.read_text())
    run = written["runs"]["T=0.0 batch 1"]
    calls = run["calls"]["untrained drafter"]
    assert sorted((call["way"], call["process"]) for call in calls) == [
        (way, process) for way in ("none", "none again", "planned") for process in (0, 1)
    ]
    assert written["forecasts"]["of"] == 2
    with pytest.raises(RuntimeError, match="measuring process 1 of 2 ended with ValueError"):
        main([*asked, "--workloads", "untrained drafter", "--temperatures", "-1"])


def test_counts_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", "--processes", "0"])
    assert "expected processes >= 1, got 0" in capsys.readouterr().err
