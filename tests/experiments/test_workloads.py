"""Prompts: the ones that ship, held-out files, and benchmark files read as they are published, or refused clearly."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from specdec.experiments.workloads import Prompt, Source, WorkloadError


class Bytes:
    """One token per character."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [min(ord(letter), 255) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def write(path: Path, *entries: Any) -> Path:
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in entries), encoding="utf-8")
    return path


def test_shipped_prompts_cover_four_domains_evenly() -> None:
    prompts = Source.parse("shipped").load(None)
    assert Counter(prompt.domain for prompt in prompts) == {"code": 5, "edit": 5, "prose": 5, "list": 5}
    assert len({prompt.id for prompt in prompts}) == 20
    assert [prompt.domain for prompt in Source.parse("shipped").load(None, 5)] == [
        "code",
        "edit",
        "prose",
        "list",
        "code",
    ]


def test_instructions_are_of_four_kinds_and_meant_for_chat_templates() -> None:
    prompts = Source.parse("instructions").load(None)
    assert Counter(prompt.domain for prompt in prompts) == {"summary": 3, "code": 3, "edit": 3, "chat": 3}
    assert all(prompt.chat and len(prompt.turns) == 1 for prompt in prompts)


@pytest.mark.parametrize("entry", [{"prompt": "abc"}, {"question_id": 1, "category": "a", "turns": ["abc"]}])
def test_own_prompts_say_whether_they_want_a_chat_template(entry: dict[str, Any], tmp_path: Path) -> None:
    asked = [entry, {**entry, "question_id": 2, "chat": True}, {**entry, "question_id": 3, "chat": False}]
    prompts = Source.parse(f"jsonl:{write(tmp_path / 'own.jsonl', *asked)}").load(None)
    assert [prompt.chat for prompt in prompts] == [False, True, False]
    with pytest.raises(WorkloadError, match=r"own\.jsonl line 1: expected 'chat', true or false, got 1"):
        Source.parse(f"jsonl:{write(tmp_path / 'own.jsonl', {**entry, 'chat': 1})}").load(None)


def test_stdlib_prompts_have_one_length_and_are_the_same_every_time() -> None:
    first, again = (Source.parse("stdlib").load(Bytes(), 3, seed=4) for _ in range(2))
    assert first == again
    assert [len(prompt.ids or ()) for prompt in first] == [128] * 3
    assert Source.parse("stdlib").load(Bytes(), 3, seed=5) != first


SPEC = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."], "reference": ["x"]},
    {"question_id": 161, "category": "translation", "turns": ["Translate: Guten Tag."]},
    {"question_id": 401, "category": "rag", "turns": ["Answer."]},
]


def test_spec_bench_files_are_grouped_as_spec_bench_reports_them(tmp_path: Path) -> None:
    path = write(tmp_path / "question.jsonl", *SPEC)
    prompts = Source.parse(f"spec-bench:{path}").load(None)
    assert [(p.id, p.domain, len(p.turns), p.chat) for p in prompts] == [
        ("81", "mt_bench", 2, True), ("161", "translation", 1, True), ("401", "rag", 1, True),
    ]  # fmt: skip


SPEED = {"question_id": "q1", "category": "coding", "sub_category": "x", "turns": ["Write a loop."], "source": "s",
         "src_id": "1", "difficulty": "easy", "multiturn": False}  # fmt: skip


def test_speed_bench_files(tmp_path: Path) -> None:
    path = write(tmp_path / "qualitative.jsonl", SPEED, {**SPEED, "question_id": "q2", "category": "math"})
    assert [(p.id, p.domain) for p in Source.parse(f"speed-bench:{path}").load(None)] == [
        ("q1", "coding"),
        ("q2", "math"),
    ]


def test_placeholder_rows_of_speed_bench_are_not_measured(tmp_path: Path) -> None:
    masked = {**SPEED, "question_id": "q2",
              "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"]}  # fmt: skip
    path = write(tmp_path / "qualitative.jsonl", SPEED, masked)
    with pytest.raises(WorkloadError, match=r"1 of 2 rows of qualitative\.jsonl are placeholders"):
        Source.parse(f"speed-bench:{path}").load(None)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    path = tmp_path / "test.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(WorkloadError, match="needs pyarrow"):
        Source.parse(f"speed-bench:{path}").load(None)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2: expected an object, got list"),
        ({**SPEC[0], "turns": []}, "line 2: expected 'turns'"),
        ({**SPEC[0], "turns": ["a", 3]}, "line 2: expected 'turns'"),
        ({**SPEC[0], "category": "cooking"}, "expected a category of .* got 'cooking'"),
        ({"category": "rag", "turns": ["a"]}, "expected 'question_id'"),
        (SPEC[1], "the id '161' occurs twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, entry: Any, message: str) -> None:
    path = write(tmp_path / "question.jsonl", SPEC[1], entry)
    with pytest.raises(WorkloadError, match=message):
        Source.parse(f"spec-bench:{path}").load(None)


@pytest.mark.parametrize("text", ["spec-bench", "stdlib:x", "mt-bench:file", ""])
def test_unknown_sources_are_refused(text: str) -> None:
    with pytest.raises(WorkloadError, match=r"prompts: expected one of shipped, instructions, stdlib, spec-bench:FILE"):
        Source.parse(text)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"found none at 'no\.jsonl'"):
        Source.parse(f"jsonl:{tmp_path / 'no.jsonl'}").load(None)
    with pytest.raises(WorkloadError, match="no prompts in it"):
        Source.parse(f"jsonl:{write(tmp_path / 'empty.jsonl')}").load(None)
    with pytest.raises(WorkloadError, match="none of them empty"):
        Prompt("a", "b", ("",))
