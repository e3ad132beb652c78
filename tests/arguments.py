"""Pools of `generate` arguments for the equality tests: processors, built in and users' own, and ways to stop."""

from __future__ import annotations

from typing import Any

import models
import torch
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers import models as token_models
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)


class AvoidLast(LogitsProcessor):
    """A user's processor that reads the prefix: lowers the last two tokens of each row."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_add(1, input_ids[:, -2:], torch.full_like(scores[:, :2], -1.5))


class ParityLaw(LogitsProcessor):
    """A user's processor that reads the whole prefix: allows only tokens of the parity of the prefix's sum."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        odd = input_ids.sum(1, keepdim=True) % 2
        wrong = torch.arange(scores.shape[1]) % 2 != odd
        return scores.masked_fill(wrong, -30.0)


class BiasPerRow(LogitsProcessor):
    """A user's processor that knows the rows of its batch by position."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        bias = torch.arange(input_ids.shape[0] * scores.shape[1]).view(input_ids.shape[0], -1) * 7 % 5
        return scores + bias.to(scores.dtype) / 2


def allowed_by_row(batch_id: int, prefix: Tensor) -> list[int]:
    """A `prefix_allowed_tokens_fn` that depends on the row and on the row's last token."""
    first = 3 + (batch_id + int(prefix[-1])) % 4
    return [models.EOS, *range(first, 32, 3)]


PROCESSORS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[5], [7, 9], [11, 12, 13], [20]]},
    {"min_new_tokens": 5},
    {"min_length": 9},
    {"prefix_allowed_tokens_fn": allowed_by_row},
    {"suppress_tokens": [4, 8, 15, 16, 23]},
    {"begin_suppress_tokens": [6, 10, 31]},
    {"sequence_bias": [[[5], 2.5], [[7, 8], -3.0], [[10, 11], 4.0]]},
    {"forced_eos_token_id": models.EOS},
    {"forced_bos_token_id": 9},
    {"exponential_decay_length_penalty": (2, 1.3)},
    {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 2},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
    {"logits_processor": LogitsProcessorList([AvoidLast()])},
    {"logits_processor": LogitsProcessorList([ParityLaw()])},
    {"logits_processor": LogitsProcessorList([BiasPerRow(), AvoidLast()])},
]


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


def processors() -> st.SearchStrategy[dict[str, Any]]:
    """One to three processors; a name drawn twice counts once."""
    return st.lists(st.sampled_from(PROCESSORS), min_size=1, max_size=3).map(_merge)


class TokenRule(StoppingCriteria):
    """A user's criterion on the last token, row by row."""

    def __init__(self, modulus: int):
        self.modulus = modulus

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids[:, -1] % self.modulus == 0


class PairRule(StoppingCriteria):
    """A user's criterion on the two last tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] < 2:
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)
        return (input_ids[:, -1] + input_ids[:, -2]) % 7 == 0


class LengthRule(StoppingCriteria):
    """A user's criterion on the number of columns."""

    def __init__(self, columns: int):
        self.columns = columns

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.columns)


def criteria() -> st.SearchStrategy[StoppingCriteriaList]:
    one = st.one_of(
        st.builds(TokenRule, st.integers(3, 11)), st.just(PairRule()), st.builds(LengthRule, st.integers(3, 14))
    )
    return st.lists(one, min_size=1, max_size=2).map(StoppingCriteriaList)


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer for `models.VOCAB` ids: three special tokens, letters, and runs of letters."""
    pieces = ["<pad>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f"), ("m", "n"), ("x", "y"), ("o", "p"), ("s", "t")]
    merges += [("q", "r"), ("u", "v"), ("g", "h"), ("i", "j")]
    pieces += ["".join(pair) for pair in merges]
    assert len(pieces) == models.VOCAB
    core = Tokenizer(token_models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
