"""`specdec accept` and `specdec bench` take any pair that runs here, and say in one line what is wrong with another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from specdec.cli import app


@pytest.mark.parametrize("command", ["accept", "bench"])
@pytest.mark.parametrize(
    ("pair", "code", "said"),
    [
        ("no-such-pair", 2, "specdec pairs list"),
        ("llama-3.1-8b-ngram", 1, "hf download meta-llama/Llama-3.1-8B-Instruct"),
        ("llama-3.1-8b-eagle3", 2, "does not run eagle3 heads"),
        ("qwen3-8b-0.6b", 1, "hf download Qwen/Qwen3-8B"),  # known, but not on this machine, which is offline
    ],
)
def test_pairs_that_cannot_be_measured(command: str, pair: str, code: int, said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, "--pair", pair, "--out", str(tmp_path / "new")], env={"COLUMNS": "500"})
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "Traceback" not in done.output


QUICK = ("--threads", "1", "--quick", "--json")


def bench(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["bench", *map(str, arguments), *QUICK], env={"COLUMNS": "500"})
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def test_bench_measures_n_grams_on_any_target_and_prompt(tiny_pair: Path, tmp_path: Path) -> None:
    lines = tmp_path / "own.jsonl"
    lines.write_text("".join(json.dumps({"prompt": f"{i} abc abc abc"[: 8 + i]}) + "\n" for i in range(3)))
    found = bench(
        "--target", tiny_pair / "target", "--prompt-file", lines, "--new-tokens", 6, "--out", tmp_path / "out"
    )
    speeds = {one["peer"]: one["speedup"] for one in found["summary"]}
    assert {"hf-plain", "specdec-none", "specdec-ngram-k5-b1"} <= {peer for peer, speed in speeds.items() if speed}
    assert not {peer for peer in speeds if "model" in peer or "assisted" in peer}
    options = found["provenance"][0]["options"]
    assert (options["target"], options["prompt_files"], options["new_tokens"]) == ("target", ["own.jsonl"], 6)
    assert str(tmp_path) not in json.dumps({**options, "out": ""})
    assert {run["prompt"] for run in map(json.loads, next((tmp_path / "out").glob("*.jsonl")).read_text().splitlines())
            if run["kind"] == "run"} == {0, 1}  # a quick run takes two of the three  # fmt: skip


def test_bench_compares_kinds_of_prompts_with_the_models_chat_template(tiny_pair: Path, tmp_path: Path) -> None:
    target = shutil.copytree(tiny_pair / "target", tmp_path / "target")
    template = "{% for message in messages %}<{{ message['content'][:9] }}>{% endfor %}"
    (target / "chat_template.jinja").write_text(template)
    found = bench(
        "--target", target, "--prompts", "instructions", "--num-prompts", 2, "-n", 4, "--peers", "specdec-none",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert [(one["domain"], one["peer"]) for one in found["domain"]] == [
        ("summary", "hf-plain"), ("summary", "specdec-none"), ("code", "hf-plain"), ("code", "specdec-none"),
    ]  # fmt: skip
    assert found["provenance"][0]["options"]["prompts"] == ["instructions"]
    lines = map(json.loads, next((tmp_path / "out").glob("*.jsonl")).read_text().splitlines())
    asked = [one for one in lines if one["kind"] == "prompt"]
    assert [(one["prompt"], one["name"], one["domain"]) for one in asked] == [
        (0, "summary-1", "summary"), (1, "code-1", "code"),
    ]  # fmt: skip
    assert [len(one["ids"][0]) for one in asked] == [11, 11]  # a token a byte, through the template
    refused = CliRunner().invoke(app, ["bench", "--prompts", "shipped", "--batch", "2"], env={"COLUMNS": "500"})
    assert "expected batch 1 with --prompts" in refused.stderr


def test_a_way_that_needs_a_draft_model_says_so_when_asked_for(tiny_pair: Path, tmp_path: Path) -> None:
    found = bench("--target", tiny_pair / "target", "--peers", "specdec-model", "--out", tmp_path)
    (way,) = [one for one in found["summary"] if one["peer"] == "specdec-model-k4"]
    assert way["skipped"] == "the pair has no draft model; give --draft"


def accept(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["accept", *map(str, arguments), "--threads", "1"], env={"COLUMNS": "500"})


def test_accept_measures_n_grams_on_own_prompts(tiny_pair: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("abc abc abc abc")
    asked = ("--target", tiny_pair / "target", "--prompt-file", tmp_path / "own.txt", "-t", "0", "-n", "4",
             "--no-report", "--out", tmp_path / "run")  # fmt: skip
    done = accept(*asked)
    assert done.exit_code == 0, done.output
    assert "5 units measured now" in done.output  # plain, and four settings of n-grams; a log needs a model's law
    assert "0 units measured now" in accept(*asked).output  # resumed
    options = json.loads((tmp_path / "run" / "run.json").read_text())["options"]
    assert (options["target"], options["prompts"]) == ("target", ["file:own.txt"])
    assert str(tmp_path) not in json.dumps(options)
    refused = accept(*asked, "-s", "model:k=2", "-s", "ngram:k=2")
    assert (refused.exit_code, "settings model:k=2: need a draft model" in refused.stderr) == (2, True)


def test_two_files_of_one_name_are_refused(tiny_pair: Path, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("abc")
    done = accept("--pair", tiny_pair, "--prompt-file", tmp_path / "a/x.txt", "--prompt-file", tmp_path / "b/x.txt")
    assert (done.exit_code, "files of different names" in done.stderr) == (2, True)


def test_accept_says_at_once_what_its_report_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("specdec.experiments.display.find_spec", lambda name: None if name == "matplotlib" else name)
    done = accept("--out", tmp_path / "new")
    assert done.exit_code == 2
    assert "the report needs matplotlib: pip install 'specdec-lm[viz]'; or leave it out with --no-report" in done.stderr
    assert not (tmp_path / "new").exists()  # before anything was measured


@pytest.mark.parametrize("command", ["bench", "accept"])
def test_old_names_of_options_are_understood_and_not_shown(command: str) -> None:
    wrong = CliRunner().invoke(app, [command, "--new-tokens", "1"], env={"COLUMNS": "500"})
    assert "new_tokens >= 2, got 1" in wrong.stderr
    assert "--new-tokens" not in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "500"}).stdout
