"""`--chat`: a chat model is asked in its own template, or told to continue a text, and the output says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import TEMPLATE, save_pair
from typer.testing import CliRunner

from specdec.cli import app

LENGTHS = ("--threads", "1", "--device", "cpu")
ASKED = "asked in the model's chat template (--no-chat"
CONTINUED = "continued as they stand (--chat"
NONE = "continued as they stand (this model has no chat template)"
OWN = "hello"
WRAPPED = f"user:{OWN}\nbot:"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("chat"), chat_template=TEMPLATE)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(OWN)
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), *LENGTHS], env={"COLUMNS": "500"})


def test_generate_continues_and_says_so_unless_it_is_told_to_ask(pair: Path, tiny_pair: Path) -> None:
    common = ("generate", "--pair", pair, "-n", "4", "-p")
    asked, wrapped = invoke(*common, OWN, "--chat"), invoke(*common, WRAPPED)
    assert asked.stdout == f"{OWN}\n\n{wrapped.stdout.removeprefix(WRAPPED)}"
    assert CONTINUED in wrapped.stderr
    assert CONTINUED not in asked.stderr
    plain = ("generate", "--pair", tiny_pair, "-n", "4", "-p", OWN)
    assert "continued" not in invoke(*plain).stderr
    refused = invoke(*plain, "--chat")
    assert (refused.exit_code, "no chat template" in refused.stderr) == (2, True)


@pytest.mark.parametrize(
    ("option", "said", "tokens"), [((), ASKED, len(WRAPPED)), (("--no-chat",), CONTINUED, len(OWN))]
)
def test_what_measures_asks_and_says_so(
    pair: Path, own: Path, tmp_path: Path, option: tuple[str, ...], said: str, tokens: int
) -> None:
    common = ("--pair", pair, "--prompt-file", own, "-n", "4", "-k", "2", *option)
    bench = invoke("bench", *common, "--quick", "--peers", "specdec-model", "--out", tmp_path / "bench")
    assert bench.exit_code == 0, bench.output
    assert said in bench.stdout
    assert f"1 prompts x {tokens} tokens" in bench.stdout
    assert "specdec-model-k2" in bench.stdout
    accept = invoke("accept", *common, "-t", "0", "--no-report", "--no-log", "--out", tmp_path / "accept")
    assert accept.exit_code == 0, accept.output
    assert said in accept.stdout
    lines = [json.loads(line) for line in (tmp_path / "accept" / "runs-0.jsonl").read_text().splitlines()]
    runs = {line["cell"]: line for line in lines if line["kind"] == "run"}
    assert {cell.split()[0] for cell in runs} == {"none", "model:k=2"}
    assert {run["turns"][0]["prompt_tokens"] for run in runs.values()} == {tokens}


def test_check_asks_and_says_so(pair: Path, tiny_pair: Path) -> None:
    common = ("check", "--quick", "--budget", "1", "-p", OWN, "-k", "2")
    for which, option, said in ((pair, (), ASKED), (pair, ("--no-chat",), CONTINUED), (tiny_pair, (), NONE)):
        assert said in invoke(*common, "--pair", which, *option).stdout
