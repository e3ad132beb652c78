"""The page of the structure walks one step; here a step is followed and the page held to it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import models
import pytest
from source_files import ROOT

import specdec
from specdec.loop import DecodeLoop
from specdec.verify.native.library import why_not

MOST_FILES, MOST_FUNCTIONS = 20, 100
"""Of one step of a small model, warm, on a CPU: a reader can hold so much."""

Call = tuple[str, str]
"""File, from the root, and qualified name."""


def page() -> list[Call]:
    """The rows of the table, top down."""
    text = (ROOT / "docs" / "structure.md").read_text()
    section = text[text.index("## One step") : text.index("## kv")]
    return [(file, name) for name, file in re.findall(r"^\|[^|]*\| `([\w.]+)` in `([\w./]+)` \|", section, re.M)]


@pytest.fixture(scope="module")
def followed() -> list[Call]:
    """Every call of ours in the sixth step of a greedy call with a draft model, k = 3, in order."""
    target, draft = models.target("llama-gqa", "fp32"), models.draft("near", "llama-gqa", "fp32")
    spec: Any = specdec.Speculator(target, draft, k=3)
    ids = models.prompts((8,), models.VOCAB, 3)[0]
    calls: list[Call] = []
    tests = ROOT / "tests"

    def heard(frame: Any, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_absolute():
            path = path.resolve()
            if path.is_relative_to(ROOT) and not path.is_relative_to(tests) and ".venv" not in path.parts:
                calls.append((path.relative_to(ROOT).as_posix(), frame.f_code.co_qualname))

    step, count = DecodeLoop.step, [0]

    def watched(self: DecodeLoop) -> Any:
        count[0] += 1
        if count[0] != 6:
            return step(self)
        before = sys.getprofile()
        sys.setprofile(heard)
        try:
            return step(self)
        finally:
            sys.setprofile(before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodeLoop, "step", watched)
        spec.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert calls
    return calls


def in_order(wanted: list[Call], calls: list[Call]) -> Call | None:
    """The first of the wanted calls that does not come after those before it; None where all do."""
    at = 0
    for call in wanted:
        try:
            at = calls.index(call, at) + 1
        except ValueError:
            return call
    return None


@pytest.mark.skipif(why_not() is not None, reason="the page walks a native pass")
def test_the_page_walks_a_step_as_it_is(followed: list[Call]) -> None:
    rows = page()
    assert len(rows) >= 15
    assert in_order(rows, followed) is None
    rule, forward = rows[10], rows[5]  # the control: accepted before the pass
    assert rule[0].startswith("verify/rules/")
    assert in_order([rule, forward], followed) == forward
    assert in_order([*rows, ("specdec/loop.py", "DecodeLoop.step")], followed) is not None


@pytest.mark.skipif(why_not() is not None, reason="other passes go through other rooms")
def test_a_step_goes_through_few_rooms(followed: list[Call]) -> None:
    files, functions = {file for file, _ in followed}, set(followed)
    assert len(files) <= MOST_FILES, sorted(files)
    assert len(functions) <= MOST_FUNCTIONS, sorted(functions)
