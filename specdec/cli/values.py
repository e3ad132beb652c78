"""Values of options that are words of their own: lengths, trees, files of prompts. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from specdec.experiments.workloads import Prompt, read_prompts
from specdec.pairing.schema import MOST_NODES, nodes_of_widths
from specdec.pairing.tables import shown
from specdec.shown_errors import ExperimentError

_DIGITS = 10
"""A number of tokens with more digits than that is none."""


def parse_length(text: int | str | None) -> int | None:
    """ "4" -> 4; "auto" -> None, which is how a Speculator is told to plan."""
    if text is None or text == "auto":
        return None
    length = int(text) if str(text).isdecimal() and len(str(text)) < _DIGITS else 0
    if not 1 <= length <= MOST_NODES:
        raise typer.BadParameter(
            f"--k: expected a number of tokens, at least 1, or auto, got {shown(text)}; at most {MOST_NODES}"
        )
    return length


def parse_tree(text: str) -> tuple[int, ...]:
    """ "4,2,1" -> (4, 2, 1)."""
    try:
        widths = tuple(int(part) for part in text.split(","))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise typer.BadParameter(
            f"--tree: expected children per level such as 4,2,1, each at least 1, got {shown(text)}"
        )
    if nodes_of_widths(widths) > MOST_NODES:
        raise typer.BadParameter(f"--tree: expected at most {MOST_NODES} nodes in all, got more: {shown(text)}")
    return widths


def file_text(path: Path) -> str:
    """The one text in a file, which "-" says is standard input.

    Raises:
        typer.BadParameter: no such file, not a text, or several prompts.
    """
    if str(path) == "-":
        return sys.stdin.read()
    prompts = file_prompts(path)
    if len(prompts) != 1 or len(prompts[0].turns) != 1:
        raise typer.BadParameter(f"--prompt-file: expected one prompt, found several in {path.name!r}")
    return prompts[0].turns[0]


def file_prompts(path: Path, chat: bool = False) -> list[Prompt]:
    """As file_text, all prompts of a file. chat: see Prompt."""
    try:
        return read_prompts(path, chat)
    except ExperimentError as error:
        raise typer.BadParameter(str(error)) from None
