"""Every KV layout: what a tail leaves behind, where it lies when rows move, and what storage it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_kv_contract import CACHES, DIM, HEADS, LAYERS, everywhere

from specdec.kv import KVCache, SharedKVCache


def fill(cache: KVCache, starts: list[int], value: float, width: int) -> torch.Tensor:
    """The draft's keys as a pass reads them that writes `value`."""
    states = torch.full((2, HEADS, width, DIM), value, dtype=torch.float64)
    with cache.writing("draft", starts, width) as write:
        keys, values = write.update(0, states, -states)
    assert torch.equal(keys, -values) or bool(keys.isnan().any())
    return keys


@everywhere
@pytest.mark.parametrize("moved", ["retired", "forked"])
def test_a_placed_tail_moves_with_its_row(kind: str, moved: str) -> None:
    """The drafter ran three nodes in an order of their own, another one in each row."""
    cache = CACHES[kind](LAYERS, 2)
    for node in range(3):
        fill(cache, [node, node], 10.0 + node, 1)
    places = [[2, 0, 1], [0, 2, 1]]
    cache.place("draft", places)
    if moved == "retired":
        cache.retire(0)
        rows = [places[1]]
    else:
        cache.fork(2)
        rows = [places[0], places[0], places[1], places[1]]
    paths = [[0, 1], [0, 2], [0, 2], [0, 1]][: len(rows)]
    cache.commit(paths)
    for row, (own, path) in enumerate(zip(rows, paths, strict=True)):
        kept = next(iter(cache.layers("draft", row)))[0][0, :, 0].tolist()
        assert kept == [10.0 + own[node] for node in path]


@everywhere
@pytest.mark.parametrize("dropped", ["rolled back", "truncated", "forgotten", "committed"])
def test_a_tail_that_is_gone_is_placed_no_longer(kind: str, dropped: str) -> None:
    cache = CACHES[kind](LAYERS, 2)
    fill(cache, [0, 0], 1.0, 1)
    for row in range(2):
        cache.set_length(row, 1)
    fill(cache, [1, 1], 2.0, 2)
    cache.place("draft", [[1, 0], [1, 0]])
    if dropped == "rolled back":
        cache.rollback()
    elif dropped == "truncated":
        for row in range(2):
            cache.truncate(row, 1)
    elif dropped == "forgotten":
        cache.forget("draft")
        fill(cache, [0, 0], 1.0, 1)
    else:
        cache.commit([[], []])
    for node in range(2):
        fill(cache, [1 + node, 1 + node], 10.0 + node, 1)
    cache.commit([[0], [1]])
    kept = [next(iter(cache.layers("draft", row)))[0][0, :, 0].tolist() for row in range(2)]
    assert kept == [[1.0, 10.0], [1.0, 11.0]]


@everywhere
@pytest.mark.parametrize("retired", [(0, 0), (0, 1), (1, 0, 1), (2, 0, 0), (0, 0, 0)], ids=str)
def test_rows_that_finish_one_after_the_other_take_their_text_along(kind: str, retired: tuple[int, ...]) -> None:
    cache, order = CACHES[kind](LAYERS, 4), [0, 1, 2, 3]
    with cache.writing("draft", [0] * 4, 2) as write:
        states = torch.arange(4.0, dtype=torch.float64)[:, None, None, None].expand(4, HEADS, 2, DIM)
        write.update(0, states, -states)
    for row in range(4):
        cache.set_length(row, 2)
    for active, row in zip((3, 2, 1), retired, strict=False):
        cache.retire(row)
        order[row], order[active] = order[active], order[row]
    for row, own in enumerate(order):
        keys, values = next(iter(cache.layers("draft", row)))
        assert keys[0, :, 0].tolist() == [float(own)] * 2 == (-values[0, :, 0]).tolist()


@everywhere
def test_a_row_that_writes_nothing_in_a_pass_keeps_what_it_has(kind: str) -> None:
    """Its start is padding as well, whatever it says."""
    cache = CACHES[kind](LAYERS, 2)
    fill(cache, [0, 0], 1.0, 3)
    with cache.writing("draft", [1, 3], 2, [0, 2]) as write:
        states = torch.full((2, HEADS, 2, DIM), 2.0, dtype=torch.float64)
        write.update(0, states, -states)
    assert cache.filled("draft") == [3, 5]


@everywhere
def test_nothing_is_left_of_a_sick_tail_or_of_a_sick_model(kind: str) -> None:
    """Slots behind a row's end are read, hidden: as 0 * value, and 0 * NaN is NaN. Committed ones stay."""
    cache = CACHES[kind](LAYERS, 2)
    fill(cache, [0, 0], 1.0, 3)
    for row, length in enumerate((3, 1)):
        cache.set_length(row, length)
    fill(cache, [3, 1], float("nan"), 4)
    cache.scrub("draft")
    assert cache.filled("draft") == [3, 1]
    keys = fill(cache, [3, 0], 2.0, 1)[:, 0, :, 0]
    assert keys[0].tolist() == [1.0, 1.0, 1.0, 2.0]
    assert keys[1, 0] == 2.0
    assert not bool(keys.isnan().any())
    fill(cache, [0, 0], float("nan"), 9)
    cache.forget("draft")
    assert cache.filled("draft") == [0, 0]
    fill(cache, [0, 0], 1.0, 2)
    assert not bool(fill(cache, [2, 0], 1.0, 2).isnan().any())


def test_storage_doubles_up_to_what_is_expected_and_then_gives_what_is_needed() -> None:
    cache = SharedKVCache(LAYERS, 2, capacity=4, most=10)
    sizes = []
    for width in (4, 1, 4, 1, 1, 2):
        fill(cache, cache.filled("draft"), float(width), width)
        sizes.append(cache.store("draft").capacity)
    assert sizes == [4, 8, 10, 10, 11, 13]
    for row in range(2):
        cache.set_length(row, 13)
        kept = [keys[0, :, 0].tolist() for keys, _ in cache.layers("draft", row)]
        assert kept == [[4.0] * 4 + [1.0] + [4.0] * 4 + [1.0, 1.0, 2.0, 2.0]]


def test_storage_that_could_not_grow_grows_at_the_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SharedKVCache({"target": 2}, 1, 4)

    def write(start: int, count: int) -> torch.Tensor:
        states = torch.arange(start, start + count, dtype=torch.float64).view(1, 1, count, 1)
        with cache.writing("target", [start], count) as opened:
            return [opened.update(layer, states, states)[0] for layer in range(2)][-1]

    write(0, 4)
    calls: list[int] = []
    own = torch.Tensor.new_zeros

    def new_zeros(self: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return own(self, *size, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", new_zeros)
        with pytest.raises(torch.OutOfMemoryError):
            write(4, 2)
    assert cache.filled("target") == [4]
    assert write(4, 2).flatten().tolist() == [0, 1, 2, 3, 4, 5]
