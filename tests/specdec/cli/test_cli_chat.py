"""`specdec chat`: every answer is what plain generate would say to the whole conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_pair import TEMPLATE, save_pair
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import specdec
from specdec.cli import app
from specdec.kv.versions import CACHE_KEYWORD

NUM_TOKENS = 12


def chat(pair: Path, lines: list[str], *arguments: str) -> Any:
    command = ["chat", "--pair", str(pair), "--device", "cpu", "-n", str(NUM_TOKENS), *arguments]
    return CliRunner().invoke(app, command, input="".join(f"{line}\n" for line in lines))


def answer(pair: Path, ids: list[int]) -> tuple[list[int], str]:
    """Token ids and text of plain greedy generate after `ids`."""
    import torch

    tokenizer: Any = AutoTokenizer.from_pretrained(pair / "target")
    model: Any = AutoModelForCausalLM.from_pretrained(pair / "target").eval()
    tokens = torch.tensor([ids])
    new = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NUM_TOKENS, do_sample=False
    )[0, len(ids) :].tolist()  # fmt: skip
    return new, tokenizer.decode(new, skip_special_tokens=True)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Arguments of every `Speculator.generate`."""
    seen: list[dict[str, Any]] = []
    generate = specdec.Speculator.generate

    def spy(self: specdec.Speculator, *arguments: Any, **fields: Any) -> Any:
        seen.append(fields)
        return generate(self, *arguments, **fields)

    monkeypatch.setattr(specdec.Speculator, "generate", spy)
    return seen


def test_text_mode_continues_one_growing_text(tiny_pair: Path, calls: list[dict[str, Any]]) -> None:
    result = chat(tiny_pair, ["first line", "", "second"])
    assert result.exit_code == 0, result.output
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_pair / "target")
    ids = tokenizer("first line\n").input_ids
    first, first_text = answer(tiny_pair, ids)
    ids += first + tokenizer("second\n").input_ids
    _, second_text = answer(tiny_pair, ids)
    assert result.stdout == f"{first_text}\n{second_text}\n"
    assert len(calls) == 2, "an empty line asks nothing"
    assert calls[1]["input_ids"].tolist() == [ids]
    assert CACHE_KEYWORD not in calls[0]
    assert calls[1][CACHE_KEYWORD] is not None, "the K/V of the first turn is used again"
    said = chat(tiny_pair, ["first line", "second", "/report"]).stdout
    held = len(ids) - len(tokenizer("second\n").input_ids) - 1
    assert f"{len(ids)} prompt tokens, {held} of them reused from the cache: " in said


def test_template_mode_sends_the_whole_conversation(tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    pair = save_pair(tmp_path, chat_template=TEMPLATE)
    result = chat(pair, ["hello", "again"])
    assert result.exit_code == 0, result.output
    tokenizer: Any = AutoTokenizer.from_pretrained(pair / "target")
    _, first = answer(pair, tokenizer("user:hello\nbot:").input_ids)
    ids = tokenizer(f"user:hello\nassistant:{first}\nuser:again\nbot:").input_ids
    _, second = answer(pair, ids)
    assert result.stdout == f"{first}\n{second}\n"
    assert calls[1]["input_ids"].tolist() == [ids]
    # The template writes the role of an old answer differently from its prompt: stale K/V must not be used.
    assert CACHE_KEYWORD not in calls[1]


def test_commands(tiny_pair: Path, calls: list[dict[str, Any]]) -> None:
    result = chat(tiny_pair, ["/report", "hi", "/report", "/reset", "hi", "/sing", "/help", "/quit", "not read"])
    assert result.exit_code == 0, result.output
    assert "nothing was generated yet" in result.stdout
    assert result.stdout.count("tokens per target pass") == 1
    assert [call["input_ids"].tolist() for call in calls] == [calls[0]["input_ids"].tolist()] * 2
    assert CACHE_KEYWORD not in calls[1], "/reset forgets the K/V too"
    assert "unknown command /sing" in result.stderr
    assert "/quit" in result.stdout


def test_each_turn_samples_with_its_own_noise(tiny_pair: Path, calls: list[dict[str, Any]]) -> None:
    result = chat(tiny_pair, ["hi", "hi", "/reset", "hi"], "-t", "1", "--seed", "5")
    assert result.exit_code == 0, result.output
    assert [call["seed"] for call in calls] == [5, 6, 5], "a conversation begun again is the same conversation"
    answers = result.stdout.split("\n")
    assert answers[0] != answers[1]


def test_an_interrupted_answer_stays_in_the_conversation(tiny_pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def interrupted(self: specdec.Speculator, **fields: Any) -> Any:
        seen.append(fields)
        fields["on_step"].show([(40, "accepted"), (41, "bonus")])
        raise KeyboardInterrupt

    monkeypatch.setattr(specdec.Speculator, "generate", interrupted)
    result = chat(tiny_pair, ["hi", "go on"])
    assert result.exit_code == 0, result.output
    first, second = (call["input_ids"][0].tolist() for call in seen)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_pair / "target")
    assert second == [*first, 40, 41, *tokenizer("go on\n").input_ids]
    assert CACHE_KEYWORD not in seen[1]
