"""Arguments of `generate` that make sense: each entry is one thing a user would pass."""

from __future__ import annotations

from typing import Any

import arguments
import models
from transformers import GenerationConfig

from fuzz.call import Fresh
from fuzz.callbacks import (
    PREFIXES,
    PROCESSORS,
    STOPS,
    criterion,
    prefix_function,
    processor,
    pure_criterion,
    pure_prefix_function,
    streamer,
)

LENGTHS: list[dict[str, Any]] = [
    {"max_new_tokens": 1}, {"max_new_tokens": 2}, {"max_new_tokens": 9}, {"max_new_tokens": 17},
    {"max_length": 25}, {"max_length": 14}, {"min_new_tokens": 4}, {"min_length": 9},
]  # fmt: skip
ENDS: list[dict[str, Any]] = [
    {"eos_token_id": None}, {"eos_token_id": 29}, {"eos_token_id": [2, 5, 9, 17, 23]},
    {"eos_token_id": [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]}, {"eos_token_id": 7, "pad_token_id": 7},
    {"pad_token_id": 3},
]  # fmt: skip
KNOWN: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4}, {"repetition_penalty": 0.8}, {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[5], [7, 9], [11, 12, 13], [20]]},
    {"suppress_tokens": [4, 8, 15, 16, 23]}, {"begin_suppress_tokens": [6, 10, 31]},
    {"sequence_bias": [[[5], 2.5], [[7, 8], -3.0], [[10, 11], 4.0]]}, {"forced_eos_token_id": models.EOS},
    {"forced_bos_token_id": 9}, {"exponential_decay_length_penalty": (2, 1.3)}, {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 2}, {"remove_invalid_values": True}, {"renormalize_logits": True},
]  # fmt: skip
WARPERS: list[dict[str, Any]] = [
    {"temperature": 0.6}, {"temperature": 3.0}, {"top_k": 3}, {"top_k": 0}, {"top_p": 0.6}, {"min_p": 0.1},
    {"typical_p": 0.7}, {"epsilon_cutoff": 0.02}, {"eta_cutoff": 0.02}, {"top_k": 0, "temperature": 1.7},
]  # fmt: skip
RETURNS: list[dict[str, Any]] = [
    {"return_dict_in_generate": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"return_dict_in_generate": True, "output_logits": True},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"output_scores": True},
]
OTHERS: list[dict[str, Any]] = [
    {"prefill_chunk_size": 2},
    {"num_return_sequences": 2},
    {"use_cache": True},
    {"generation_config": Fresh("GenerationConfig(...)", lambda log: _config())},
    {"max_time": 1000.0},
    {"token_type_ids": None},
    {"logits_to_keep": 1},
]


def _config() -> GenerationConfig:
    return GenerationConfig(repetition_penalty=1.3, eos_token_id=[2, 11], pad_token_id=0)


STOP_STRINGS: list[dict[str, Any]] = [
    {"stop_strings": strings, "tokenizer": Fresh("tokenizer()", lambda log: arguments.tokenizer())}
    for strings in (["a", "b", "c"], "ab", ["de", "m", "zz"])
]
CALLBACKS: list[dict[str, Any]] = [
    *({"logits_processor": [processor(kind)]} for kind in PROCESSORS),
    *({"logits_processor": [processor(first), processor(second)]} for first, second in zip(
        PROCESSORS[:8], PROCESSORS[1:8] + PROCESSORS[:1], strict=True)),
    *({"stopping_criteria": [criterion(name)]} for name in STOPS),
    {"stopping_criteria": [criterion("token%5"), criterion("columns>=9")]},
    {"stopping_criteria": [pure_criterion("token%5"), pure_criterion("columns>=9")]},
    {"stopping_criteria": [pure_criterion("pair%7")]},
    *({"prefix_allowed_tokens_fn": prefix_function(name)} for name in PREFIXES),
    *({"prefix_allowed_tokens_fn": pure_prefix_function(name)} for name in ("by row", "nothing later")),
]  # fmt: skip
STREAMERS: list[dict[str, Any]] = [{"streamer": streamer()}, {"streamer": streamer()}, {"streamer": streamer(fails=3)}]

SENSIBLE = (LENGTHS, LENGTHS, ENDS, ENDS, KNOWN, KNOWN, RETURNS, CALLBACKS, CALLBACKS, STREAMERS, OTHERS, STOP_STRINGS)
"""A call draws from some of these pools; what sampling needs comes from WARPERS."""
