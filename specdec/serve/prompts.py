"""From the texts and conversations of requests to token ids."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from specdec.prompt_files import has_template
from specdec.serve.errors import Refusal
from specdec.serve.requests import ChatRequest, CompletionRequest


class Prompts:
    """Args: max_tokens: of one prompt, at most."""

    def __init__(self, tokenizer: Any, max_tokens: int):
        self._tokenizer, self._max_tokens = tokenizer, max_tokens
        self.has_template = has_template(tokenizer)

    def of_completion(self, body: CompletionRequest) -> list[list[int]]:
        """One or several prompts.

        Raises:
            Refusal: one that is too long, or empty where the model has no token to begin with.
        """
        given: Any = body.prompt
        several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        return [self._checked(self._encoded(one) if isinstance(one, str) else one, "prompt") for one in several]

    def of_chat(self, body: ChatRequest) -> list[int]:
        """The conversation in the model's own form, up to where its answer begins.

        Raises:
            Refusal: a model without a template, one that refuses the conversation, or one that is too long.
        """
        if not self.has_template:
            raise Refusal(400, "this model has no chat template: use /v1/completions", "messages", "no_chat_template")
        messages = [
            {"role": "system" if one.role == "developer" else one.role, "content": one.text} for one in body.messages
        ]
        self._refuse_longer(sum(len(one["content"]) for one in messages), "messages")
        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise Refusal(
                400, f"the model's chat template refuses this conversation: {error}", "messages", "invalid_messages"
            ) from None
        return self._checked(self._tokenizer(text, add_special_tokens=False).input_ids, "messages")

    def _encoded(self, text: str) -> list[int]:
        self._refuse_longer(len(text), "prompt")
        ids = list(self._tokenizer(text).input_ids)
        if ids:
            return ids
        start = self._tokenizer.bos_token_id
        if start is None:
            raise Refusal(400, "the prompt is empty, and this model has no token to begin with", "prompt")
        return [start]

    def _refuse_longer(self, characters: int, param: str) -> None:
        """What has so many characters that it cannot have few enough tokens need not be read at all."""
        if characters > 64 * self._max_tokens:
            raise self._too_long(f"{characters} characters", param)

    def _checked(self, ids: list[int], param: str) -> list[int]:
        if len(ids) > self._max_tokens:
            raise self._too_long(str(len(ids)), param)
        return ids

    def _too_long(self, got: str, param: str) -> Refusal:
        message = f"expected a prompt of at most {self._max_tokens} tokens, got {got}: shorten it"
        return Refusal(400, message, param, "context_length_exceeded")
