"""`specdec generate` and what all commands share: options, errors, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import specdec
from specdec.cli import app
from specdec.cli.options import parse_tree

ROOT = Path(__file__).resolve().parents[3]
PROMPT = "def parse(argv):\n    "


def invoke(*arguments: object, stdin: str | None = None, **fields: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, **fields)


def generate(pair: Path, *arguments: object, prompt: str | None = PROMPT, **fields: Any) -> Any:
    given = [] if prompt is None else ["--prompt", prompt]
    return invoke("generate", "--pair", pair, "--device", "cpu", "-n", 24, *given, *arguments, **fields)


@lru_cache
def plain(pair: Path, num_tokens: int = 24, prompt: str = PROMPT) -> tuple[list[int], str]:
    """New token ids and text of transformers' own greedy generate."""
    tokenizer: Any = AutoTokenizer.from_pretrained(pair / "target")
    model: Any = AutoModelForCausalLM.from_pretrained(pair / "target").eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)[0, inputs.input_ids.shape[1] :].tolist()
    return ids, tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "drafting",
    [[], ["--k", "2"], ["--tree", "3,2"], ["--draft", "ngram"], ["--draft", "none"], ["--rule", "greedy"]],
    ids=" ".join,
)
def test_greedy_text_is_plain_generates(tiny_pair: Path, drafting: list[str]) -> None:
    result = generate(tiny_pair, *drafting, "--json")
    assert result.exit_code == 0, result.output
    out = json.loads(result.stdout)
    ids, text = plain(tiny_pair)
    assert (out["token_ids"], out["text"], out["prompt"]) == (ids, text, PROMPT)
    assert out["finish_reason"] == "length"
    assert out["report"]["num_emitted_tokens"] == 24
    assert out["report"]["drafter"] == {"ngram": "ngram", "none": "none"}.get(drafting[-1] if drafting else "", "model")
    if {"--k", "--tree"} & set(drafting):  # without them it is planned: this draft model is as slow as its target
        assert out["report"]["num_steps"] < 24


def test_target_and_draft_by_path(tiny_pair: Path) -> None:
    common = ["generate", "--target", tiny_pair / "target", "-p", PROMPT, "-n", 24, "--json"]
    with_draft = json.loads(invoke(*common, "--draft", tiny_pair / "draft").stdout)
    without = json.loads(invoke(*common).stdout)
    assert with_draft["token_ids"] == without["token_ids"] == plain(tiny_pair)[0]
    assert (with_draft["report"]["drafter"], without["report"]["drafter"]) == ("model", "ngram")


