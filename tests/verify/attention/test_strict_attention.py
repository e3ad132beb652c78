"""Strict attention: a node's bits depend on its query and on the K/V it sees, not on its slot or on the other nodes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from specdec.verify.attention.blocks import BLOCK, BlockPlan, paths_of
from specdec.verify.attention.fold import folded_attention

WIDTH = 16
HEADS, KV_HEADS, SIZE = 6, 2, 32
CHAIN = tuple(range(-1, 4))
"""Root and four tokens; in every tree below the same five tokens lie on one path, at other slots."""
TREES = {
    "alone": (CHAIN, (0, 1, 2, 3, 4)),
    "longer": (tuple(range(-1, 11)), (0, 1, 2, 3, 4)),
    "second-branch": ((-1, 0, 0, 2, 3, 4, 1), (0, 2, 3, 4, 5)),
    "levels": ((-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 7, 10, 8), (0, 2, 7, 10, 11)),
    "bushy": ((-1, *[0] * 8, 5, 5, 10, 11, 12), (0, 5, 10, 11, 12)),
}


class Text:
    """Queries, keys and values of one row by position: committed text, then a path of five nodes."""

    def __init__(self, length: int, dtype: torch.dtype, seed: int = 0):
        self.length, self.dtype = length, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.states = [self.random(heads, length + len(CHAIN)) for heads in (HEADS, KV_HEADS, KV_HEADS)]

    def random(self, heads: int, slots: int) -> Tensor:
        return torch.randn(1, heads, slots, SIZE, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def placed(self, slots: tuple[int, ...]) -> list[Tensor]:
        """q `[1, heads, WIDTH, size]`, k and v `[1, kv_heads, length + WIDTH + 9, size]`; noise elsewhere."""
        where = [self.length + slot for slot in slots]
        out = []
        for states in self.states:
            full = self.random(states.shape[1], self.length + WIDTH + 9)
            full[:, :, : self.length] = states[:, :, : self.length]
            full[:, :, where] = states[:, :, self.length :]
            out.append(full)
        return [out[0][:, :, self.length : self.length + WIDTH], *out[1:]]


def strict(text: Text, tree: str, window: int | None = None, softcap: float | None = None) -> Tensor:
    """Results of the five nodes, `[5, heads, size]`."""
    parents, slots = TREES[tree]
    plan = BlockPlan.build(text.length, parents, WIDTH, torch.device("cpu"))
    query, key, value = text.placed(slots)
    return plan.attend(query, key, value, plan.mask_for(window), SIZE**-0.5, softcap)[0, list(slots)]


def sdpa(text: Text, tree: str) -> Tensor:
    """The same through the ordinary attention of a tree pass."""
    parents, slots = TREES[tree]
    query, key, value = text.placed(slots)
    nodes = len(parents)
    visible = torch.zeros(nodes, text.length + nodes, dtype=torch.bool)
    visible[:, : text.length] = True
    for leaf in paths_of(parents).leaves:
        for depth, node in enumerate(leaf):
            visible[node, [text.length + ancestor for ancestor in leaf[: depth + 1]]] = True
    mask = torch.zeros(visible.shape, dtype=text.dtype).masked_fill(~visible, torch.finfo(text.dtype).min)
    read = slice(0, text.length + nodes)
    out = folded_attention(query[:, :, :nodes], key[:, :, read], value[:, :, read], mask[None, None])
    return out[0, list(slots)]


def reference(text: Text, window: int | None = None, softcap: float | None = None) -> Tensor:
    """Softmax attention of the five path nodes in float64, `[5, heads, size]`."""
    query, key, value = (states[0].double() for states in text.states)
    query = query[:, text.length :]
    key, value = (states.repeat_interleave(HEADS // KV_HEADS, 0) for states in (key, value))
    scores = query @ key.transpose(1, 2) * SIZE**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    back = torch.arange(text.length, text.length + 5)[:, None] - torch.arange(text.length + 5)
    scores = scores.masked_fill((back < 0) | (back >= (window or 10**6)), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(0, 1)


LENGTHS = (0, 1, 5, BLOCK - 3, BLOCK - 1, BLOCK, BLOCK + 7, 3 * BLOCK - 2, 5 * BLOCK + 31)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (7, None), (70, None), (None, 2.0)])
@pytest.mark.parametrize("tree", TREES)
def test_it_is_softmax_attention_over_the_nodes_own_path(
    length: int, window: int | None, softcap: float | None, tree: str
) -> None:
    text = Text(length, torch.float64)
    expected = reference(text, window, softcap)
    torch.testing.assert_close(strict(text, tree, window, softcap), expected, rtol=1e-12, atol=1e-12)


def distinct_bits(attend: Callable[[Text, str], Tensor], dtype: torch.dtype) -> int:
    """Over all lengths: how many trees give the path's nodes other bits than the chain alone."""
    count = 0
    for length in LENGTHS:
        text = Text(length, dtype)
        alone = attend(text, "alone")
        count += sum(not torch.equal(attend(text, tree), alone) for tree in TREES for _ in range(3))
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_nodes_bits_are_the_same_in_every_tree(dtype: torch.dtype) -> None:
    """Other slots, other noise in the other nodes and beyond, longer passes, other numbers of blocks."""
    assert distinct_bits(strict, dtype) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_attention_fails_the_same_comparison(dtype: torch.dtype) -> None:
    assert distinct_bits(sdpa, dtype) > 0


def test_windows_and_soft_caps_keep_the_bits() -> None:
    for window, softcap in ((7, None), (70, None), (None, 2.0)):
        assert distinct_bits(partial(strict, window=window, softcap=softcap), torch.bfloat16) == 0


def test_a_longer_committed_text_keeps_the_bits() -> None:
    """A node decoded at depth 4 of a draft and the same node as the next root see the same text."""
    for length in LENGTHS:
        text = Text(length, torch.bfloat16)
        deep = strict(text, "alone")[4]
        plan = BlockPlan.build(length + 4, (-1, 0, 0), WIDTH, torch.device("cpu"))
        key, value = (torch.cat([states, text.random(KV_HEADS, WIDTH)], 2) for states in text.states[1:])
        query = text.random(HEADS, WIDTH)
        query[:, :, 0] = text.states[0][:, :, length + 4]
        out = plan.attend(query, key, value, plan.mask_for(None), SIZE**-0.5, None)
        assert torch.equal(out[0, 0], deep)


def test_what_nobody_sees_is_never_read() -> None:
    """Stale slots may hold anything, NaN included: a weight of zero does not silence NaN."""
    text = Text(BLOCK + 3, torch.float32)
    parents, slots = TREES["levels"]
    plan = BlockPlan.build(text.length, parents, WIDTH, torch.device("cpu"))
    query, key, value = text.placed(slots)
    for states in (key, value):
        states[:, :, text.length + len(parents) :] = float("nan")
    out = plan.attend(query, key, value, plan.mask_for(None), SIZE**-0.5, None)
    assert not out.isnan().any()


def test_paths() -> None:
    paths = paths_of((-1, 0, 0, 1))
    assert paths.leaves == ((0, 2), (0, 1, 3))
    assert paths.depths == (0, 1, 1, 2)
    for node, path in enumerate(paths.path_of):
        assert node in paths.leaves[path]
