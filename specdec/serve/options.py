"""What a server may be told, with every default there is. Imports nothing: commands show these in their help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_ROWS = 16
"""Requests that are decoded together."""
MAX_WAITING = 1024
"""Texts that may wait for a place."""
KV_MIB = 512
"""MiB of K/V, target and drafters together."""


def further_drafters(words: str, draft: Any) -> dict[str, str]:
    """Drafters that a request may name besides `draft`: words with commas between."""
    return {word: word for word in words.split(",") if word and word != draft}


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, who may ask, and how much of it.

    api_key_file: one key a line; None: nobody is asked for one. cors_origins: whose pages a browser may let in.
    allowed_hosts: names in the header Host that are taken as well as this machine's own, where it listens on this
        machine only; where it listens for others any name is taken, unless this names some.
    max_connections: open at once, whatever they do. max_concurrent: generations at once; what is beyond gets 429.
    max_body_bytes, max_prompt_tokens (None: as many as the model takes), max_new_tokens, max_choices (prompts times n):
        of one request. default_new_tokens: of a chat that names no number (a completion has OpenAI's 16).
    body_seconds: a body must have come in; request_seconds: a generation must be done, the queue included;
        write_seconds: a client must have taken a chunk; drain_seconds: streams have left after SIGTERM.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_connections: int = 2048
    max_concurrent: int = 256
    max_body_bytes: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    default_new_tokens: int = 1024
    max_choices: int = 16
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    write_seconds: float = 60.0
    drain_seconds: float = 60.0
