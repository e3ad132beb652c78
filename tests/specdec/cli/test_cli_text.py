"""Tokens on the way to a terminal: nothing lost, nothing broken, nothing dangerous."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_pair import byte_tokenizer

from specdec.cli.text import Screen, Writer, has_colours
from specdec.detokenizer import Detokenizer
from specdec.trace import StepTrace

TOKENIZER = byte_tokenizer()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
def test_pieces_join_to_the_whole_text(ids: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(token) for token in ids] + [detokenizer.flush()]
    assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=12))
def test_characters_appear_whole_and_at_once(text: str) -> None:
    ids = TOKENIZER(text).input_ids
    detokenizer = Detokenizer(TOKENIZER)
    shown, done = "", 0
    for token, size in zip(ids, range(1, len(ids) + 1), strict=True):
        piece = detokenizer.push(token)
        shown += piece
        if piece:
            done = size
        # What is held back is less than one character: at most three bytes.
        assert size - done <= 3
        assert "\ufffd" not in shown
    assert shown + detokenizer.flush() == text


def test_a_terminal_is_not_steered_by_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    hostile = "a\x1b[2Jb\x07\tc\n\x9bd"
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        Screen(stream, kinds=False).write(hostile)
    assert terminal.getvalue() == "a\ufffd[2Jb\ufffd\tc\n\ufffdd"
    assert file.getvalue() == hostile


@pytest.mark.parametrize(
    ("environment", "terminal", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours_follow_the_conventions(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], terminal: bool, expected: bool
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert has_colours(Terminal() if terminal else io.StringIO()) is expected


def test_writer_marks_a_character_split_over_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    ids = TOKENIZER("xé!").input_ids  # é takes two tokens
    stream = io.StringIO()
    writer = Writer(TOKENIZER, Screen(stream, kinds=True))
    for step, (tokens, kinds) in enumerate([(ids[:2], ["accepted", "recovered"]), (ids[2:], ["accepted", "bonus"])]):
        writer(StepTrace(step, [0], [1], [1], [tokens], [kinds], 0.0, 0.0, 0.0))
    writer.finish()
    assert stream.getvalue() == "[xé]<!>\n"  # a split character has the kind of the token that completes it
    assert writer.text == "xé!"
    assert writer.token_ids == ids
