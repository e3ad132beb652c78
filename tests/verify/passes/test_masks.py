"""Masks cut from tables are those that comparing positions gives: at every edge of the tables and of a window."""

from __future__ import annotations

import pytest
import torch

from specdec.verify.passes.inputs import BAND_SLOTS, CausalBand, additive_masks
from specdec.verify.positions import windows_of

CPU = torch.device("cpu")
HIDDEN = torch.finfo(torch.float32).min
STARTS = [0, 1, 7, 100, BAND_SLOTS - 40, BAND_SLOTS - 33]


def causal(positions: torch.Tensor, read: int) -> torch.Tensor:
    """Additive `[rows, 1, width, read]` said with loops over nothing but positions."""
    seen = torch.arange(read) <= positions[:, :, None]
    return torch.where(seen, 0.0, HIDDEN)[:, None]


@pytest.mark.parametrize("width", [1, 2, 31, 32, 33])
def test_equal_rows(width: int) -> None:
    band = CausalBand()
    for start in STARTS:
        wanted = torch.arange(start, start + width)[None]
        assert torch.equal(band.positions(start, width, CPU), wanted)
        assert torch.equal(band.mask(start, width, torch.float32, CPU), causal(wanted, start + width))


@pytest.mark.parametrize("width", [1, 3])
def test_rows_of_different_lengths(width: int) -> None:
    band = CausalBand()
    for starts in ([0, 5], [7, 2, 2], [BAND_SLOTS - width, 0]):
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        read = max(starts) + width
        assert torch.equal(band.masks(positions, read, torch.float32), causal(positions, read))


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_a_window_counts_the_token_itself(window: int) -> None:
    """The token at position `i` sees `window` positions: `i - window + 1 .. i`."""
    positions = torch.arange(12)[None]
    visible = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    masks = additive_masks(visible, positions, positions, {"full": None, "near": window}, torch.float32)
    assert list(masks) == ["full", "near"]
    for i in range(12):
        seen = (masks["near"][0, 0, i] == 0).nonzero()[:, 0].tolist()
        assert seen == list(range(max(0, i - window + 1), i + 1))
        assert (masks["full"][0, 0, i] == 0).nonzero()[:, 0].tolist() == list(range(i + 1))
    assert torch.equal(additive_masks(visible, positions, None, {}, torch.float32), masks["full"])


class Config:
    """A configuration that says these things of itself."""

    def __init__(self, **fields: object):
        self.__dict__.update(fields)


def test_windows_by_kind_of_layer() -> None:
    assert windows_of(Config()) == {}
    assert windows_of(Config(sliding_window=4)) == {"sliding_attention": 4}
    full, near = "full_attention", "sliding_attention"
    assert windows_of(Config(sliding_window=4, layer_types=[near, full, near])) == {near: 4, full: None}
    assert windows_of(Config(sliding_window=4, layer_types=[near])) == {near: 4}
    assert windows_of(Config(sliding_window=4, layer_types=[full, full])) == {}
    assert windows_of(Config(sliding_window=None, layer_types=[near, full])) == {}
    assert windows_of(Config(sliding_window=4, layer_types=["other", near])) == {"other": None, near: 4}
