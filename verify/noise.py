"""Stateless, counter-based randomness: one pure function from (seed, request, step, role, index) to a uniform.

Philox-4x32-10 (Salmon et al., SC'11) in int64 tensor arithmetic, so that it runs the same on every device. No
generator state exists, hence no noise can be consumed twice by accident: two draws are equal only if their whole
key is equal, and every (role, index) of a step is consumed at most once.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


class Role(IntEnum):
    """What a uniform is used for. Different roles never share noise."""

    DRAFT = 0
    ACCEPT = 1
    RESIDUAL = 2
    COUPLED = 3


class Noise(NamedTuple):
    """The uniforms in [0, 1) one acceptance step may use.

    accept: float64 `[rows, nodes]`, one per tree node (index 0 = the root's own coin).
    residual: float64 `[rows]`, for the recovered or bonus token.
    race: float64 `[rows, depths, vocab]` or None; only for rules that ask for it (`uses_race`): row `d` holds the
        exponential noise of the position that follows a node of depth `d` (see `specdec.verify.race`).
    """

    accept: Tensor
    residual: Tensor
    race: Tensor | None = None


def uniform(seed: Tensor | int, request: Tensor | int, step: Tensor | int, role: int, index: Tensor) -> Tensor:
    """Uniforms in [0, 1) with 52 random bits, float64, shape of the broadcast arguments.

    52, not 53: the largest is then 1 - 2^-52, and `u * total` is below `total` after rounding, whatever the total is.

    Args:
        seed: 64-bit key, int or int64 tensor.
        request, step, role, index: the four 32-bit counter words.

    Example: `uniform(7, 0, 0, Role.ACCEPT, torch.arange(5))` is the same five numbers on every machine.
    """
    words = _philox(seed, request, step, role, index)
    return _unit(words[0], words[1])


def uniform_pairs(
    seed: Tensor | int, request: Tensor | int, step: Tensor | int, role: int, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Two independent `uniform`s per key from one evaluation; the first is `uniform` of the same key."""
    words = _philox(seed, request, step, role, index)
    return _unit(words[0], words[1]), _unit(words[2], words[3])


def _philox(
    seed: Tensor | int, request: Tensor | int, step: Tensor | int, role: int, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four 32-bit output words of Philox-4x32-10, int64, shape of the broadcast arguments."""
    device = index.device
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in (index, step, request, role, seed)]
    c0, c1, c2, c3, _ = torch.broadcast_tensors(*words)
    k0, k1 = words[4] & _MASK, (words[4] >> 32) & _MASK
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all bits of 32x32. Words 1 and 3 are only XORed in the next
        # round: their high halves need not be cleared.
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _unit(high: Tensor, low: Tensor) -> Tensor:
    """52 bits of two words as float64 in [0, 1)."""
    return ((high >> 6) * (1 << 26) + (low >> 6)).to(torch.float64) * (2.0**-52)


class NoiseStream:
    """All uniforms of one batch, computed in blocks of steps (a pure function may be tabulated).

    Args:
        seeds, requests: per row, its key. A row's noise does not depend on the rows around it.
    """

    BLOCK = 128
    """Steps tabulated at once for a few rows: one kernel launch sequence then serves that many steps."""
    BLOCK_ENTRIES = 1024
    """Rows times steps of a table; large batches tabulate fewer steps, down to one."""

    def __init__(self, seeds: Sequence[int], requests: Sequence[int], device: torch.device):
        self._seeds = torch.tensor([signed(seed) for seed in seeds], dtype=torch.int64, device=device)
        self._requests = torch.tensor(list(requests), dtype=torch.int64, device=device)
        self._device = device
        self._block = max(1, min(self.BLOCK, self.BLOCK_ENTRIES // max(1, len(seeds))))
        self._tables: dict[Role, _Table] = {}

    def join(self, row: int, seed: int, request: int = 0) -> None:
        """From now on `row` (a new one, or one that left) draws under this key."""
        short = row + 1 - len(self._seeds)
        if short > 0:
            self._seeds, self._requests = (
                torch.nn.functional.pad(words, (0, short)) for words in (self._seeds, self._requests)
            )
        self._seeds[row], self._requests[row] = signed(seed), request
        for table in self._tables.values():
            table.forget(row)

    def draft(self, rows: Sequence[int], step: int | Sequence[int], count: int) -> Tensor:
        """Float64 `[rows, count]`: what the drafter may sample with at this step."""
        return self._get(Role.DRAFT, rows, step, count)

    def accept(self, rows: Sequence[int], step: int | Sequence[int], nodes: int) -> Noise:
        """What the acceptance rule may use at this step.

        Args:
            rows: indices into the batch; step: the number of the step, for all rows or one for each of them.
        """
        residual = self._get(Role.RESIDUAL, rows, step, 1)[:, 0]
        return Noise(self._get(Role.ACCEPT, rows, step, nodes), residual)

    def _get(self, role: Role, rows: Sequence[int], step: int | Sequence[int], count: int) -> Tensor:
        table = self._tables.get(role)
        if table is None or table.values.shape[2] < count:
            width = max(8, 1 << (count - 1).bit_length())
            table = self._tables[role] = _Table(torch.empty(0, self._block, width, device=self._device).double())
        if isinstance(step, int) and table.whole == step // self._block and rows == table.order:
            # Nobody has finished, nobody joined, and all is there: a view.
            return table.values.select(1, step % self._block).narrow(1, 0, count)
        steps = [step] * len(rows) if isinstance(step, int) else list(step)
        blocks = [own // self._block for own in steps]
        new = [(row, block) for row, block in zip(rows, blocks, strict=True) if table.blocks.get(row) != block]
        if new:
            self._tabulate(table, role, new)
        return table.values[list(rows), [own % self._block for own in steps], :count]

    def _tabulate(self, table: _Table, role: Role, new: Sequence[tuple[int, int]]) -> None:
        """Evaluate the given blocks of the given rows."""
        rows, first = torch.tensor(new, device=self._device).T
        steps = (first * self._block)[:, None] + torch.arange(self._block, device=self._device)
        index = torch.arange(table.values.shape[2], device=self._device)
        seeds, requests = self._seeds[rows, None, None], self._requests[rows, None, None]
        values = uniform(seeds, requests, steps[:, :, None], role, index)
        short = len(self._seeds) - len(table.values)
        if short > 0:
            table.values = torch.nn.functional.pad(table.values, (0, 0, 0, 0, 0, short))
        table.values[rows] = values
        table.hold(new)


class _Table:
    """Uniforms of one role, float64 `[rows, block of steps, width]`; `blocks[row]` says which steps a row's are of.

    order: all rows in order. whole: the one block that all of them hold, None where they differ.
    """

    def __init__(self, values: Tensor):
        self.values = values
        self.blocks: dict[int, int] = {}
        self.order: list[int] = []
        self.whole: int | None = None

    def hold(self, new: Sequence[tuple[int, int]]) -> None:
        self.blocks.update(new)
        self.order = list(range(len(self.values)))
        held = {self.blocks.get(row) for row in self.order}
        self.whole = held.pop() if len(held) == 1 else None

    def forget(self, row: int) -> None:
        self.blocks.pop(row, None)
        self.whole = None


def signed(seed: int) -> int:
    """A Python int as the int64 with the same low 64 bits."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed
