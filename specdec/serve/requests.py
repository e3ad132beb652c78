"""Bodies of requests: OpenAI's fields and vLLM's, their ranges, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

MOST_STOPS, MOST_STOP_CHARACTERS = 4, 256
MOST_MESSAGES = 4096
MOST_BIASES = 1024

Text = Annotated[str, Field(max_length=MOST_STOP_CHARACTERS, min_length=1)]
Count = Annotated[StrictInt, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TokenId = Annotated[StrictInt, Field(ge=0, lt=2**31)]

_LATER = "this server makes plain text"
_NOT_HERE = {
    "tools": f"tools are not supported: {_LATER}; describe them in the prompt, or leave tools out",
    "functions": f"functions are not supported: {_LATER}",
    "tool_choice": f"tools are not supported: {_LATER}",
    "function_call": f"functions are not supported: {_LATER}",
    "response_format": f"only the response_format of type 'text' is supported: {_LATER}, no grammar holds it to a form",
    "modalities": f"only the modality 'text' is supported: {_LATER}",
    "audio": f"audio is not supported: {_LATER}",
    "prediction": "predicted outputs are not supported: drafts are made by the server's own drafters",
    "web_search_options": f"web search is not supported: {_LATER}",
    "suffix": "text before a suffix is not supported: leave it out",
    "echo": "the prompt is not echoed: put it before the answer yourself",
    "best_of": "best_of is not supported: ask for n texts and choose",
    "store": "nothing is stored: leave it out, or false",
}
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,), "store": (False,),
    "suffix": ("",),
}  # fmt: skip
"""Values of theirs that ask for nothing; None never does."""


class Body(BaseModel):
    """What is not known is refused: a mistyped field must not change the text in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Body):
    """include_usage: a last chunk with the counts. specdec: beside each chunk, its tokens and where they came from."""

    include_usage: bool = False
    include_obfuscation: bool = False
    specdec: bool = False


class Generation(Body):
    """What both kinds of request share.

    draft: name of one of the server's drafters, "none" for plain decoding. seed: makes the text reproducible.
    ignore_eos: go on until the limit. Fields without a meaning here are taken and ignored: user, metadata, ...
    """

    model: str = Field(default="", max_length=512)
    n: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Share | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=MOST_BIASES),
    ] | None = None  # fmt: skip
    ignore_eos: StrictBool = False
    draft: Annotated[str, Field(max_length=128)] | None = None

    user: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    parallel_tool_calls: Any = None

    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None
    suffix: Any = None
    echo: Any = None
    best_of: Any = None
    store: Any = None

    @model_validator(mode="after")
    def _refuse_what_is_not_here(self) -> Self:
        for name, why in _NOT_HERE.items():
            value = getattr(self, name)
            if value is None or any(value == harmless for harmless in _HARMLESS.get(name, ())):
                continue
            if name == "best_of" and value == (self.n or 1):
                continue
            raise Unsupported(name, why)
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def limit(self) -> int | None:
        """New tokens at most, if the request says so."""
        return self.max_tokens

    @property
    def num_alternatives(self) -> int | None:
        """Likeliest tokens to be told of at every place; None: no logprobs at all."""
        return None


class Unsupported(ValueError):
    """A field asks for what this server does not do."""

    def __init__(self, name: str, why: str):
        super().__init__(why)
        self.name = name


class CompletionRequest(Generation):
    """`POST /v1/completions`. prompt: a text, token ids, or a list of either."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=1024)]
    )
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None

    @property
    def num_alternatives(self) -> int | None:
        return self.logprobs


class ContentPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. "developer" is OpenAI's newer word for "system"."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(min_length=1)] | None
    name: str | None = None
    refusal: Any = None
    annotations: Any = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def num_alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
