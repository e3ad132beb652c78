"""Native attention behind long texts, where threads share one text and slots are read in tiles: the direct pass's
numbers, and the same bits however a token is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from test_native import caches, error
from test_native import pytestmark as pytestmark
from torch import Tensor
from ways import forward_by

from specdec.verify import DraftTree, Topology

LENGTH = 600
"""Beyond what threads share (LONG of attention.h), and beyond a tile of any of these heads (TILE)."""
SHAPES = [(6, 2, 10), (3, 3, 64), (4, 2, 128), (32, 1, 16)]
"""(query heads, K/V heads, their size): the last one has more queries a token than make up a block (QUERIES)."""


@pytest.fixture(params=SHAPES, ids=str)
def model(request: pytest.FixtureRequest) -> Any:
    heads, kv_heads, size = request.param
    sizes = {"hidden": heads * 4, "heads": heads, "num_key_value_heads": kv_heads, "head_dim": size, "vocab": 61}
    return models.llama(max_position_embeddings=2048, num_hidden_layers=2, **sizes)


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def texts() -> Tensor:
    return torch.randint(0, 61, (2, LENGTH + 40), generator=torch.Generator().manual_seed(2))


def read(forward: Any, cache: Any, text: Tensor, lengths: list[int]) -> Any:
    rows = len(lengths)
    forward.prefill(cache, text[:rows], [0] * rows, lengths)
    for row, length in enumerate(lengths):
        cache.set_length(row, length)
    return cache


def tree_of(text: Tensor) -> tuple[DraftTree, list[int]]:
    """A bush whose path is the text, and that path: of every other node the text knows nothing."""
    shape = Topology.widths((2, 2, 1, 1))
    path = [0, 2, 5, 9, 13]
    tokens = torch.full((len(text), len(DraftTree.build(shape, text[:, :1].expand(-1, 15)).parents[0])), 7)
    tokens[:, path] = text[:, LENGTH : LENGTH + len(path)]
    return DraftTree.build(shape, tokens), path


def test_the_numbers_of_the_direct_pass(model: Any, threads: Any) -> None:
    text, found = texts(), {}
    for way in ("native", "direct"):
        forward = forward_by(model, way)
        threads(2)
        for which in range(2):  # contiguous, and in pages
            cache = read(forward, list(caches(model, 2))[which], text, [LENGTH, LENGTH - 90])
            starts = cache.lengths
            found[way, which] = [
                forward.causal(cache, text[:, LENGTH : LENGTH + 1], starts, None, 0).logits,
                forward.causal(cache, text[:, LENGTH : LENGTH + 9], starts, None, 0).logits,
                forward.tree(cache, tree_of(text)[0]).logits,
            ]
    for which in range(2):
        assert error(found["native", which], found["direct", which]) < 1e-5


def test_the_bits_of_a_token_do_not_depend_on_how_it_is_read(model: Any, threads: Any) -> None:
    """Alone, in drafts of any length, in a tree, by any number of threads, in pages, beside a shorter text."""
    text, forward = texts()[:1], forward_by(model, "native")
    stop = LENGTH + 30
    threads(1)
    cache = read(forward, next(caches(model, 1)), text, [LENGTH])
    steps = range(LENGTH, stop)
    single = torch.cat([forward.causal(cache, text[:, i : i + 1], [i], None, 0).logits for i in steps], 1)
    tree, path = tree_of(text)
    for which in range(2):
        alone = read(forward, list(caches(model, 1))[which], text, [LENGTH])
        both = read(forward, list(caches(model, 2))[which], texts(), [LENGTH, 300])
        for count in (1, 2, 3):
            threads(count)
            for width in (1, 4, 30):
                spans = [(i, min(i + width, stop)) for i in range(LENGTH, stop, width)]
                drafts = [forward.causal(alone, text[:, a:b], [a], None, 0).logits for a, b in spans]
                assert torch.equal(torch.cat(drafts, 1), single), (count, which, width)
            assert torch.equal(forward.tree(alone, tree).logits[:, path], single[:, : len(path)])
            beside = forward.causal(both, texts()[:, LENGTH : LENGTH + 5], [LENGTH, 300], None, 0).logits
            assert torch.equal(beside[:1], single[:, :5])


@pytest.mark.parametrize("slot", [0, 510, LENGTH - 1])
@pytest.mark.parametrize("what", [0, 1], ids=["key", "value"])
def test_every_slot_is_seen(slot: int, what: int, threads: Any) -> None:
    """The control: one number of one slot, wherever it stands, changes the logits; one behind the text does not."""
    heads = {"hidden": 24, "heads": 6, "num_key_value_heads": 2, "head_dim": 10, "vocab": 61}
    model, text = models.llama(max_position_embeddings=2048, num_hidden_layers=2, **heads), texts()[:1]
    forward = forward_by(model, "native")
    threads(2)
    cache = read(forward, next(caches(model, 1)), text, [LENGTH])
    storage = cache.store("target").layer(1, torch.empty(1, 2, 1, 10), torch.empty(1, 2, 1, 10))[what]

    def logits() -> Tensor:
        return forward.causal(cache, text[:, LENGTH : LENGTH + 1], [LENGTH], None, 0).logits

    before = logits()
    storage[0, 1, LENGTH + 1] = float("nan")
    assert torch.equal(logits(), before)
    storage[0, 1, slot, 3] += 10
    assert not torch.equal(logits(), before)
