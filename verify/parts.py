"""What a forward pass runs: texts to read, and rows of one width that are ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kv.base import PassCache


class Text(NamedTuple):
    """Plain text to be read: row `b`'s `tokens[b, :valid[b]]` go to slots from `starts[b]` on.

    tokens: int64 `[rows, T]`; valid: None when all columns are real.
    """

    cache: PassCache
    tokens: Tensor
    starts: Sequence[int]
    valid: Sequence[int] | None


class Part(NamedTuple):
    """Rows of one width in a pass, ready to run.

    tokens: int64 `[rows, T]`; positions: int64 `[rows or 1, T]`, below `read`. mask: additive `[rows or 1, 1, T, S]`, a
    dict of them by layer type, or None (see `folded_attention`). view: where K/V go. keep: logits of so many last
    columns, 0 for all, None for none. read: slots of the cache that the rows read. starts: of plain texts, for a way
    that needs neither positions nor mask to know that token `j` of row `b` is number `starts[b] + j` and sees those
    before it and itself.
    """

    tokens: Tensor
    positions: Tensor | None
    mask: Any
    view: Any
    keep: int | None
    read: int
    starts: Sequence[int] | None = None


def joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def flat_positions(parts: Sequence[Part]) -> Tensor:
    """Int64 `[tokens]`, of all parts."""
    pieces = []
    for part in parts:
        assert part.positions is not None
        pieces.append(part.positions.expand(part.tokens.shape).reshape(-1))
    return joined(pieces)


def kept_shapes(parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Rows and columns of each part whose logits are wanted."""
    shapes = []
    for part in parts:
        rows, width = part.tokens.shape
        shapes.append((rows, 0 if part.keep is None else min(part.keep, width) if part.keep else width))
    return shapes


def per_part(logits: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Logits `[rows, *, vocab]` of every part that asks for some, from those of all of them below each other."""
    shapes = [shape for shape in kept_shapes(parts) if shape[1]]
    pieces = logits.split([rows * width for rows, width in shapes])
    return [piece.view(*shape, -1) for piece, shape in zip(pieces, shapes, strict=True)]
