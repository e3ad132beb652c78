"""Tokens to text while they come: never half a character, and joined the whole decoding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\ufffd"
_MOST_OPEN = 3
"""Bytes a character of UTF-8 can lack its last one of, and so the most U+FFFD that may still become something else."""
_LONG = 16
"""Tokens of a window that is worth cutting."""


class Detokenizer:
    """Turns a stream of token ids into text, piece by piece.

    A byte-level token may end inside a character, and some tokenizers write a token differently after another one;
    so each piece is what a short window decodes to, beyond what was given out of it. A half character at its end is
    held back until it is whole, or cannot become so any more.

    Where a tokenizer falls back to bytes, `decode` makes U+FFFD of a whole run of them if one of them fits nothing;
    characters of the run that were complete before stay what they were here. So no window begins with such bytes.

    Args:
        tokenizer: of `transformers`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._bytes = _byte_tokens(tokenizer)
        self._window: list[int] = []
        self._edge = 0  # tokens of the window before which all text is given out
        self._given = 0  # characters of the window's text

    def push(self, token: int) -> str:
        """The text that `token` completes; "" while it completes nothing."""
        self._window.append(token)
        return self._advance(final=False)

    def push_all(self, tokens: Sequence[int]) -> str:
        """What `push` gives for one after the other, joined; decoded at once wherever that is the same."""
        if not self._bytes.isdisjoint(tokens):
            return "".join([self.push(token) for token in tokens])
        self._window += tokens
        return self._advance(final=False)

    def flush(self) -> str:
        """What is still held back, half characters included."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._window)
        doubtful = 0 if final else min(_MOST_OPEN, len(text) - len(text.rstrip(_UNKNOWN)))
        settled = len(text) - doubtful
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if doubtful:
            self._cut(text)
        elif piece:  # from now on the window begins with the tokens of this piece, which are whole
            whole = [token for token in self._window[self._edge :] if token not in self._bytes]
            self._window = whole or [token for token in self._window[: self._edge] if token not in self._bytes]
            self._edge, self._given = len(self._window), len(self._decode(self._window))
        return piece

    def _cut(self, text: str) -> None:
        """Shorten a window that ends in nothing but U+FFFD for a long time, where that changes nothing."""
        if len(self._window) < _LONG:
            return
        for place in range(len(self._window) - 1, len(self._window) - 1 - _MOST_OPEN, -1):
            head = self._decode(self._window[:place])
            tail = self._decode(self._window[place:])
            if tail and head + tail == text and len(head) <= self._given:
                self._window, self._edge, self._given = self._window[place:], 0, self._given - len(head)
                return

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that stand for single bytes in vocabularies of characters (Llama 2's), if there are any."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    if tokenizer.convert_ids_to_tokens(_id(tokenizer, names[0])) != names[0]:
        return frozenset()
    return frozenset(_id(tokenizer, name) for name in names)


def _id(tokenizer: Any, name: str) -> int:
    found = tokenizer.convert_tokens_to_ids(name)
    return 0 if found is None else int(found)
