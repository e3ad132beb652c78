"""Positions and masks of ordinary passes: causal ones cut from tables instead of built from a dozen operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
        return self._positions.narrow(1, start, width)  # half the price of an indexing expression, every pass

    def mask(self, start: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Additive `[1, 1, width, start + width]`: row i sees slots `0 .. start + i`."""
        if width > _MAX_WIDTH:
            return _step(width, start + width, start, dtype, device)
        template = self._template(width, dtype, device)
        return template[..., BAND_SLOTS - start : BAND_SLOTS + width]

    def masks(self, positions: Tensor, read: int, dtype: torch.dtype) -> Tensor:
        """Additive `[rows, 1, width, read]` for int64 positions `[rows, width]`: each sees the slots up to itself."""
        rows, width = positions.shape
        template = self._template(1, dtype, positions.device)
        windows = template[0, 0, 0].unfold(0, read, 1)
        return windows.index_select(0, (BAND_SLOTS - positions).view(-1)).view(rows, 1, width, read)

    def _template(self, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        template = self._templates.get((width, dtype, device))
        if template is None:
            template = _step(width, 2 * BAND_SLOTS, BAND_SLOTS, dtype, device)
            self._templates[width, dtype, device] = template
        return template


def _step(width: int, columns: int, start: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    row = torch.arange(width, device=device)[:, None]
    hidden = torch.arange(columns, device=device) > row + start
    return torch.zeros(1, 1, width, columns, dtype=dtype, device=device).masked_fill_(hidden, torch.finfo(dtype).min)


def additive_masks(
    visible: Tensor,
    positions: Tensor,
    slot_positions: Tensor | None,
    windows: Mapping[str, int | None],
    dtype: torch.dtype,
) -> Any:
    """Additive 4-D mask(s) from bool `[rows, M, read]`; a dict by layer type when layers differ.

    Float, not bool: eager attention *adds* its mask, and SDPA would convert a bool mask in every layer.

    Args:
        positions: int64 `[rows, M]`; slot_positions: int64 `[rows, read]`, None where no layer has a window.
        windows: positions a layer sees, by layer type; None for all.
    """
    if slot_positions is None:
        return _additive(visible, dtype)
    masks: dict[str, Tensor] = {}
    for kind, window in windows.items():
        inside = visible
        if window is not None:
            inside = visible & (positions[:, :, None] - slot_positions[:, None, :] < window)
        masks[kind] = _additive(inside, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
