"""Positions and masks of parts, for runners that need them: causal ones are cut from tables instead of built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.support import text_config
from specdec.verify.passes.base import Nodes, Part
from specdec.verify.positions import usable_positions, windows_of
from specdec.verify.topology import indices

BAND_SLOTS = 4096
"""Longest text served from the tables; beyond it masks are built per pass."""

_MAX_WIDTH = 32
"""Widest pass whose template is kept."""


class Inputs:
    """What a model's configuration says about positions and windows, applied to parts.

    Attributes:
        windows: attention window per layer type; empty when every layer sees everything.
        num_positions: positions the model has, where that is limited.
    """

    def __init__(self, model: PreTrainedModel):
        self._model, self._config = model, text_config(model)
        self._band = CausalBand()
        self.windows = windows_of(self._config)
        self.num_positions = usable_positions(self._config)

    @property
    def dtype(self) -> torch.dtype:
        """That of the masks."""
        embeddings: Any = self._model.get_input_embeddings()
        dtype: torch.dtype = embeddings.weight.dtype
        return dtype

    def positions(self, part: Part) -> Tensor:
        """Int64 `[rows or 1, T]`, all of them usable."""
        return self.usable(self._positions(part))

    def of(self, part: Part) -> tuple[Tensor, Any]:
        """Positions, and additive masks `[rows or 1, 1, T, read]`: a tensor, a dict of them by layer type, or None (see
        `folded_attention`)."""
        positions, dtype = self._positions(part), self.dtype
        if part.nodes is None:
            mask = self._text_mask(part, positions, dtype)
        else:
            mask = self._tree_mask(part, part.nodes, positions, dtype, self.windows)
        return self.usable(positions), mask

    def ancestors(self, part: Part, nodes: Nodes) -> Tensor:
        """Additive float32 mask `[rows or 1, 1, T, read]` of what nodes see that see everything."""
        mask: Tensor = self._tree_mask(part, nodes, nodes.depths, torch.float32, {})
        return mask

    def usable(self, positions: Tensor) -> Tensor:
        """Positions that the model has, of those that were asked for."""
        # Drafted nodes and padding beyond the table can never be emitted: any position will do for them.
        return positions if self.num_positions is None else positions.clamp(max=self.num_positions - 1)

    def _positions(self, part: Part) -> Tensor:
        device, (rows, width) = part.tokens.device, part.tokens.shape
        if part.nodes is not None:
            return torch.tensor(part.nodes.lengths, device=device)[:, None] + part.nodes.depths[:, part.nodes.first :]
        starts = part.write.starts
        if _equal(starts) and part.write.read <= BAND_SLOTS:
            positions = self._band.positions(starts[0], width, device)  # a view of a table
            return positions if rows == 1 else positions.expand(rows, width)
        positions = torch.tensor(list(starts), device=device)[:, None]
        return positions if width == 1 else positions + indices(width, device)

    def _text_mask(self, part: Part, positions: Tensor, dtype: torch.dtype) -> Any:
        starts, read, width, device = part.write.starts, part.write.read, part.tokens.shape[1], part.tokens.device
        same, tabulated = _equal(starts), read <= BAND_SLOTS and not self.windows
        if same and (width == 1 or read == width) and ((width == 1 and tabulated) or self._may_skip_mask(read)):
            return None  # every token of the pass reads all there is, or SDPA is told that it is causal
        if tabulated and same:
            return self._band.mask(starts[0], width, dtype, device)
        if tabulated:
            return self._band.masks(positions, read, dtype)
        visible = torch.arange(read, device=device) <= positions[:, :, None]
        slots = torch.arange(read, device=device).expand(len(starts), read) if self.windows else None
        return additive_masks(visible, positions, slots, self.windows, dtype)

    def _tree_mask(
        self, part: Part, nodes: Nodes, positions: Tensor, dtype: torch.dtype, windows: Mapping[str, int | None]
    ) -> Any:
        read, width, device = part.write.read, part.tokens.shape[1], part.tokens.device
        committed = torch.tensor(nodes.lengths, device=device)[:, None]
        slots = torch.arange(read, device=device)
        visible = (slots < committed)[:, None, :].expand(-1, width, -1).contiguous()
        tail = (committed + torch.arange(nodes.first + width, device=device))[:, None, :].expand(-1, width, -1)
        visible.scatter_(2, tail, nodes.ancestors)
        slot_positions = None
        if windows:
            # A tail slot's position is its node's depth, not its index; nodes of a level share a position.
            slot_positions = slots.expand(len(nodes.lengths), read).clone()
            slot_positions.scatter_(1, tail[:, 0], committed + nodes.depths)
        return additive_masks(visible, positions, slot_positions, windows, dtype)

    def _may_skip_mask(self, read: int) -> bool:
        eager = self._config._attn_implementation == "eager"
        return not eager and all(window is None or read <= window for window in self.windows.values())


def _equal(starts: Any) -> bool:
    return starts.count(starts[0]) == len(starts)


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
