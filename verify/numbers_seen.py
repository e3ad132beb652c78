"""What a look at a tensor sees of its numbers, past torch's counts of writes: all of them, or some of every row and of
every column."""

from __future__ import annotations

import torch
from torch import Tensor

_LINE = 64
"""Bytes that memory brings in at once."""
_SMALL = 1 << 12
"""Tensors of up to so many numbers are looked at as a whole."""
_STRIDE = 2039
"""A prime: what lies below each other in a weight goes to different sums."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes: what numbers of that width are looked at as, which NaN has too."""


class Sampled:
    """A line of each row, in the next row at other columns, so that all of them come in turn (where there are as many
    lines of rows). What is written to a row or a column or over a block shows in it; single numbers may not. A weight
    of 576 columns is looked at in a 36th of the time that it takes to read it.

    Args:
        tensor: its address and shape are taken for granted from then on.
    """

    __slots__ = ("_known", "_view")

    def __init__(self, tensor: Tensor):
        self._view = _lines(tensor.detach())
        self._known = self._look().clone()

    def same(self) -> bool:
        """Are the numbers that were seen when this was made the same?"""
        return torch.equal(self._look(), self._known)

    def _look(self) -> Tensor:
        """Sums column by column, of a few numbers themselves: one sum over all would not see a change of every sign."""
        return self._view if self._view.numel() <= _SMALL else self._view.sum(0, dtype=torch.int64)


class Summed:
    """Every number, as sums of the bits of those that lie `_STRIDE` apart: whatever is written to one of them shows, to
    a row, to a part of one or to a column. Sums of rows would not see two columns exchanged, nor two signs changed.

    Args:
        weight: float32, contiguous; its address and shape are taken for granted from then on.
    """

    __slots__ = ("_known", "_parts")

    def __init__(self, weight: Tensor):
        flat = weight.detach().view(-1)
        pairs = len(flat) % 2 == 0 and flat.storage_offset() % 2 == 0  # half as many numbers to add
        flat = flat.view(torch.int64 if pairs else torch.int32)
        whole = len(flat) // _STRIDE * _STRIDE
        self._parts = flat[:whole].view(-1, _STRIDE), flat[whole:]
        self._known = self._look().clone()

    def same(self) -> bool:
        """Are the numbers those that they were when this was made?"""
        return torch.equal(self._look(), self._known)

    def _look(self) -> Tensor:
        lines, rest = self._parts
        return torch.cat([lines.sum(0, dtype=torch.int64), rest.long()])


def _lines(tensor: Tensor) -> Tensor:
    """Some numbers of a tensor as integers of their width, which NaN has too: a view."""
    kind = INTEGERS.get(tensor.element_size())
    if kind is None or tensor.layout != torch.strided or tensor.is_complex():
        return torch.empty(0)
    numbers, line = tensor.view(kind), _LINE // tensor.element_size()
    width = tensor.shape[-1] if tensor.dim() else 1
    if not tensor.is_contiguous() or tensor.numel() <= _SMALL or width <= 2 * line:
        return numbers
    step = width - line  # less than a row, so that no row is left out
    return numbers.as_strided((1 + (tensor.numel() - line) // step, line), (step, 1), tensor.storage_offset())
