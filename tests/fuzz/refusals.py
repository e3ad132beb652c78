"""Refusals that are documented: where plain `generate` works, ours may say no only for one of these reasons."""

from __future__ import annotations

import re
from typing import NamedTuple

from fuzz.call import Call
from specdec import SpecdecError


class Refusal(NamedTuple):
    """pattern: of the message, which names the argument; why: what is documented."""

    pattern: str
    why: str


REFUSALS = (
    Refusal(r"num_beams|generation mode", "beams share no single text to draft for"),
    Refusal(r"prefill_chunk_size", "chunks of no token"),
    Refusal(r"use_cache=False", "drafts are verified on a K/V cache"),
    Refusal(r"prompt_lookup_num_tokens", "another drafter"),
    Refusal(r"guidance_scale", "its processor runs the model itself"),
    Refusal(r"token_healing", "it rewrites the prompt with the model"),
    Refusal(r"output_attentions|output_hidden_states", "not collected from tree passes"),
    Refusal(r"synced_gpus|assistant_model|custom_generate", "other ways to drive a model"),
    Refusal(r"cache_implementation", "caches that cannot be rolled back"),
    Refusal(r"position_ids: only consecutive", "a token's cache slot is its position"),
    Refusal(r"past_key_values with num_return_sequences", "repeat the prompt and cache first"),
    Refusal(r"past_key_values", "a cache that cannot be continued"),
    Refusal(r"attention_mask", "masks with holes, on the right, or of another shape"),
    Refusal(r"model inputs \[", "only text prompts can be drafted for"),
    Refusal(r"expected a prompt of at least one token", "there is nothing to go on from"),
    Refusal(r"^rule\b|rule=|rule '|rule: ", "a rule that cannot take what the drafter proposes"),
    Refusal(r"not taken by an engine|stop_strings needs the tokenizer", "arguments that belong elsewhere"),
    Refusal(r"^(prompt|draft|k|tree|exactness|strict_width|cache|page_size|monitor|lossy)\b", "options of ours"),
    Refusal(r"^k and tree|expected k or tree|expected a chain length", "options of ours"),
    Refusal(r"NaN in its logits|NaN in", "of NaN none is the largest"),
    Refusal(r"^max_new_tokens, max_length: expected a whole number", "texts end after whole tokens"),
    Refusal(r"^seed", "one seed, or one per row"),
    Refusal(r"logits processor .*: expected it to return scores", "scores of another shape or type"),
)


def documented(call: Call, error: BaseException) -> bool:
    """Is this refusal one of the list? It must be ours, and its message must name what it refuses."""
    return isinstance(error, SpecdecError) and any(re.search(entry.pattern, str(error)) for entry in REFUSALS)
