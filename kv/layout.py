"""Where a pass reads and writes, for kernels that follow addresses themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from specdec.kv.errors import CacheStateError


class Layout(NamedTuple):
    """The storage of one pass. In elements: slot `s` of row `b` lies at
    `table[b, s // page_size] * page_stride + s % page_size * slot_stride`, plus `head * head_stride`.

    keys, values: the whole storage, one tensor a layer. strides: page_size, page_stride, slot_stride, head_stride.
    table: int64 `[rows, pages]`.
    targets: int64 `[rows * width]`, where each new token is written, -1 for nowhere; None: to its slot.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    strides: tuple[int, int, int, int]
    table: torch.Tensor
    targets: torch.Tensor | None = None


def check_layout(storage: Sequence[torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Storage holds what wrote first, a caller's cache for one; addresses say nothing of it, so it is looked at here.

    Raises:
        CacheStateError: tensors of another dtype or shape than the model that is about to read them.
    """
    for tensor in storage:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise CacheStateError(
                f"expected K/V of shape {shape} in {dtype}, as the model's own, the cache holds "
                f"{tuple(tensor.shape)} in {tensor.dtype}: was it written by another model?"
            )
