"""The forms of answers, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "specdec"
    max_model_len: int


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]

    @classmethod
    def of(cls, name: str, created: int, max_model_len: int) -> Self:
        return cls(data=[Model(id=name, created=created, max_model_len=max_model_len)])


class Info(BaseModel):
    model: str
    drafters: list[str]
    chat_template: bool
    max_request_tokens: int
    max_new_tokens: int
    lossy: str | None
    version: str


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: Error


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]
    specdec: dict[str, int]


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None


class Said(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    index: int
    message: Said
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class OriginToken(BaseModel):
    id: int
    text: str
    origin: Literal["drafted", "recovered", "bonus", "plain"]


class Origins(BaseModel):
    """Where the tokens of a chunk came from; step: number of the engine's step for this text."""

    tokens: list[OriginToken]
    step: int


class _Head(BaseModel):
    id: str
    created: int
    model: str


class ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(_Head):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    specdec: Origins | None = None


class Completion(_Head):
    """Whole, or a chunk of a stream."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None
    specdec: Origins | None = None


_WHY = {
    400: "A field is wrong; the message says which, what was expected and what to do.",
    401: "No valid key.",
    404: "No such model, or no such address.",
    405: "Not by this method.",
    408: "The body, or the text, took too long.",
    413: "The body is too large.",
    415: "Not JSON.",
    421: "The header Host has a name that is not this server's.",
    429: "Too many generations at once.",
    500: "The generation failed.",
    503: "The queue is full, or the server ends.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": why} for status, why in _WHY.items()
}


def _replies(whole: type[BaseModel], chunk: str) -> dict[int | str, dict[str, Any]]:
    stream = {"schema": {"type": "string"}, "example": f"data: {{{chunk}}}\n\ndata: [DONE]\n\n"}
    described = 'The whole answer, or with "stream": true server-sent events, one per step of the engine.'
    return {200: {"model": whole, "description": described, "content": {"text/event-stream": stream}}, **ERRORS}


CHAT_REPLIES = _replies(ChatCompletion, '"object": "chat.completion.chunk", ...')
COMPLETION_REPLIES = _replies(Completion, '"object": "text_completion", ...')
