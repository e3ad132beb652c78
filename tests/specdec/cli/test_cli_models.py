"""Any model, named by itself: `--target`, `--draft`, `--gguf-file`, `--prompt-file`, the same in every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf_llama import merging_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from specdec.cli import app
from specdec.pairing import PairError
from specdec.pairing.chosen import chosen_pair
from specdec.pairing.gguf import export_model

PROMPT = "def parse(argv):\n    return argv\n\ndef parse("
LENGTHS = ("--device", "cpu", "--threads", "1")


def invoke(*arguments: object, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(one) for one in arguments], input=stdin, env={"COLUMNS": "500"})


def ok(*arguments: object, **fields: Any) -> Any:
    result = invoke(*arguments, **fields)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT)
    return path


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model as `transformers` saves it, and the same model as a GGUF file in another folder."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = merging_tokenizer()
    model = tiny_llama()
    for saved in (model, tokenizer):
        saved.save_pretrained(folder / "plain")
    export_model(model, tokenizer, folder / "packed" / "tiny.gguf")
    return folder


def generate(*arguments: object, **fields: Any) -> dict[str, Any]:
    found = json.loads(ok("generate", "-n", 16, "--json", *LENGTHS, *arguments, **fields).stdout)
    assert isinstance(found, dict)
    return found


def test_generate_reads_its_prompt_from_a_file(tiny_pair: Path, text: Path) -> None:
    wanted = generate("--pair", tiny_pair, "-p", PROMPT)
    found = generate("--target", tiny_pair / "target", "--prompt-file", text)
    assert (found["prompt"], found["token_ids"]) == (PROMPT, wanted["token_ids"])
    assert generate("--pair", tiny_pair, "--prompt-file", "-", stdin=PROMPT)["token_ids"] == wanted["token_ids"]
    both = invoke("generate", "--pair", tiny_pair, "-p", PROMPT, "--prompt-file", text)
    assert (both.exit_code, "--prompt or --prompt-file" in both.stderr) == (2, True)


def test_chat_says_the_file_first(tiny_pair: Path, text: Path) -> None:
    common = ("chat", "--target", tiny_pair / "target", "-n", 8, *LENGTHS)
    first = ok(*common, "--prompt-file", text, stdin="").stdout
    assert first
    assert ok(*common, "--prompt-file", text, stdin="more\n").stdout.startswith(first)


def test_check_takes_texts_and_json_lines(tiny_pair: Path, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "two.jsonl"
    lines.write_text(json.dumps({"prompt": "one two one"}) + "\n" + json.dumps({"prompt": "three"}) + "\n")
    found = ok("check", "--target", tiny_pair / "target", "--prompt-file", text, "--prompt-file", lines, "-p", "four",
               "--budget", 2, "--json", "-", *LENGTHS)  # fmt: skip
    settings = json.loads(found.stdout)["settings"]
    assert (settings["num_prompts"], settings["drafter"]) == (4, "ngram")


def test_every_word_for_a_drafter_drafts(tiny_pair: Path) -> None:
    wanted = generate("--target", tiny_pair / "target", "--draft", "none", "-p", PROMPT)["token_ids"]
    for word in ("suffix", "self:int8"):  # with -k: a planner may find that drafts do not pay here
        found = generate("--target", tiny_pair / "target", "--draft", word, "-p", PROMPT, "-k", 3, "--show-draft")
        assert found["token_ids"] == wanted
        assert found["report"]["num_draft_tokens"] > 0, word


@pytest.mark.parametrize("how", ["file", "folder and name"])
def test_a_gguf_file_is_the_model_it_was_made_of(gguf: Path, how: str) -> None:
    packed = gguf / "packed"
    named = (packed / "tiny.gguf",) if how == "file" else (packed, "--gguf-file", "tiny.gguf")
    wanted = generate("--target", gguf / "plain", "-p", "abc abc ab")
    found = generate("--target", *named, "-p", "abc abc ab")
    assert found["token_ids"] == wanted["token_ids"]
    assert len(set(wanted["token_ids"])) > 1  # else any model would do


def test_a_model_from_a_gguf_file_can_be_saved(gguf: Path, tmp_path: Path) -> None:
    from specdec.pairing.loading import load_pair

    target, _, _ = load_pair(chosen_pair(target=str(gguf / "packed" / "tiny.gguf")))
    target.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(weight.equal(target.state_dict()[name]) for name, weight in again.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "{target}", "--pair", "qwen3-8b-0.6b"), "expected --target or --pair, got both"),
        (("--gguf-file", "x.gguf"), "that --target names"),
        (("--target", "{target}", "--gguf-file", "x.gguf"), "found no 'x.gguf' there"),
        (("--target", "./nowhere"), "--target: expected a folder"),
        (("--draft", "./nowhere"), "--draft: expected a folder"),
        (("--draft", "sufix"), "did you mean suffix?"),
        (("--prompt-file", "/nowhere/x.txt"), "'x.txt'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("command", ["generate", "chat", "check", "bench", "accept"])
def test_what_cannot_be_meant_is_said_by_every_command(
    command: str, options: tuple[str, ...], said: str, tiny_pair: Path
) -> None:
    given = [part.format(target=tiny_pair / "target") for part in options]
    result = invoke(command, *given)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_a_pair_of_a_target_alone_is_looked_up_in_its_own_text() -> None:
    found = chosen_pair(target="owner/Model-1B")
    assert (found.target.model, found.draft.kind, found.name) == ("owner/Model-1B", "ngram", "model-1b-ngram")
    assert chosen_pair(target="owner/big", draft="owner/small").draft.model == "owner/small"
    # Another draft on the target of a pair, without the settings of the pair's own.
    other = chosen_pair("llama-3.1-8b-eagle3", draft="ngram")
    assert (other.target.model, other.draft.kind) == ("meta-llama/Llama-3.1-8B-Instruct", "ngram")
    with pytest.raises(PairError, match="does not run eagle3"):
        chosen_pair("llama-3.1-8b-eagle3")
