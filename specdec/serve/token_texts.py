"""Single tokens as text and as bytes, for log-probabilities."""

from __future__ import annotations

import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Args: tokenizer: of `transformers`."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def text(self, token: int) -> str:
        """What the token reads as by itself; special ones by their names. Parts of a character are U+FFFD."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def bytes(self, token: int) -> list[int]:
        """Its bytes of UTF-8, also where they are only a part of a character's."""
        text = self.text(token)
        if "\ufffd" in text:
            name = str(self._tokenizer.convert_ids_to_tokens(token))
            if found := _FALLBACK.fullmatch(name):
                return [int(found[1], 16)]
            if all(character in _BYTES for character in name):
                return [_BYTES[character] for character in name]
        return list(text.encode())
