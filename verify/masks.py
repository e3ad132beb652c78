"""Positions and causal masks of ordinary passes, cut from tables instead of built from a dozen operations."""

from __future__ import annotations

import torch
from torch import Tensor

BAND_SLOTS = 4096
"""Longest text served from the tables; beyond it masks are built per pass."""

_MAX_WIDTH = 32
"""Widest pass whose template is kept."""


class CausalBand:
    """Tables from which the positions and the causal mask of a pass are cut as views.

    The mask of `width` rows starting at slot `start` is `width` rows of a step function, shifted by one per row: a
    window of one wide template, whose step lies in the middle.
    """

    def __init__(self) -> None:
        self._positions: Tensor | None = None
        self._templates: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}

    def positions(self, start: int, width: int, device: torch.device) -> Tensor:
        """Int64 `[1, width]`: `start .. start + width - 1`."""
        if self._positions is None or self._positions.device != device:
            self._positions = torch.arange(BAND_SLOTS, device=device)[None]
        return self._positions[:, start : start + width]

    def mask(self, start: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive `[1, 1, width, start + width]`: row i sees slots `0 .. start + i`."""
        if width > _MAX_WIDTH:
            return _step(width, start + width, start, dtype, device)
        template = self._templates.get((width, dtype, device))
        if template is None:
            template = _step(width, 2 * BAND_SLOTS, BAND_SLOTS, dtype, device)
            self._templates[width, dtype, device] = template
        return template[..., BAND_SLOTS - start : BAND_SLOTS + width]


def _step(width: int, columns: int, start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    row = torch.arange(width, device=device)[:, None]
    hidden = torch.arange(columns, device=device) > row + start
    return torch.zeros(1, 1, width, columns, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)
