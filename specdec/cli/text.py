"""Text on a terminal, coloured by where each token came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import Any, TextIO

from specdec.detokenizer import Detokenizer

COLOURS = {"accepted": "32", "recovered": "1;33", "bonus": "4;36"}
"""ANSI attributes per kind of token; weight and underline help whoever cannot tell the colours apart."""

MARKS = {"accepted": ("[", "]"), "recovered": ("{", "}"), "bonus": ("<", ">")}
"""Where there are no colours: brackets around each run of tokens of one kind."""

MEANINGS = {
    "accepted": "drafted and kept",
    "recovered": "the target's own, after a rejected draft",
    "bonus": "the target's own, after everything was accepted",
}

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Writes pieces of text to `stream`, marked by kind if asked to.

    Args:
        kinds: show where each token came from, in colour where the terminal has them, else in brackets.
    """

    def __init__(self, stream: TextIO, kinds: bool):
        self._stream = stream
        self._kinds = kinds
        self._terminal = stream.isatty()
        self._marks = {kind: (f"\x1b[{code}m", "\x1b[0m") for kind, code in COLOURS.items()}
        if not has_colours(stream):
            self._marks = MARKS
        self._open: str | None = None

    def write(self, piece: str, kind: str | None = None) -> None:
        """Show `piece` at once; `kind` None is text that no step emitted (a prompt)."""
        if not piece:
            return
        if self._terminal:
            piece = _CONTROL.sub("\ufffd", piece)  # a model's escape sequences must not steer the terminal
        self._stream.write(self._switch(kind if self._kinds else None) + piece)
        self._stream.flush()

    def end(self) -> None:
        """Close the last mark and the last line."""
        self._stream.write(self._switch(None) + "\n")
        self._stream.flush()

    def legend(self) -> str:
        """One line that explains the marks."""
        return "; ".join(f"{kind.join(self._marks[kind])} {meaning}" for kind, meaning in MEANINGS.items())

    def _switch(self, kind: str | None) -> str:
        """What has to be written before text of `kind`."""
        if kind == self._open:
            return ""
        closing = "" if self._open is None else self._marks[self._open][1]
        self._open = kind
        return closing + ("" if kind is None else self._marks[kind][0])


class Writer:
    """Receives `StepTrace`s of a one-row call and shows their tokens on a screen as they come."""

    def __init__(self, tokenizer: Any, screen: Screen):
        self._detokenizer = Detokenizer(tokenizer)
        self._screen = screen
        self._kind: str | None = None
        self.token_ids: list[int] = []
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def __call__(self, trace: Any) -> None:
        """Usable as `on_step`."""
        for tokens, kinds in zip(trace.emitted, trace.kinds, strict=True):
            self.show(zip(tokens, kinds, strict=True))

    def show(self, tokens: Iterable[tuple[int, str]]) -> None:
        for token, self._kind in tokens:
            self.token_ids.append(token)
            self._write(self._detokenizer.push(token))

    def finish(self) -> None:
        self._write(self._detokenizer.flush())
        self._screen.end()

    def _write(self, piece: str) -> None:
        if piece:
            self.pieces.append(piece)
            self._screen.write(piece, self._kind)


def has_colours(stream: TextIO) -> bool:
    """NO_COLOR and FORCE_COLOR are obeyed (https://no-color.org); otherwise a terminal that is not dumb has colours."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"
