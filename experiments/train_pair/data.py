"""The order in which the corpus is read: a pure function of the recipe's seed and the step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def encode_files(tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """One int32 tensor of ids per text, each ending with the end-of-text id."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [torch.tensor([*encoding.ids, tokenizer.eos_token_id], dtype=torch.int32) for encoding in encodings]


class WindowStream:
    """Windows of a shuffled concatenation of files, epoch after epoch.

    Each epoch joins the files in a new order, starts at a new phase, cuts windows of `length` tokens and shuffles
    them. A step reads the next few windows, so every token is read once per epoch whatever the step's own length.

    >>> stream = WindowStream([torch.arange(10), torch.arange(10, 20)], length=4, seed=0)
    >>> stream.windows(first=0, num=2).shape
    torch.Size([2, 4])
    """

    def __init__(self, files: Sequence[Tensor], length: int, seed: int):
        self.files, self.length, self.seed = list(files), length, seed
        self.num_tokens = sum(len(ids) for ids in self.files)
        # One window less than fits leaves room for the random phase.
        self.windows_per_epoch = self.num_tokens // length - 1
        if self.windows_per_epoch < 1:
            raise ValueError(f"expected at least {2 * length} tokens, got {self.num_tokens}; give more text")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def _make_epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.files), generator=generator).tolist()
        joined = torch.cat([self.files[i] for i in order])
        phase = int(torch.randint(self.length, (1,), generator=generator))
        used = joined[phase : phase + self.windows_per_epoch * self.length]
        shuffle = torch.randperm(self.windows_per_epoch, generator=generator)
        return used.view(-1, self.length)[shuffle]

    def windows(self, first: int, num: int) -> Tensor:
        """ids[num, length], int64: windows `first` to `first + num` of the endless stream."""
        rows = []
        for index in range(first, first + num):
            epoch, row = divmod(index, self.windows_per_epoch)
            rows.append(self._epoch(epoch)[row])
        return torch.stack(rows).long()

    def batch(self, step: int, tokens_per_step: int, length: int) -> Tensor:
        """ids[tokens_per_step / length, length] of step `step`; `length` must divide the stream's own."""
        per_step = tokens_per_step // self.length
        return self.windows(step * per_step, per_step).view(-1, length)
