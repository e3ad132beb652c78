"""The prompts of a check: the caller's, or a few short texts of different kinds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specdec.kv import UnsupportedArgumentError

DEFAULT_PROMPTS = (
    "def parse_args(argv=None):\n    ",
    "The capital of France is",
    "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        ",
    "User: Why is the sky blue?\nAssistant:",
)
RANDOM_TOKENS = 12
"""Length of the random prompts that are used where there is no tokenizer."""


def encode_prompts(
    prompts: Sequence[str | Sequence[int] | Tensor] | None, tokenizer: Any, vocab: int, seed: int, device: torch.device
) -> list[Tensor]:
    """Each prompt as int64 `[1, tokens]` on `device`.

    Args:
        prompts: texts (these need the tokenizer), token ids, or tensors of them; None takes DEFAULT_PROMPTS with a
            tokenizer and random ids without one.

    Raises:
        UnsupportedArgumentError: a text without a tokenizer, an empty prompt, ids outside the vocabulary.
    """
    if prompts is None and tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocab, (1, RANDOM_TOKENS), generator=generator).to(device) for _ in range(3)]
    if isinstance(prompts, str) or (prompts is not None and len(prompts) == 0):
        raise UnsupportedArgumentError(f"prompts: expected a list of at least one prompt, got {prompts!r}")
    return [_encode(prompt, tokenizer, vocab, device) for prompt in prompts or DEFAULT_PROMPTS]


def _encode(prompt: str | Sequence[int] | Tensor, tokenizer: Any, vocab: int, device: torch.device) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise UnsupportedArgumentError("prompts: a text needs the tokenizer: pass tokenizer=, or give token ids")
        prompt = tokenizer(prompt).input_ids
    ids = torch.as_tensor(prompt, dtype=torch.int64).reshape(1, -1)
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise UnsupportedArgumentError(f"prompts: expected at least one token id in 0..{vocab - 1}, got {ids.tolist()}")
    return ids.to(device)
