"""llama.cpp's own programs: what they are asked, what is read from what they say, and what happens where they fail."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_llama import GgufLlama, merging_tokenizer, tiny_llama
from typer.testing import CliRunner

from specdec.experiments.bench.llamacpp_tools import (
    BENCH,
    SPECULATIVE,
    ToolError,
    ToolRun,
    main,
    parse_bench,
    parse_speculative,
    run_bench,
    summary_line,
)
from specdec.experiments.bench.options import BenchOptions

OPTIONS = BenchOptions(num_prompts=2, prompt_tokens=12, new_tokens=10, threads=1, rounds=2)
TEST = {"n_prompt": 12, "n_gen": 10, "n_threads": 1, "avg_ns": 2500000, "samples_ns": [2000000, 3000000]}
SAID = """encoded   12 tokens in    0.250 seconds, speed:   48.000 t/s
decoded   11 tokens in    0.750 seconds, speed:   14.667 t/s

n_draft   = 5
n_predict = 11
n_drafted = 20
n_accept  = 8
accept    = 40.000%
"""
COMMAND = ["--num-prompts", "2", "--prompt-tokens", "12", "--new-tokens", "10", "--threads", "1", "--rounds", "2"]


def install(folder: Path, tool: str, code: str) -> None:
    """A program on PATH that notes its arguments beside itself and then runs `code`."""
    program = folder / tool
    notes = f"import json, sys; open({str(program)!r} + '.calls', 'a').write(json.dumps(sys.argv[1:]) + '\\n')"
    program.write_text(f"#!{sys.executable}\n{notes}\n{code}\n")
    program.chmod(0o755)


def calls(folder: Path, tool: str) -> list[list[str]]:
    return [json.loads(line) for line in (folder / f"{tool}.calls").read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    for role, layers in (("target", 2), ("draft", 1)):
        tiny_llama(num_hidden_layers=layers).save_pretrained(folder / role)
        merging_tokenizer().save_pretrained(folder / role)
    return folder


def test_parsing() -> None:
    runs = parse_bench(json.dumps([TEST]), OPTIONS)
    assert [(run.tool, run.prompt, run.prompt_tokens, run.tokens) for run in runs] == [
        (BENCH, i, 12, 10) for i in (0, 1)
    ]
    assert [run.seconds for run in runs] == pytest.approx([0.002, 0.003])
    run = parse_speculative("some text\n0.00.123.456 I " + SAID)
    assert run == ToolRun(SPECULATIVE, 0, 12, 11, 1.0, 0.75, 20, 8)
    assert run.tokens_per_second == 11.0
    assert summary_line([run]) == (
        f"{SPECULATIVE}: 11.0 tokens/s, prompt included [11.0 to 11.0], 0.40 of the drafts accepted"
    )


@pytest.mark.parametrize("text", ["", "[]", "[{}]", "{", json.dumps([TEST, TEST])])
def test_json_that_is_not_understood_is_an_error(text: str) -> None:
    with pytest.raises(ToolError, match="expected a JSON list of one test"):
        parse_bench(text, OPTIONS)


def test_other_lengths_than_asked_are_an_error() -> None:
    with pytest.raises(ToolError, match=r"expected 12 \+ 10 tokens, got \(12, 9\)"):
        parse_bench(json.dumps([{**TEST, "n_gen": 9}]), OPTIONS)


@pytest.mark.parametrize("line", range(2))
def test_missing_times_are_an_error(line: int) -> None:
    lines = SAID.splitlines()
    del lines[line]
    with pytest.raises(ToolError, match="expected its times and counts"):
        parse_speculative("\n".join(lines))


def test_a_program_that_fails_says_so(path: Path, tmp_path: Path) -> None:
    install(path, BENCH, "sys.exit('unknown argument: -pg')")
    with pytest.raises(ToolError, match=r"exit code 1: \.\.\.'unknown argument: -pg'"):
        run_bench(tmp_path / "m.gguf", OPTIONS)
    (path / BENCH).unlink()
    with pytest.raises(ToolError, match="No such file"):
        run_bench(tmp_path / "m.gguf", OPTIONS)


def test_the_command_runs_both(path: Path, pair: Path, tmp_path: Path) -> None:
    copy = f"import shutil; [shutil.copy(a, {str(tmp_path)!r}) for a in sys.argv if a.endswith('.gguf')]"
    install(path, BENCH, f"{copy}\nprint({json.dumps([TEST])!r})")
    install(path, SPECULATIVE, f"{copy}\nprint({SAID!r}, file=sys.stderr)")
    out = tmp_path / "out"
    done = CliRunner().invoke(
        main.app, ["--pair", str(pair), "--out", str(out), "--k", "3", "--dtype", "f16", *COMMAND]
    )
    assert done.exit_code == 0, done.output
    assert f"{SPECULATIVE}: 11.0 tokens/s" in done.output
    layers = [GgufLlama(tmp_path / f"{role}-f16.gguf").fields["llama.block_count"] for role in ("target", "draft")]
    assert layers == [2, 1]
    (asked,) = calls(path, BENCH)
    wanted = {"-pg": "12,10", "-r": "2", "-t": "1", "-ctk": "f16", "-ctv": "f16"}
    assert {name: asked[asked.index(name) + 1] for name in wanted} == wanted
    spoken = calls(path, SPECULATIVE)
    prompts = [asked[asked.index("-p") + 1] for asked in spoken]
    assert prompts == [prompts[0]] * 2 + [prompts[2]] * 2
    assert prompts[0] != prompts[2]
    assert all(asked[asked.index("--spec-draft-n-max") + 1] == "3" for asked in spoken)
    (file,) = out.glob("llamacpp-*.jsonl")
    entries: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["kind"] for entry in entries] == ["provenance"] + ["run"] * 6
    assert [entry["prompt"] for entry in entries[1:]] == [0, 1, 0, 0, 1, 1]
    assert entries[0]["options"]["k"] == 3


@pytest.mark.usefixtures("path")
def test_without_the_programs_the_command_says_which_are_missing(pair: Path) -> None:
    done = CliRunner().invoke(main.app, ["--pair", str(pair)])
    assert done.exit_code == 1
    assert f"{BENCH}: n/a (not on PATH" in done.output
    assert f"{SPECULATIVE}: n/a (not on PATH" in done.output


@pytest.mark.skipif(
    not (shutil.which(BENCH) and shutil.which(SPECULATIVE)), reason=f"needs {BENCH} and {SPECULATIVE} on PATH"
)
def test_the_real_programs(pair: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(main.app, ["--pair", str(pair), "--out", str(tmp_path), *COMMAND])
    assert done.exit_code == 0, done.output
    (file,) = tmp_path.glob("llamacpp-*.jsonl")
    runs = [json.loads(line) for line in file.read_text().splitlines()][1:]
    assert [run["tool"] for run in runs] == [BENCH] * 2 + [SPECULATIVE] * 4
    assert all(run["tokens"] >= 10 for run in runs)
    assert sum(run["drafted"] for run in runs) > 0
