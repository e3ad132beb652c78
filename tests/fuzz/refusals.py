"""Refusals that are documented: where plain `generate` works, ours may say no only for one of these reasons."""

from __future__ import annotations

import re
from typing import NamedTuple

from fuzz.call import Call
from specdec import SpecdecError
from specdec.kv.versions import CACHE_KEYWORD


class Refusal(NamedTuple):
    """pattern: of the message, which names what is refused. given: arguments or options, one of which the call must
    have for this. why: what is documented."""

    pattern: str
    given: tuple[str, ...]
    why: str


A_CACHE = "a cache"
"""Stands for a caller's cache with tokens in it, which is no argument of its own here."""
_TEXT_ONLY = ("token_type_ids", "inputs_embeds", "labels", "draft", "k")
_SCORING = (
    "logits_processor", "exponential_decay_length_penalty", "repetition_penalty", "temperature", "sequence_bias",
    "top_p",
)  # fmt: skip
_NOT_FOR_ENGINES = (
    "attention_mask", "inputs", "num_return_sequences", CACHE_KEYWORD, "return_dict_in_generate", "streamer",
)  # fmt: skip
REFUSALS = (
    Refusal(r"num_beams", ("num_beams",), "beams share no single text to draft for"),
    Refusal(r"generation mode", ("num_beams", "penalty_alpha", "assistant_model"), "not verified token by token"),
    Refusal(r"prefill_chunk_size", ("prefill_chunk_size",), "chunks of no token"),
    Refusal(r"use_cache", ("use_cache",), "drafts are verified on a K/V cache"),
    Refusal(r"prompt_lookup_num_tokens", ("prompt_lookup_num_tokens",), "another drafter"),
    Refusal(r"guidance_scale", ("guidance_scale",), "its processor runs the model itself"),
    Refusal(
        r"output_attentions|output_hidden_states",
        ("output_attentions", "output_hidden_states"),
        "not collected from tree passes",
    ),
    Refusal(r"synced_gpus|assistant_model", ("synced_gpus", "assistant_model"), "other ways to drive a model"),
    Refusal(r"not taken by an engine", _NOT_FOR_ENGINES, "engines return tokens and counts, and keep K/V themselves"),
    Refusal(r"cache_implementation", ("cache_implementation",), "caches that cannot be rolled back"),
    Refusal(r"position_ids", ("position_ids",), "a token's cache slot is its position"),
    Refusal(rf"{CACHE_KEYWORD} with num_return", ("num_return_sequences",), "repeat the prompt and cache first"),
    Refusal(rf"{CACHE_KEYWORD}|cache", (CACHE_KEYWORD,), "a cache that cannot be continued"),
    Refusal(rf"{CACHE_KEYWORD}.*dropped tokens", (A_CACHE,), "what a window dropped cannot be rolled back"),
    Refusal(r"attention_mask|position_ids", ("input_ids",), "a mask that is longer than its prompt"),
    Refusal(r"attention_mask", ("attention_mask",), "masks with holes, on the right, or of another shape"),
    Refusal(r"model inputs|token_type_ids|inputs_embeds|prompt", (*_TEXT_ONLY, "input_ids"), "only text has drafts"),
    Refusal(r"rule", ("rule",), "a rule that cannot take what is proposed, or must ask processors about drafts"),
    Refusal(r"k\b", ("k",), "lengths that cannot be served"),
    Refusal(r"tree|branch|children|token", ("tree",), "trees that cannot be served"),
    Refusal(r"exactness|strict_width", ("exactness", "strict_width"), "modes that are none"),
    Refusal(r"cache|page_size", ("cache", "page_size"), "layouts that are none"),
    Refusal(r"monitor", ("monitor",), "no monitor"),
    Refusal(r"lossy", ("lossy",), "no flag"),
    Refusal(r"NaN in|NaN", _SCORING, "of NaN none is the largest"),
    Refusal(r"expected a whole number", ("max_new_tokens", "max_length"), "texts end after whole tokens"),
    Refusal(r"logits processor .*: expected it to return scores", ("logits_processor",), "scores of another shape"),
    Refusal(r"forced_\w+_token_id", ("forced_eos_token_id", "forced_bos_token_id"), "no such id, found late or never"),
    Refusal(r"streamer", ("streamer",), "no streamer"),
)


def documented(call: Call, error: BaseException) -> bool:
    """Is this refusal one of the list? It is ours, its message names what it refuses, and the call has that."""
    given = {*call.arguments, *call.options, *([A_CACHE] if call.cached else [])}
    if isinstance(error, TypeError):  # Python's own answer to an option that there is not
        return any(f"unexpected keyword argument {name!r}" in str(error) for name in call.options)
    return isinstance(error, SpecdecError) and any(
        re.search(entry.pattern, str(error)) and given.intersection(entry.given) for entry in REFUSALS
    )
