"""Branched trees deeper than a sliding window: a node sees the last positions of its own path, whatever their slots."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import models
import pytest
import torch
from trees import per_path_logits, tree_of

from specdec.kv import PagedKVCache, SharedKVCache
from specdec.kv.support import num_cache_layers
from specdec.verify import Forward
from specdec.verify.attention.register import attention_of
from specdec.verify.passes import inputs

WINDOW = 6
"""That of the models (tests/models.py)."""
TWO_LINES = (-1, 0, 0, *range(1, 17))
"""Two branches of nine nodes that take turns: a slot is about twice as far from the root as its position."""
LATE_BRANCH = (-1, *range(8), 0, *range(9, 17))
"""A line of eight nodes, and after it another one from the root: positions start again in the middle of the slots."""
COMB = (-1, *(parent for node in range(9) for parent in (2 * node, 2 * node)))
"""A line of nine, each node of which has a sibling beside it."""
SHAPES = [TWO_LINES, LATE_BRANCH, COMB]

LAYOUTS = {
    "contiguous": lambda layers, rows: SharedKVCache({"target": layers}, rows, capacity=4),
    "paged": lambda layers, rows: PagedKVCache.fresh({"target": layers}, rows, page_size=4),
}


def check(family: str, layout: str, cuts: tuple[int, ...] | None = None) -> None:
    """All shapes at once, in rows of different lengths; in one pass, or in pieces as a drafter grows it."""
    model: Any = models.target(family)
    shapes, lengths = [parents[:18] for parents in SHAPES], [0, 4, 9]
    tree = tree_of(shapes, seed=3)
    assert int(tree.depths.max()) > WINDOW
    text = models.prompts((9,) * 3, models.VOCAB, 1)[0]
    cache: Any = LAYOUTS[layout](num_cache_layers(model), 3)
    forward = Forward(model, "target")
    with torch.no_grad(), attention_of(model):
        forward.prefill(cache, text, [0] * 3, lengths, chunk=4)
        for row, length in enumerate(lengths):
            cache.set_length(row, length)
        if cuts is None:
            logits = forward.tree(cache, tree).logits
        else:
            pieces = [
                forward.nodes(cache, tree.tokens[:, a:b], tree.depths[:, :b], tree.ancestor_mask[:, a:b, :b], a).logits
                for a, b in pairwise(cuts)
            ]
            logits = torch.cat(pieces, dim=1)
    for row, parents in enumerate(shapes):
        expected = per_path_logits(model, text[row, : lengths[row]], tree, row, parents)
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["mistral-window", "qwen2-mixed-window", "gemma3"])
def test_deeper_than_the_window(family: str, layout: str) -> None:
    check(family, layout)


@pytest.mark.parametrize("family", ["mistral-window", "gemma3"])
def test_grown_in_pieces(family: str) -> None:
    check(family, "contiguous", cuts=(0, 1, 8, 9, 18))


@pytest.mark.parametrize("lengths", [(4, 4), (5, 5), (6, 6), (7, 7), (8, 5)])
@pytest.mark.parametrize("width", [1, 2, 6, 7])
def test_plain_text_at_the_edge_of_the_window(lengths: tuple[int, int], width: int) -> None:
    """Where the first token leaves the window: with and without a mask, rows alike or not, from nothing or behind."""
    model: Any = models.target("mistral-window")
    text = models.prompts((16, 16), models.VOCAB, 5)[0]
    cache, forward = SharedKVCache({"target": num_cache_layers(model)}, 2), Forward(model, "target")
    with torch.no_grad(), attention_of(model):
        forward.prefill(cache, text, [0, 0], list(lengths), chunk=99)
        behind = torch.stack([text[row, length : length + width] for row, length in enumerate(lengths)])
        found = forward.causal(cache, behind, lengths, None, keep=0).logits
        first = forward.causal(cache, text[:, :width], [0, 0], None, keep=0).logits
        for row, length in enumerate(lengths):
            plain = model(text[row : row + 1, : length + width], use_cache=False).logits[0]
            torch.testing.assert_close(found[row], plain[length:], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(first[row], plain[:width], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_one_too_wide_or_too_narrow_is_caught(off: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = inputs.additive_masks

    def shifted(visible: Any, positions: Any, slots: Any, windows: Any, dtype: Any) -> Any:
        return original(visible, positions, slots, {kind: size and size + off for kind, size in windows.items()}, dtype)

    monkeypatch.setattr("specdec.verify.passes.inputs.additive_masks", shifted)
    with pytest.raises(AssertionError, match="not close"):
        check("mistral-window", "contiguous")


def test_slots_taken_for_positions_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = inputs.additive_masks

    def by_slot(visible: Any, positions: Any, slots: Any, windows: Any, dtype: Any) -> Any:
        return original(visible, positions, torch.arange(slots.shape[1]).expand_as(slots), windows, dtype)

    monkeypatch.setattr("specdec.verify.passes.inputs.additive_masks", by_slot)
    with pytest.raises(AssertionError, match="not close"):
        check("mistral-window", "contiguous")
