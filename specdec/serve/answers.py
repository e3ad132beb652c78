"""Answers in OpenAI's forms: whole ones, chunks of streams, counts."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any
from uuid import uuid4

from specdec.engine import Result
from specdec.serve.choice import Piece, ShownToken
from specdec.serve.token_texts import TokenTexts

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not have."""

_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_ANY_TEXT = "any text"


def event(content: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {_ENCODER.encode(content)}\n\n".encode()


@dataclass
class Whole:
    """A choice whose pieces are all there."""

    text: str = ""
    tokens: list[ShownToken] = field(default_factory=list)
    finish_reason: str = "stop"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason


class Form(ABC):
    """Of one answer. model: its name. texts: of single tokens. alternatives: per token, None for no log-probabilities.
    origins: whether chunks say where their tokens came from. with_usage: whether a stream ends with the counts."""

    prefix: str
    kind: str
    chunk_kind: str

    def __init__(
        self, model: str, texts: TokenTexts, alternatives: int | None, origins: bool = False, with_usage: bool = False
    ):
        self._texts, self._alternatives, self._origins, self.with_usage = texts, alternatives, origins, with_usage
        self._around: dict[int, tuple[bytes, bytes]] = {}
        self._head = {"id": f"{self.prefix}-{uuid4().hex}", "created": int(time()), "model": model}

    def whole(self, choices: Sequence[Whole], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {**self._head, "object": self.kind, "choices": [
            {"index": index, **self._message(one), "logprobs": self._logprobs(one.tokens),
             "finish_reason": one.finish_reason}
            for index, one in enumerate(choices)
        ], "usage": usage}  # fmt: skip

    @property
    def shows_tokens(self) -> bool:
        """Whether chunks have more than text."""
        return self._origins or self._alternatives is not None

    def chunk(self, index: int, piece: Piece, first: bool) -> bytes:
        """The event of what one step of one text adds to a stream.

        Most chunks of a text differ in nothing but what they say: what is around it is encoded once.
        """
        if first or self.shows_tokens or piece.finish_reason is not None or not piece.text:
            return event(self._chunk(index, piece, first))
        if index not in self._around:
            whole = event(self._chunk(index, Piece(_ANY_TEXT), first=False))
            before, _, after = whole.rpartition(_ENCODER.encode(_ANY_TEXT).encode())
            self._around[index] = before, after
        before, after = self._around[index]
        return before + _ENCODER.encode(piece.text).encode() + after

    def _chunk(self, index: int, piece: Piece, first: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "index": index, **self._delta(piece, first), "logprobs": self._logprobs(piece.tokens) if piece.tokens
            else None, "finish_reason": piece.finish_reason,
        }  # fmt: skip
        chunk = {**self._head, "object": self.chunk_kind, "choices": [entry]}
        if self._origins:
            tokens = [{"id": one.id, "text": one.text, "origin": one.origin} for one in piece.tokens]
            chunk["specdec"] = {"tokens": tokens, "step": piece.step}
        return {**chunk, "usage": None} if self.with_usage else chunk

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The event of the last one, where it is asked for."""
        return event({**self._head, "object": self.chunk_kind, "choices": [], "usage": usage})

    def _logprobs(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        return self._described([one for one in tokens if one.logprobs is not None])

    @abstractmethod
    def _message(self, one: Whole) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _described(self, tokens: Sequence[ShownToken]) -> dict[str, Any]: ...


class ChatForm(Form):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _message(self, one: Whole) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": one.text, "refusal": None}}

    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        return {"delta": delta}

    def _described(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return {"content": [self._token(one) for one in tokens], "refusal": None}

    def _token(self, one: ShownToken) -> dict[str, Any]:
        assert one.logprobs is not None
        top = zip(one.logprobs.top_ids, one.logprobs.top_logprobs, strict=True)
        return {
            **self._entry(one.id, one.logprobs.logprob),
            "top_logprobs": [self._entry(token, logprob) for token, logprob in top],
        }

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._texts.text(token), "logprob": max(logprob, LEAST_LOGPROB),
                "bytes": self._texts.bytes(token)}  # fmt: skip


class CompletionForm(Form):
    """Of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def _message(self, one: Whole) -> dict[str, Any]:
        return {"text": one.text}

    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        return {"text": piece.text}

    def _described(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        found = [(one, one.logprobs) for one in tokens if one.logprobs is not None]
        tops = [
            {self._texts.text(token): max(value, LEAST_LOGPROB)
             for token, value in zip(of.top_ids, of.top_logprobs, strict=True)}
            for _, of in found
        ]  # fmt: skip
        return {
            "tokens": [self._texts.text(one.id) for one, _ in found],
            "token_logprobs": [max(of.logprob, LEAST_LOGPROB) for _, of in found],
            "top_logprobs": tops if self._alternatives else None,
            "text_offset": [one.offset for one, _ in found],
        }


def usage(results: Sequence[Result], num_choices: int) -> dict[str, Any]:
    """Tokens of prompts (each counted once, however many texts continue it) and of all texts; drafts are counted too.

    Args:
        results: of all texts, those of one prompt together. num_choices: of each prompt.
    """
    prompt = sum(len(one.prompt_ids) for one in results[::num_choices])
    made = sum(len(one.token_ids) for one in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(one.num_cached_tokens for one in results[::num_choices])},
        "specdec": {
            "steps": sum(one.num_steps for one in results),
            "draft_tokens": sum(one.num_draft_tokens for one in results),
            "accepted_tokens": sum(one.num_accepted_tokens for one in results),
        },
    }
