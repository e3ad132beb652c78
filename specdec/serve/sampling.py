"""From a request's fields to what the engine is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import LogitsProcessorList, StoppingCriteriaList

from specdec.engine import Params
from specdec.serve.errors import Refusal
from specdec.serve.options import ServeOptions
from specdec.serve.processors import Biases, CountPenalties, StopTexts
from specdec.serve.requests import ChatRequest, Generation

TEMPERATURE = 1.0
"""OpenAI's; whatever the model's own settings say."""
COLDEST = 1e-4
"""Below it float32 logits would overflow; the likeliest token has all of the mass long before."""
COMPLETION_TOKENS = 16
"""OpenAI's limit of a completion that names none."""
_SEEDS = 2**62


@dataclass(frozen=True)
class Sampling:
    """Makes the engine's parameters.

    Args:
        most: tokens that prompt and answer may have together. rule: how drafts are judged.
        bos: the model's own; drafters: names a request may draft by; vocab: number of token ids.
    """

    options: ServeOptions
    tokenizer: Any
    most: int
    drafters: Sequence[str]
    vocab: int
    rule: str = "auto"

    def params(self, body: Generation, prompt_length: int, index: int) -> Params:
        """Of the text number `index` of a request. Texts of one seeded request have seeds that follow each other.

        Raises:
            Refusal: a drafter or token that is not there, or more tokens than fit.
        """
        if body.draft is not None and body.draft not in self.drafters:
            raise Refusal(400, f"draft: expected one of {list(self.drafters)}, got {body.draft!r}", "draft")
        arguments: dict[str, Any] = {"max_new_tokens": self._limit(body, prompt_length), **_law(body)}
        if body.ignore_eos:
            arguments |= {"eos_token_id": None}
        if processors := self._processors(body, prompt_length):
            arguments["logits_processor"] = LogitsProcessorList(processors)
        if body.stops:
            criteria = [StopTexts(self.tokenizer, body.stops, prompt_length)]
            arguments["stopping_criteria"] = StoppingCriteriaList(criteria)
        return Params(
            seed=None if body.seed is None else (body.seed + index) % _SEEDS,
            draft=body.draft,
            rule=self.rule,
            timeout=self.options.request_seconds,
            logprobs=body.num_alternatives,
            arguments=arguments,
        )

    def _limit(self, body: Generation, prompt_length: int) -> int:
        room = min(self.options.max_new_tokens, self.most - prompt_length)
        if room < 1:
            message = f"expected a prompt of less than {self.most} tokens, got {prompt_length}: shorten it"
            raise Refusal(400, message, "prompt", "context_length_exceeded")
        if body.limit is None:
            return min(room, self.options.default_new_tokens if isinstance(body, ChatRequest) else COMPLETION_TOKENS)
        if body.limit > room:
            message = (
                f"expected at most {room} new tokens behind a prompt of {prompt_length} (the server's limit is "
                f"{self.options.max_new_tokens}, prompt and answer have {self.most} together), got {body.limit}"
            )
            raise Refusal(400, message, "max_tokens", "context_length_exceeded")
        return body.limit

    def _processors(self, body: Generation, prompt_length: int) -> list[Any]:
        made: list[Any] = []
        presence, frequency = body.presence_penalty or 0.0, body.frequency_penalty or 0.0
        if presence or frequency:
            made.append(CountPenalties(prompt_length, presence, frequency))
        if body.logit_bias:
            biases = {int(token): value for token, value in body.logit_bias.items()}
            if unknown := [token for token in biases if token >= self.vocab]:
                raise Refusal(
                    400, f"logit_bias: expected tokens in 0..{self.vocab - 1}, got {unknown[0]}", "logit_bias"
                )
            made.append(Biases(biases))
        return made


def _law(body: Generation) -> dict[str, Any]:
    """Arguments of `generate` that decide the law; none is left to the model's own settings."""
    penalty = 1.0 if body.repetition_penalty is None else body.repetition_penalty
    law: dict[str, Any] = {"repetition_penalty": penalty}
    temperature = TEMPERATURE if body.temperature is None else body.temperature
    if temperature < COLDEST:
        return {**law, "do_sample": False}
    return {
        **law,
        "do_sample": True,
        "temperature": temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "top_k": max(0, body.top_k or 0),
        "min_p": body.min_p or None,
    }
