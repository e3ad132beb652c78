"""`python -m specdec.experiments.gpu`: everything it does on a GPU runs here with tiny shapes, and says so."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec
from specdec.experiments.clock import Deadline
from specdec.experiments.display import table
from specdec.experiments.gpu import __main__ as command
from specdec.experiments.gpu.attention import equal_plan, ragged
from specdec.experiments.gpu.models import Oracle, counting_llama, successor
from specdec.experiments.gpu.options import SECTIONS, GpuOptions, Shape
from specdec.experiments.gpu.sections import RUNS, run
from specdec.experiments.gpu.show import page, roofline_ms

TINY = Shape(2, 64, 96, 4, 2, 512)


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """One dry run of everything but the tests, which would collect this suite within itself."""
    out = tmp_path_factory.mktemp("gpu")
    assert run(GpuOptions.dry_run(out), [name for name in SECTIONS if name != "tests"]) == 0
    return json.loads((out / "gpu.json").read_text()), (out / "gpu.md").read_text(), out


def test_every_section_measures_something(dry: tuple[dict[str, Any], str, Path]) -> None:
    results = dry[0]["results"]
    assert results["bandwidth"][0]["copy_gb_s"] > 0
    assert {entry["mode"] for entry in results["passes"]} == {"masked", "planned", "graph"}
    assert all(entry["ms"] > 0 for entry in results["passes"])
    split = [entry for entry in results["attention"] if entry["backend"] == "split"]
    assert split
    assert all(entry["error"] < 1e-5 and entry["ms_wall"] > 0 for entry in split)


def test_every_peer_writes_the_right_text(dry: tuple[dict[str, Any], str, Path]) -> None:
    entries = dry[0]["results"]["generate"]
    assert {entry["peer"] for entry in entries} == {
        "hf-plain", "hf-assisted", "hf-static", "specdec-plain", "specdec-oracle", "specdec-model",
    }  # fmt: skip
    assert all(entry["right"] is True for entry in entries)
    assert all(entry["tokens_per_second"] > 0 for entry in entries)


def test_a_dry_run_says_that_its_figures_mean_nothing(dry: tuple[dict[str, Any], str, Path]) -> None:
    whole, text, out = dry
    assert whole["dry_run"] is True
    assert whole["provenance"]["device"] == "cpu"
    assert text.startswith("# DRY RUN, figures mean nothing")
    pytest.importorskip("matplotlib")
    assert {path.name for path in out.glob("*.png")} == {"gpu-passes.png", "gpu-attention.png", "gpu-generate.png"}


def test_a_section_that_fails_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(options: GpuOptions, deadline: Deadline) -> list[dict[str, Any]]:
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(RUNS, "attention", broken)
    assert run(GpuOptions.dry_run(tmp_path), ["attention", "bandwidth"]) == 1
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert results["attention"] == [{"failed": "RuntimeError: no such kernel"}]
    assert results["bandwidth"][0]["tflops"] > 0
    assert "all: RuntimeError: no such kernel" in (tmp_path / "gpu.md").read_text()


def test_no_measurement_is_begun_without_time(tmp_path: Path) -> None:
    options = dataclasses.replace(GpuOptions.dry_run(tmp_path), budget_seconds=0.0)
    assert run(options, ["attention", "passes", "generate"]) == 0
    results = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert results["attention"] == results["passes"] == []
    assert all(entry["skipped"] == "no time left" for entry in results["generate"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_dry_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["all", "--out", str(tmp_path)])
    assert "use --dry-run" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_collects_the_gpu_tests(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "specdec.experiments.gpu", "tests", "--dry-run", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads((tmp_path / "gpu.json").read_text())["results"]["tests"]
    assert entry["tests_collected"] > 50


class TestTheModels:
    def test_the_greedy_text_counts(self) -> None:
        model = counting_llama(TINY, "cpu", torch.float32, 0)
        ids = torch.tensor([[5, 9, 400]])
        with torch.no_grad():
            found = model(input_ids=ids).logits.argmax(-1)
        assert torch.equal(found, successor(ids, 512))

    def test_a_draft_errs_as_often_as_told(self) -> None:
        model = counting_llama(TINY, "cpu", torch.float32, 1, alpha=0.7)
        ids = torch.arange(512)[None]
        with torch.no_grad():
            right = (model(input_ids=ids).logits.argmax(-1) == successor(ids, 512)).float().mean()
        assert 0.62 < float(right) < 0.78

    @pytest.mark.parametrize("alpha", [0.0, 0.8, 1.0])
    def test_the_oracle_is_right_as_often_as_told(self, alpha: float) -> None:
        model = counting_llama(TINY, "cpu", torch.float32, 0)
        spec = specdec.Speculator(model, Oracle(512, 4, alpha))
        ids = torch.tensor([[5, 9, 400], [1, 2, 3]])
        out = spec.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
        assert isinstance(out, torch.Tensor)
        assert torch.equal(out[:, 3:], successor(out[:, 2:-1], 512))
        assert spec.report is not None
        assert spec.report.per_position_acceptance[0] == pytest.approx(alpha, abs=0.12)


def test_plans_of_timed_attention() -> None:
    plan = ragged(equal_plan(100, 3, 5, "cpu"))
    assert plan.lengths.tolist() == [50, 75, 100]
    assert not plan.equal
    assert plan.ancestors[0].tolist() == equal_plan(7, 1, 5, "cpu").ancestors[0].tolist()
    assert plan.depths[0].tolist() == [0, 1, 1, 2, 2]


def test_the_roofline_is_the_longer_of_reading_and_computing() -> None:
    results: dict[str, list[dict[str, Any]]] = {"bandwidth": [{"copy_gb_s": 4000.0, "tflops": 800.0}]}
    assert roofline_ms({"bytes": 16e9, "flops": 16e9}, results) == pytest.approx(4.0)
    assert roofline_ms({"bytes": 1e6, "flops": 8e12}, results) == pytest.approx(10.0)
    assert roofline_ms({"bytes": 1e6, "flops": 8e12}, {}) is None


def test_tables() -> None:
    assert table(["a", "b"], [[1.23456, None], [True, 12345.6]]) == [
        "| a    | b     |", "|------|-------|", "| 1.23 | -     |", "| yes  | 12346 |",
    ]  # fmt: skip
    assert page({}, "nothing") == "# nothing\n"
