"""Angles of rotary positions: tables of cosines and signed sines, for every kind of layer that has its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_KNOWN = ("default", "linear", "llama3", "yarn")
"""Rotary kinds whose angles depend on the position alone; the others look at the whole pass, but not below a limit
(`length_dependent_positions`)."""
_FIRST_POSITIONS = 512
"""Length of the first table; it doubles when a text outgrows it."""


class Angles:
    """Those of one model.

    Args:
        rotary: the model's rotary module, with frequencies for all layers or for each type of them.
        limit: positions below which angles depend on nothing else; None for all.

    Attributes:
        rotary: numbers of a head that are rotated, the first ones. width: numbers of a position, `2 * rotary` for
            every kind.
    """

    def __init__(self, rotary: Any, limit: int | None):
        self._module, self._limit = rotary, limit
        types = getattr(rotary, "rope_type", None)
        self._types: dict[str | None, Any] = types if isinstance(types, dict) else {None: types}
        self._kinds = tuple(self._types)
        names = ("inv_freq" if kind is None else f"{kind}_inv_freq" for kind in self._kinds)
        self._frequencies: list[Any] = [getattr(rotary, name, None) for name in names]
        self.rotary = 2 * len(self._frequencies[0]) if isinstance(self._frequencies[0], Tensor) else 0
        self.width = 2 * self.rotary * len(self._kinds)
        self._table: Tensor | None = None

    def fits(self, head_dim: int, partial: bool) -> bool:
        """Whether there are angles of every kind, of one size, for positions alone. partial: they may be fewer."""
        shapes = {getattr(own, "shape", None) for own in self._frequencies}
        known = all(kind in _KNOWN for kind in self._types.values()) or self._limit is not None
        size = 0 < self.rotary <= head_dim if partial else self.rotary == head_dim
        return known and size and shapes == {(self.rotary // 2,)}

    def start_of(self, kind: str) -> int:
        """Where the angles of a kind of layer begin in a row of `table`."""
        return 0 if None in self._types else 2 * self.rotary * self._kinds.index(kind)

    def table(self, like: Tensor, count: int) -> Tensor:
        """Angles of `count` positions at least, `[*, width]`: of every kind cosines, then sines, those of the first
        half negative. Beyond the limit, where nothing may be emitted, they repeat.

        Args:
            like: of the dtype and device of the hidden states.
        """
        if self._table is None or len(self._table) < count:
            positions = torch.arange(max(2 * count, _FIRST_POSITIONS))
            if self._limit is not None:
                positions = positions.clamp(max=self._limit - 1)
            self._table = torch.cat([part for kind in self._kinds for part in self._both(like, positions, kind)], -1)
        return self._table

    def _both(self, like: Tensor, positions: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        cos, sin = self._module(like, positions[None], *(() if kind is None else (kind,)))
        half = sin.shape[-1] // 2
        return cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)
