"""`specdec accept`: nothing is lost when a run is killed, figures mean what they say, damaged files are named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import make_pair
from typer.testing import CliRunner

from specdec.cli import app
from specdec.experiments.accept import runner
from specdec.experiments.accept.metrics import Runs, spec_bench
from specdec.experiments.accept.options import KNOWN_RULES, AcceptOptions
from specdec.experiments.accept.report.page import write_report
from specdec.experiments.accept.runner import cells, run
from specdec.experiments.accept.scores import Logs
from specdec.experiments.accept.setting import COMPARED, Cell, Setting
from specdec.experiments.accept.store import ResultsError, Store
from specdec.shown_errors import ExperimentError
from specdec.verify.draft_kind import DraftKind
from specdec.verify.passes import linear
from specdec.verify.passes.linear import FormTable
from specdec.verify.rules import RULES, make_rule


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def options(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> AcceptOptions:
    """A run with two prompts of two turns each, four settings, greedy and sampled."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = [{"question_id": n, "category": f"domain {n % 2}", "turns": ["abc abc", "go on"]} for n in range(2)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    return AcceptOptions(
        pair=pair, settings=("model:k=3", "model:tree=2,1:children=sampled", "model:tree=2,1", "ngram:k=3"),
        max_rules=2, temperatures=(0.0, 1.0), prompts=(f"jsonl:{prompts}",), num_prompts=2, new_tokens=8, threads=1,
        device="cpu", report=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(options: AcceptOptions, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("run")
    assert run(replace(options, out=folder)) == 0
    return Store(folder)


def texts(store: Store) -> dict[tuple[str, str], list[list[int]]]:
    return {(e["cell"], e["prompt"]): [turn["token_ids"] for turn in e["turns"]] for e in store.entries("run")}


def test_every_cell_is_run_on_every_prompt(options: AcceptOptions, finished: Store) -> None:
    wanted, skipped = cells(options)
    assert len(wanted) == (1 + 4) + (1 + 2 * 4)
    assert not skipped
    assert set(texts(finished)) == {(str(cell), prompt) for cell in wanted for prompt in ("0", "1")}
    assert len(list(finished.entries("log"))) == 4
    assert len(list(finished.entries("provenance"))) == 1


def test_counts_of_a_run_agree_with_each_other(finished: Store) -> None:
    for entry in finished.entries("run"):
        assert len(entry["turns"]) == 2
        for turn in entry["turns"]:
            assert len(turn["token_ids"]) == len(turn["kinds"]) == 8
            assert sum(turn["accepted"]) == turn["kinds"].count("a") == sum(turn["kept_per_position"])
            assert sum(turn["accepted"]) + len(turn["accepted"]) == 8
            assert turn["faults"] == 0


def test_greedy_and_coupled_texts_do_not_depend_on_the_drafter(finished: Store) -> None:
    found = texts(finished)
    for prompt in ("0", "1"):
        assert len({str(t) for (cell, p), t in found.items() if p == prompt and "T=0" in cell}) == 1
    assert len({str(t) for (cell, _), t in found.items() if "T=1" in cell}) > 3


@pytest.mark.parametrize("stop_after", [1, 7])
def test_a_killed_run_is_resumed_without_loss(
    options: AcceptOptions, finished: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    class Killed(BaseException):
        pass

    real, calls = runner.run_unit, iter(range(1000))

    def dying(*arguments: Any) -> Any:
        if next(calls) >= stop_after:
            raise Killed
        return real(*arguments)

    here = replace(options, out=tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(runner, "run_unit", dying)
        with pytest.raises(Killed):
            run(here)
    path = tmp_path / "run" / "runs-0.jsonl"
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + b'{"kind": "run", "cell": "torn')  # the line it was writing
    run(here)
    store = Store(here.out)
    assert path.read_bytes().startswith(before)
    assert len(list(store.entries("provenance"))) == 2
    assert texts(store) == texts(finished)


def test_a_resumed_run_multiplies_as_the_killed_one_did(
    options: AcceptOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which form of a linear layer is fastest is measured; a second session may measure differently, by the last bits
    of its sums and now and then a token. The control: without the first session's lines, it does."""
    monkeypatch.setattr("specdec.verify.passes.native.native_pass", lambda *_: None)  # it has one form only
    table = FormTable()
    monkeypatch.setattr(linear, "FORMS", table)
    monkeypatch.setattr(runner, "FORMS", table)
    monkeypatch.setattr(linear, "_MIN_WEIGHTS", 1)
    here = replace(options, out=tmp_path, settings=("model:k=3",), temperatures=(1.0,))

    def session(form: Any) -> dict[str, str]:
        table.__init__()  # type: ignore[misc] # as in a new process
        monkeypatch.setattr(linear, "_measure", lambda *arguments: form)
        run(here)
        return table.names()

    path = tmp_path / "runs-0.jsonl"
    first = session(linear.rows_last)
    assert set(first.values()) == {"rows_last"}
    whole = path.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(whole) if '"kind": "forms"' in line)
    path.write_text("".join(whole[: last + 1]))
    resumed = session(torch.nn.functional.linear)
    assert {sizes: resumed[sizes] for sizes in first} == first
    assert Store(tmp_path).forms() == {**resumed, **first}
    path.write_text("".join(line for line in whole[: last + 1] if '"kind": "forms"' not in line))
    assert set(session(torch.nn.functional.linear).values()) == {"linear"}


def test_two_processes_share_the_work(options: AcceptOptions, finished: Store, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    here = replace(options, out=tmp_path)
    alone = runner.Share.of("cpu")
    for rank in (1, 0):  # one after the other: whoever is last finds everything there
        monkeypatch.setattr(
            runner.Share, "of", staticmethod(lambda device, rank=rank: replace(alone, rank=rank, count=2))
        )
        Store(tmp_path).open(here.recorded())
        run(here)
    monkeypatch.undo()
    counts = [len((tmp_path / f"runs-{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)]
    assert min(counts) > 1
    run(here)  # alone again: what is left of the work, divided as it was while the other's share was missing
    assert texts(Store(tmp_path)) == texts(finished)


@pytest.mark.slow
def test_launched_processes_share_the_work(options: AcceptOptions, tmp_path: Path) -> None:
    """Two real processes, started as `accelerate launch` starts them: both measure, one reports."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
        "specdec.experiments.accept", "--out", str(tmp_path), "--pair", str(options.pair), "-s", "model:k=2", "-t", "1",
        "--prompts", options.prompts[0], "--num-prompts", "2", "--new-tokens", "4", "--threads", "1", "--no-report",
        "--no-log", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [(tmp_path / f"runs-{rank}.jsonl").read_text().count('"kind": "run"') for rank in (0, 1)]
    assert lines == [4, 4]  # plain decoding and three rules on two prompts
    assert done.stdout.count("8 units measured now, 8 runs") == 1


def test_other_options_are_refused_in_a_used_folder(options: AcceptOptions, finished: Store) -> None:
    with pytest.raises(ResultsError, match="new_tokens: 8 -> 9"):
        run(replace(options, out=finished.folder, new_tokens=9))


def copy(store: Store, folder: Path, **changed: bytes) -> Store:
    folder.mkdir(exist_ok=True)
    for name in ("run.json", "runs-0.jsonl"):
        (folder / name).write_bytes(
            changed.get(name.partition(".")[0].replace("-", "_"), (store.folder / name).read_bytes())
        )
    return Store(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace(b"\n{", b"\n<", 1), r"runs-0\.jsonl line 2 is not JSON"),
        (lambda text: text.replace(b'"turns"', b'"turn"', 1), r"runs-0\.jsonl line \d+ lacks turns"),
        (lambda text: text.replace(b'"kind": "run"', b'"kind": "walk"', 1), r"line \d+ has kind 'walk'"),
        (lambda text: b"[]\n" + text, r"line 1 has kind None"),
    ],
)
def test_damaged_lines_are_named(finished: Store, tmp_path: Path, damage: Any, message: str) -> None:
    content = (finished.folder / "runs-0.jsonl").read_bytes()
    with pytest.raises(ResultsError, match=message):
        Runs.read(copy(finished, tmp_path, runs_0=damage(content)))


def test_damaged_run_and_log_files_are_named(finished: Store, tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"run\.json: does not read"):
        Runs.read(copy(finished, tmp_path / "a", run=b"{"))
    with pytest.raises(ResultsError, match="expected schema 1, got 7"):
        Runs.read(copy(finished, tmp_path / "b", run=b'{"schema": 7, "options": {}}'))
    store = copy(finished, tmp_path / "c")
    with pytest.raises(ResultsError, match=r"logs/\w+\.npz: missing"):
        Logs(store)
    (store.folder / "logs").mkdir()
    for entry in store.entries("log"):
        (store.folder / "logs" / entry["file"]).write_bytes(b"PK not an archive")
    with pytest.raises(ResultsError, match=r"logs/\w+\.npz: damaged"):
        Logs(store)


def test_figures_of_a_hand_made_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open({"pair": "x"})
    watch = {"nodes": [], "drafts": 0, "first": 0, "star": 1.0, "scanned": 2, "scanned_first": 1}
    turn = {"token_ids": [1] * 6, "kinds": "aarabr", "drafted": [2, 2, 0], "accepted": [2, 1, 0],
            "kept_per_position": [2, 1], "reached_per_position": [2, 2], "seconds": 2.0, "ms_prefill": 5.0,
            "ms_draft": 3.0, "ms_verify": 6.0, "ms_rest": 3.0, "faults": 0, "watch": watch}  # fmt: skip
    short = {**turn, "token_ids": [1, 1], "drafted": [2], "accepted": [1], "seconds": 1.0}
    cell, plain = Cell(Setting.parse("model:k=2"), "block", 1.0), Cell(Setting("none"), "auto", 1.0)
    for key, prompt, turns in ((cell, "a", [turn]), (cell, "b", [short]), (plain, "a", [{**turn, "seconds": 6.0}]),
                               (plain, "b", [{**short, "seconds": 4.0}])):  # fmt: skip
        store.append("run", {"cell": str(key), "prompt": prompt, "domain": prompt, "turns": turns})
    runs = Runs.read(store)
    stats = runs.stats(cell)
    assert stats is not None
    assert stats.tokens_per_step.value == pytest.approx(8 / 4)
    assert stats.mean_acceptance_length == pytest.approx(1 + 4 / 3)
    assert stats.acceptance_rate == pytest.approx(4 / 6)
    assert stats.per_position == pytest.approx([1.0, 0.5])
    assert (stats.alpha, stats.alpha_star, stats.alpha_there) == pytest.approx((1.0, 0.5, 0.5))
    assert stats.tokens_per_second == pytest.approx(8 / 3)
    assert stats.speedup is not None
    assert stats.speedup[0] == pytest.approx(3.5)  # the median of 3 and 4
    figures = spec_bench(runs, cell)
    assert figures.mean_accepted_tokens == pytest.approx((3 + 2 + 1 + 2) / 4)
    assert figures.speedup == pytest.approx((3 + 2) / (1 + 0.5))  # of mean speeds, not the mean of ratios
    assert spec_bench(runs, cell, "b").mean_accepted_tokens == pytest.approx(2)
    # Steps of "a" begin at 0, 3 and 5, that of "b" at 0.
    assert [(at, mean.value) for at, mean, _ in runs.by_output_position(cell, width=4)] == [(0, 7 / 3), (4, 1.0)]


def test_rules_of_settings_are_those_that_take_their_drafts() -> None:
    for kind, rules in COMPARED.items():
        assert len(set(rules)) == len(rules) >= 3
        assert all(make_rule(rule).refusal(DraftKind(*kind)) is None for rule in rules)  # type: ignore[arg-type]
    assert {name for name, rule in RULES.items() if rule.lossless} - {"greedy"} == set(KNOWN_RULES)


@pytest.mark.parametrize("text", ["none", "model:k=4", "model:tree=3,2,1:children=sampled", "ngram:k=6:branches=2",
                                  "best-first:depth=4:top_k=4:num_nodes=15"])  # fmt: skip
def test_settings_are_read_and_written(text: str) -> None:
    assert str(Setting.parse(text)) == text
    assert Cell.parse(str(Cell(Setting.parse(text), "naive", 0.6))) == Cell(Setting.parse(text), "naive", 0.6)


@pytest.mark.parametrize("text", ["", "eagle", "model:k=0", "model:k=2:tree=2,1", "model:width=2", "ngram:k=a",
                                  "model:tree=2,1:children=best", "model:children=top", "model:k=2:k=3"])  # fmt: skip
def test_bad_settings_are_refused(text: str) -> None:
    with pytest.raises(ExperimentError, match="setting"):
        Setting.parse(text)


def test_the_report_is_one_file_that_needs_no_other(finished: Store, tmp_path: Path) -> None:
    page, image = write_report(finished, tmp_path / "report.html")
    content = page.read_text()
    assert image.read_bytes().startswith(b"\x89PNG")
    assert not re.findall(r'(?:src|href)="(?!data:)', content)
    assert "<script" not in content
    for wanted in ("Acceptance by position", "What a step costs and gives", "Where in the tree", "By domain",
                   "Acceptance against the optimum", "Texts", '<span class="a">', '<span class="r">'):  # fmt: skip
        assert wanted in content, wanted
    assert content.count("data:image/png") >= 6


def test_the_command_line_says_what_is_wrong_in_one_line(finished: Store, tmp_path: Path) -> None:
    cli = CliRunner()
    done = cli.invoke(app, ["accept", "report", str(tmp_path)])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "expected the folder of a run" in done.stderr
    done = cli.invoke(app, ["accept", "--setting", "eagle"])
    assert done.exit_code == 2
    done = cli.invoke(app, ["accept", "score", str(finished.folder), "-s", "model:k=2", "-s", "best-first"])
    assert done.exit_code == 0, done.output
    assert "not scored: best-first" in done.stdout
    assert "block" in done.stdout
