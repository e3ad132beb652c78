"""Acceptance rules on the command line."""

from __future__ import annotations

from pathlib import Path

from test_cli import generate, invoke

from specdec.cli.options import RULES as RULE_NAMES
from specdec.verify.rules import RULES


def test_the_rules_on_offer_are_those_there_are() -> None:
    assert RULE_NAMES == ("auto", *RULES)
    shown = invoke("generate", "--help", env={"COLUMNS": "500"}).stdout
    assert all(name in shown for name in RULE_NAMES)


def test_a_lossy_text_is_agreed_to_and_called_so(tiny_pair: Path) -> None:
    sampled = ("--temperature", "1", "--seed", "3", "-n", "16")
    result = generate(tiny_pair, "--rule", "typical", "--lossy", *sampled)
    assert result.exit_code == 0, result.output
    assert "typical (LOSSY" in result.stderr


def test_coupled_text_does_not_depend_on_the_draft(tiny_pair: Path) -> None:
    sampled = ("--rule", "coupled", "--temperature", "1", "--seed", "3", "-n", "24", "--dtype", "float64")
    drafting: tuple[tuple[str, ...], ...] = ((), ("--tree", "3,2"), ("--draft", "ngram"), ("--draft", "none"))
    texts = {generate(tiny_pair, *sampled, *how).stdout for how in drafting}
    assert len(texts) == 1
    assert generate(tiny_pair, *sampled[:4], "--seed", "4", *sampled[6:]).stdout not in texts