def test_text_goes_to_stdout_and_report_to_stderr(tiny_pair: Path) -> None:
    result = generate(tiny_pair, "-k", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == PROMPT + plain(tiny_pair)[1] + "\n"
    assert "mean acceptance length" in result.stderr
    assert "acceptance by position" in result.stderr
    assert generate(tiny_pair, "--no-echo").stdout == plain(tiny_pair)[1] + "\n"


def test_what_is_said_before_the_first_step_stands_before_the_text(
    tiny_pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = specdec.Speculator.generate

    def telling(self: Any, *args: Any, **kwargs: Any) -> Any:
        print("a word about first use")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(specdec.Speculator, "generate", telling)
    done = generate(tiny_pair)
    said, text = done.stdout.split("\n", 1)
    assert said == "a word about first use"
    assert text.startswith(PROMPT)


def test_prompt_from_stdin_is_not_changed(tiny_pair: Path) -> None:
    prompt = "  x = 1\n\n"
    out = json.loads(generate(tiny_pair, "--json", prompt=None, stdin=prompt).stdout)
    assert out["prompt"] == prompt
    assert out["token_ids"] == plain(tiny_pair, prompt=prompt)[0]


def test_empty_prompt_starts_with_the_begin_token(tiny_pair: Path, tmp_path: Path) -> None:
    from tiny_pair import save_pair

    assert json.loads(generate(tiny_pair, "--json", prompt="").stdout)["report"]["num_prompt_tokens"] == 1
    result = generate(save_pair(tmp_path, bos=False), prompt="")
    assert result.exit_code == 2
    assert "prompt is empty" in result.stderr


def test_sampling_is_reproducible_by_its_seed(tiny_pair: Path) -> None:
    def sample(*arguments: object) -> Any:
        result = generate(tiny_pair, "--json", "-t", 1.0, *arguments)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    first, again, other = sample("--seed", 1), sample("--seed", 1), sample("--seed", 2)
    assert first["token_ids"] == again["token_ids"] != other["token_ids"]
    unseeded = sample()
    assert sample("--seed", unseeded["seed"])["token_ids"] == unseeded["token_ids"]
    # One token left to choose from is greedy decoding, whatever the seed: the filters do arrive.
    for narrow in (["--top-k", 1], ["--top-p", 1e-6], ["--min-p", 1.0]):
        assert sample(*narrow)["token_ids"] == plain(tiny_pair)[0]


def test_stop_text_ends_the_generation(tiny_pair: Path) -> None:
    text = plain(tiny_pair)[1]
    stop = next(text[i] for i in range(5, len(text)) if text[i].isascii() and text[i] not in text[:i])
    out = json.loads(generate(tiny_pair, "--stop", stop, "--json").stdout)
    assert out["text"] == text[: text.index(stop) + 1]
    assert out["finish_reason"] == "stop"


@pytest.mark.parametrize("colours", [False, True])
def test_show_draft_marks_every_run(tiny_pair: Path, colours: bool) -> None:
    environment = {"FORCE_COLOR": "1", "NO_COLOR": ""} if colours else {"NO_COLOR": "1"}
    steps = json.loads(generate(tiny_pair, "--k", "3", "--show-draft", "--json").stdout)["steps"]
    assert [token["id"] for step in steps for token in step["tokens"]] == plain(tiny_pair)[0]
    kinds = [token["kind"] for step in steps for token in step["tokens"]]
    assert {"accepted", "recovered"} <= set(kinds)
    for step in steps:
        assert [token["kind"] for token in step["tokens"]].count("accepted") == step["num_accepted_tokens"]
    result = generate(tiny_pair, "--k", "3", "--show-draft", "--no-echo", env=environment)
    ansi = {
        "accepted": ("\x1b[32m", "\x1b[0m"),
        "recovered": ("\x1b[1;33m", "\x1b[0m"),
        "bonus": ("\x1b[4;36m", "\x1b[0m"),
    }
    marks = ansi if colours else {"accepted": "[]", "recovered": "{}", "bonus": "<>"}
    expected, previous = "", None
    for token in (token for step in steps for token in step["tokens"] if token["text"]):
        if token["kind"] != previous:
            expected += ("" if previous is None else marks[previous][1]) + marks[token["kind"]][0]
        expected, previous = expected + token["text"], token["kind"]
    assert previous is not None
    assert result.stdout.startswith(expected)
    assert "drafted and kept" in result.stderr
    if colours:
        assert "\x1b" in result.stdout
    else:
        assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--k", "0"], "--k"),
        (["--k", "soon"], "--k: expected a number of tokens, at least 1, or auto, got 'soon'"),
        (["--k", "auto", "--tree", "2,1"], "--k or --tree"),
        (["--k", "2", "--tree", "2,1"], "--k or --tree"),
        (["--tree", "2,x"], "children per level"),
        (["--tree", "2,0"], "children per level"),
        (["--top-p", "0.9"], "greedy decoding does not sample"),
        (["--seed", "1"], "greedy decoding does not sample"),
        (["--temperature", "-1"], "--temperature"),
        (["--dtype", "float8"], "--dtype"),
        (["--rule", "wishful"], "--rule: expected one of auto, greedy"),
        (["--device", "abacus"], "--device"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--draft", "none", "--k", "2"], "--draft none"),
        (["--draft", "./nowhere"], "--draft"),
        (["--pair", "nothing-like-it"], "a shipped pair"),
        (["--pair", "a", "--target", "b"], "--target or --pair"),
        (["--nonsense"], "No such option"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2(tiny_pair: Path, arguments: list[str], said: str) -> None:
    result = generate(tiny_pair, *arguments, env={"COLUMNS": "500"})
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert result.stdout == ""


def test_tree_widths() -> None:
    assert parse_tree("4,2,1") == (4, 2, 1)


def test_failures_exit_with_1_and_no_traceback(tiny_pair: Path, tmp_path: Path) -> None:
    rule = generate(tiny_pair, "--rule", "block", "--tree", "2,1")
    law = generate(tiny_pair, "--rule", "typical")
    empty = invoke("generate", "--target", tmp_path, "-p", "x")
    failures = (
        (rule, "rule 'block' takes chains only"),
        (law, "Pass lossy=True"),
        (empty, "could not load a causal language model"),
    )
    for result, said in failures:
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert said in result.stderr
        assert "Traceback" not in result.stderr
    shown = invoke("--traceback", "generate", "--target", tmp_path, "-p", "x")
    assert isinstance(shown.exception, specdec.SpecdecError)


def test_bugs_keep_their_traceback(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **fields: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("specdec.Speculator.generate", broken)
    assert isinstance(generate(tiny_pair).exception, ZeroDivisionError)


def test_different_vocabularies_are_pointed_out(tiny_pair: Path, tmp_path: Path) -> None:
    from tiny_pair import byte_tokenizer

    draft = tmp_path / "draft"
    AutoModelForCausalLM.from_pretrained(tiny_pair / "draft").save_pretrained(draft)
    assert "different vocabularies" not in generate(tiny_pair, "--draft", draft).stderr
    other = byte_tokenizer()
    other.add_tokens(["<extra>"])
    other.save_pretrained(draft)
    result = generate(tiny_pair, "--draft", draft)
    assert result.exit_code == 0
    assert "different vocabularies" in result.stderr


def test_bench_passes_its_exit_code_on(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run(options: Any) -> int:
        seen.append(options)
        return 3

    monkeypatch.setattr("specdec.experiments.bench.runner.run", run)
    assert invoke("bench", "--pair", tiny_pair, "--rounds", 2).exit_code == 3
    assert (seen[0].pair, seen[0].rounds) == (str(tiny_pair), 2)
    assert invoke("bench", "--pair", tiny_pair, "--rounds", 0).exit_code == 2


def test_as_a_process(tiny_pair: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "specdec", "generate", "--pair", str(tiny_pair), "-n", "24", "--device", "cpu"]
    done = subprocess.run(
        command, input=PROMPT.encode(), capture_output=True, cwd=ROOT, env=environment, timeout=6000, check=True
    )
    assert done.stdout.decode() == PROMPT + plain(tiny_pair)[1] + "\n"
    assert "tokens per second" in done.stderr.decode()


def test_usage_errors_do_not_wait_for_torch() -> None:
    code = """
import sys
from specdec.cli import app
try:
    app(["generate", "-p", "x", "--pair", "nothing-like-it"], standalone_mode=False)
except Exception as error:
    print(type(error).__name__, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.strip() == "BadParameter False"


@pytest.mark.parametrize(
    ("command", "environment", "expected"),
    [
        ("generate", {}, "10000"),
        ("generate", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("generate", {"OMP_WAIT_POLICY": "active"}, None),
        ("bench", {}, None),
    ],
)
def test_waiting_threads_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch, command: str, environment: dict[str, str], expected: str | None
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that whatever the command sets is undone afterwards
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert invoke(command, "--nonsense").exit_code == 2
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_version() -> None:
    assert invoke("--version").stdout.strip() == f"specdec {specdec.__version__}"
