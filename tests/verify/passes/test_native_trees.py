"""Native passes over branched trees of any shape: each node sees its own path and nothing else."""

from __future__ import annotations

import random
from typing import Any

import models
import pytest
import torch
from test_native import caches, error
from test_native import pytestmark as pytestmark
from torch import Tensor
from ways import forward_by

from specdec.kv import PagedKVCache
from specdec.verify import DraftTree

HEADS = [(1, 1), (2, 1), (6, 2), (4, 4)]
"""(query heads, K/V heads): groups of 1, 2, 3 and 1."""
TOKENS_TOGETHER = 6
"""Neighbours that the C code attends with at once, where their lists of visible slots are nested."""


def parents_of(nodes: int, seed: int) -> list[int]:
    """A random tree: mostly lines, so that neighbours are often, and often almost, nested; or bushes."""
    draw = random.Random(seed)
    straight = draw.choice([0.0, 0.5, 0.8, 0.9])
    return [-1, *(node - 1 if draw.random() < straight else draw.randrange(node) for node in range(1, nodes))]


def tree_of(shapes: list[list[int]], tokens: Tensor) -> DraftTree:
    """A tree a row; shorter ones are padded with nodes below their root."""
    width = max(map(len, shapes))
    parents = torch.tensor([[*shape, *[0] * (width - len(shape))] for shape in shapes])
    counts = torch.tensor([len(shape) for shape in shapes])
    return DraftTree(tokens[:, :width], parents, counts, torch.zeros(len(shapes), width, dtype=torch.bool))


def logits_of(model: Any, way: Any, cache: Any, lengths: list[int], tree: DraftTree, text: Tensor) -> list[Tensor]:
    """Of all real nodes, and of a second tree pass behind the deepest path of the first (its K/V)."""
    forward, rows = forward_by(model, way), len(lengths)
    with torch.no_grad():
        forward.prefill(cache, text, [0] * rows, lengths, chunk=64)
        for row, length in enumerate(lengths):
            cache.set_length(row, length)
        first = forward.tree(cache, tree).logits
        masks, counts = tree.ancestor_mask, tree.num_nodes.tolist()
        ends = [int(tree.depths[row, :count].argmax()) for row, count in enumerate(counts)]
        cache.commit([masks[row, end].nonzero()[:, 0].tolist() for row, end in enumerate(ends)])
        second = forward.tree(cache, tree).logits
    return [logits[row, :count] for logits in (first, second) for row, count in enumerate(counts)]


@pytest.mark.parametrize("heads", HEADS)
def test_random_trees_are_those_of_the_direct_pass(heads: tuple[int, int]) -> None:
    model: Any = models.llama(heads=heads[0], num_key_value_heads=heads[1], hidden=24, head_dim=10, vocab=29)
    exact: Any = models.llama(heads=heads[0], num_key_value_heads=heads[1], hidden=24, head_dim=10, vocab=29).double()
    ours, reference = "native", "direct"
    for seed in range(24):
        rows = 1 + seed % 3
        shapes = [parents_of(7 + (5 * seed + 3 * row) % 14, 100 * seed + row) for row in range(rows)]
        generator = torch.Generator().manual_seed(seed)
        tree = tree_of(shapes, torch.randint(0, 29, (rows, 20), generator=generator))
        lengths = torch.randint(0, 23, (rows,), generator=generator).tolist()
        text = torch.randint(0, 29, (rows, 23), generator=generator)
        wanted = logits_of(exact, reference, next(caches(exact, rows)), lengths, tree, text)
        for cache in caches(model, rows):  # contiguous and in pages
            found = logits_of(model, ours, cache, lengths, tree, text)
            assert error(found, wanted) < 3e-5, (seed, shapes)
            if isinstance(cache, PagedKVCache):  # what pads a row was written nowhere, not to the page of zeros either
                cache.pool.check_integrity()


def test_the_trees_are_wide_enough_for_every_kind_of_group() -> None:
    """Of six neighbours that attend at once: one line, lists of one more slot each that are not nested, and bushes."""
    kinds = {"one line": 0, "as long as one line": 0, "bush": 0}
    for seed in range(24):
        for row in range(1 + seed % 3):
            parents = parents_of(7 + (5 * seed + 3 * row) % 14, 100 * seed + row)
            depths = tree_of([parents], torch.zeros(1, 20, dtype=torch.int64)).depths[0].tolist()
            pieces = -(-len(parents) // TOKENS_TOGETHER)
            for i in range(pieces):
                own = range(len(parents) * i // pieces, len(parents) * (i + 1) // pieces)
                line = all(depths[node] == node for node in own)
                counts = all(depths[node] == depths[own[0]] + node - own[0] for node in own)
                kinds["one line" if line else "as long as one line" if counts else "bush"] += 1
    assert min(kinds.values()) >= 5, kinds


def test_one_node_under_another_parent_is_seen() -> None:
    """The control: the comparison notices a single wrong edge far down in a tree."""
    model: Any = models.llama(heads=6, num_key_value_heads=2, hidden=24, head_dim=10, vocab=29)
    parents = parents_of(18, 3)
    other = [*parents[:16], parents[16] - 1, parents[17]]
    text = torch.randint(0, 29, (1, 23), generator=torch.Generator().manual_seed(1))
    found = [
        logits_of(model, "native", next(caches(model, 1)), [9], tree_of([shape], text), text)[0]
        for shape in (parents, other)
    ]
    assert error([found[0][16:]], [found[1][16:]]) > 1e-3
    assert error([found[0][:16]], [found[1][:16]]) == 0.0
