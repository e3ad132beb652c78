"""Arguments that make no sense, or that cannot be honoured: the answer is plain `generate`'s, or a clear error."""

from __future__ import annotations

from typing import Any

import torch

from fuzz.call import Fresh
from fuzz.callbacks import AvoidsLast
from specdec.kv.versions import CACHE_KEYWORD

NAN = float("nan")


def _fresh(text: str, make: Any) -> Fresh:
    return Fresh(text, lambda log: make())


_IDS = torch.tensor([[5, 6, 7, 8]])
_NO_WORDS: tuple[Any, ...] = ([], [[]], [[999]], [5], [[-1]], "x")
_NO_BIASES: tuple[Any, ...] = ({}, [[[999], 1.0]], [[[5], "x"]], {(5,): 1.5}, [])
_NO_TREES: tuple[Any, ...] = ((), (0,), (-1, 2), "x", 3, [[5]], [[]], (40, 40, 40, 40), (2.5,))

ARGUMENTS: list[dict[str, Any]] = [
    *({"temperature": value, "do_sample": True} for value in (-1.0, 0.0, NAN, "hot")),
    *({"top_k": value, "do_sample": True} for value in (-3, 1.5, "x")),
    *({"top_p": value, "do_sample": True} for value in (2.0, -0.5, NAN, "x")),
    *({"min_p": value, "do_sample": True} for value in (2, -0.5)),
    *({"max_new_tokens": value} for value in (0, -1, NAN, "5", 2.5, None)),
    *({"max_length": value} for value in (1, 0, -5, "long")),
    *({"min_new_tokens": value} for value in (30, -2, "few")),
    *({"eos_token_id": value} for value in (999, -1, "eos", [], [[2]], 2.5)),
    *({"pad_token_id": value} for value in (-1, 999, "pad", None)),
    *({"bad_words_ids": value} for value in _NO_WORDS),
    *({"sequence_bias": value} for value in _NO_BIASES),
    *({"suppress_tokens": value} for value in ([999], [-1], "x", [], list(range(41)))),
    *({"begin_suppress_tokens": value} for value in ([999], [])),
    *({"forced_bos_token_id": value} for value in (999, "x")),
    *({"forced_eos_token_id": value} for value in (999, [3, 4], "x")),
    *({"repetition_penalty": value} for value in (0, -1.0, NAN, "x", 1)),
    *({"no_repeat_ngram_size": value} for value in (-1, "x", 1.5)),
    *({"exponential_decay_length_penalty": value} for value in ((2,), (2, "x"), (-1, 1.1), (2, NAN))),
    *({"num_return_sequences": value} for value in (0, -1, "x", 1)),
    *({"num_beams": value} for value in (2, 0, -1, "x")),
    *({"logits_processor": value} for value in ([None], "x", [3], [_fresh("lambda", lambda: lambda ids, s: s)])),
    {"logits_processor": Fresh("AvoidsLast(), no list", lambda log: AvoidsLast(log, "AvoidsLast"))},
    *({"stopping_criteria": value} for value in ([3], "x", [_fresh("lambda", lambda: lambda ids, s, **k: False)])),
    {"stopping_criteria": [_fresh("lambda: True", lambda: lambda ids, scores, **kwargs: True)]},
    {"stopping_criteria": [_fresh("lambda: None", lambda: lambda ids, scores, **kwargs: None)]},
    {"logits_processor": [_fresh("lambda: None", lambda: lambda ids, scores: None)]},
    {"logits_processor": [_fresh("lambda: too few", lambda: lambda ids, scores: scores[:, :3])]},
    {"logits_processor": [_fresh("lambda: NaN", lambda: lambda ids, scores: scores * NAN)]},
    *({"prefix_allowed_tokens_fn": value} for value in (3, "x", _fresh("lambda: None", lambda: lambda b, s: None))),
    {"prefix_allowed_tokens_fn": _fresh("lambda: [999]", lambda: lambda b, s: [999])},
    {"prefix_allowed_tokens_fn": _fresh("lambda: 'x'", lambda: lambda b, s: "x")},
    *({"streamer": value} for value in (3, "x")),
    *({"stop_strings": value} for value in ("a", [], [3], 3)),
    {"max_tokens": 3},
    {"temprature": 0.5},
    {"labels": torch.tensor([[1]])},
    {"draft": "ngram"},
    {"k": 3},
    {"use_cache": False},
    {"use_cache": "x"},
    {"cache_implementation": "static"},
    {"cache_implementation": "dynamic"},
    {"cache_implementation": "x"},
    {CACHE_KEYWORD: 3},
    {CACHE_KEYWORD: "x"},
    {CACHE_KEYWORD: ()},
    {"return_dict_in_generate": True, "output_attentions": True},
    {"return_dict_in_generate": True, "output_hidden_states": True},
    {"output_hidden_states": True},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"guidance_scale": 1.5},
    {"prompt_lookup_num_tokens": 3},
    {"token_type_ids": torch.zeros(1, 4, dtype=torch.int64)},
    {"position_ids": torch.tensor([[0, 1, 2, 3]])},
    {"position_ids": torch.tensor([[3, 4, 5, 6]])},
    {"inputs_embeds": torch.zeros(1, 2, 32, dtype=torch.float64)},
    {"generation_config": {"max_new_tokens": 3}},
    {"generation_config": 3},
    {"max_time": -1.0},
    {"synced_gpus": True},
    {"assistant_model": 3},
    {"do_sample": "x"},
    {"watermarking_config": {"greenlist_ratio": 0.5}},
    {"compile_config": 3},
    {"prefill_chunk_size": 0},
    *({"input_ids": value} for value in (
        None, 3, [[5, 6, 7]], "text", _IDS.double(), _IDS[0], _IDS[:, :0], _IDS[None], _IDS + 90, -_IDS, _IDS.bool(),
        _IDS.to(torch.int16), _IDS.to(torch.uint8),
    )),
    *({"attention_mask": value} for value in (
        None, 3, "x", torch.ones(1, 2), torch.ones(4), torch.zeros(1, 4), torch.tensor([[1, 1, 1, 0]]),
        torch.tensor([[1, 0, 1, 1]]), torch.ones(1, 1, 4, 4), torch.full((1, 4), NAN), torch.full((1, 4), 2),
    )),
]  # fmt: skip
"""These prompts and masks fit a call of one row with four tokens."""

OPTIONS: list[dict[str, Any]] = [
    *({"k": value} for value in (0, -1, "x", 2.5, True, 10**6)),
    *({"tree": value} for value in _NO_TREES),
    *({"rule": value} for value in ("x", None, 3, "typical", "block", "budget_flow", "traversal")),
    *({"exactness": value} for value in ("x", None, 1)),
    *({"strict_width": value, "exactness": "strict"} for value in (0, -1, "x", 2**31)),
    {"strict_width": 8},
    *({"cache": value} for value in ("x", None)),
    *({"page_size": value, "cache": "paged"} for value in (0, -1, "x", 2.5, 10**7)),
    {"page_size": 4},
    {"monitor": "x"},
    {"lossy": "x", "rule": "typical"},
    {"colour": "red"},
    {"k": 3, "tree": (2, 2)},
]
