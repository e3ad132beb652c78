"""Every KV layout keeps one contract: random histories against a model made of Python lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec.kv import CacheStateError, KVCache, PagedKVCache, SharedKVCache

NAMES = ("target", "draft")
LAYERS = {"target": 2, "draft": 1}
HEADS, DIM = 2, 3

# A new layout joins by adding its factory `(num_layers, num_rows) -> KVCache`; the small capacity makes it grow early.
CACHES: dict[str, Callable[[dict[str, int], int], KVCache]] = {
    "contiguous": lambda layers, rows: SharedKVCache(layers, rows, capacity=2),
    "paged-1": lambda layers, rows: PagedKVCache.fresh(layers, rows, page_size=1),
    "paged-3": lambda layers, rows: PagedKVCache.fresh(layers, rows, page_size=3),
    "paged-7": lambda layers, rows: PagedKVCache.fresh(layers, rows, page_size=7),
    "paged-16": lambda layers, rows: PagedKVCache.fresh(layers, rows, page_size=16),
    "paged-256": lambda layers, rows: PagedKVCache.fresh(layers, rows, page_size=256),
}

everywhere = pytest.mark.parametrize("kind", list(CACHES))


class Lists:
    """The contract said with lists: `slots[name][row]` are the values of the filled slots.

    `text[row]` stands for the committed tokens. A model that writes them late writes the K/V of those tokens, whichever
    row or pass it is: layouts may keep rows with a common text in one place.
    """

    def __init__(self, rows: int) -> None:
        self.num_rows = rows
        self.text: list[list[float]] = [[] for _ in range(rows)]
        self.slots: dict[str, list[list[float]]] = {name: [[] for _ in range(rows)] for name in NAMES}
        self.places: list[list[int] | None] | None = None
        """Tail slots of the drafter's nodes where it ran them in another order, per active row."""
        self._last = 0.0

    @property
    def lengths(self) -> list[int]:
        return [len(text) for text in self.text]

    def fresh(self, count: int) -> list[float]:
        """Values that stand for tokens nobody has seen before."""
        self._last += count
        return [self._last - count + 1 + i for i in range(count)]

    def set_length(self, row: int, length: int) -> None:
        text = self.text[row]
        self.text[row] = text[:length] + self.fresh(length - len(text))

    def commit(self, paths: list[list[int]]) -> None:
        for row, path in enumerate(paths):
            base = self.lengths[row]
            for name in NAMES:
                held = self.slots[name][row]
                if len(held) < base:
                    continue
                tail, kept = held[base:], []
                own = self.places[row] if self.places and name == "draft" else None
                own = list(range(len(tail))) if own is None else own
                for node in path:
                    slot = own[node] if node < len(own) else -1
                    if not 0 <= slot < len(tail):
                        break
                    kept.append(tail[slot])
                self.slots[name][row] = held[:base] + kept
            self.text[row] += self.fresh(len(path))
        self.places = None

    def retire(self, row: int) -> None:
        last = self.num_rows - 1
        kept: list[list[Any]] = [self.text, *self.slots.values(), *([self.places] if self.places else [])]
        for values in kept:
            values[row], values[last] = values[last], values[row]
        self.num_rows = last


class Pair:
    """A cache and its list model, driven by the same calls."""

    def __init__(self, kind: str, rows: int) -> None:
        self.cache = CACHES[kind](LAYERS, rows)
        self.lists = Lists(rows)

    def write(self, name: str, starts: list[int], width: int, valid: list[int]) -> None:
        rows = self.lists.num_rows
        texts = zip(self.lists.text[:rows], starts, strict=True)
        known = [text[start : start + width] for text, start in texts]
        tokens = [committed + self.lists.fresh(width - len(committed)) for committed in known]
        fresh = torch.tensor(tokens, dtype=torch.float64).view(rows, 1, width, 1)
        states = fresh.expand(rows, HEADS, width, DIM)
        with self.cache.writing(name, starts, width, valid) as write:
            read = write.read
            assert read == max(starts) + width
            view = write.view()
            assert view.get_seq_length() == read - width  # what some models count positions from
            assert view.get_mask_sizes(width, 0) == (read, 0)
            for layer in range(LAYERS[name]):
                keys, values = write.update(layer, states + 0.25 * layer, -states)
                assert keys.shape == values.shape == (rows, HEADS, read, DIM)
        for row, (start, count) in enumerate(zip(starts, valid, strict=True)):
            held = self.lists.slots[name][row]
            self.lists.slots[name][row] = held[:start] + fresh[row, 0, :count, 0].tolist()
            assert keys[row, 0, : start + count, 0].tolist() == [
                value + 0.25 * (LAYERS[name] - 1) for value in self.lists.slots[name][row]
            ]

    def write_row(self, name: str, row: int, start: int, width: int) -> None:
        """A pass over one row alone."""
        known = self.lists.text[row][start : start + width]
        fresh = torch.tensor(known + self.lists.fresh(width - len(known)), dtype=torch.float64)
        states = fresh[None, None, :, None].expand(1, HEADS, width, DIM)
        alone = self.cache.row(row)
        held = self.lists.slots[name][row]
        self.lists.slots[name][row] = held[:start] + fresh.tolist()
        with alone.writing(name, [start], width) as write:
            for layer in range(LAYERS[name]):
                keys, _ = write.update(layer, states + 0.25 * layer, -states)
            assert write.read == start + width
        assert keys[0, 0, :, 0].tolist() == [value + 0.25 * layer for value in self.lists.slots[name][row]]

    def check(self) -> None:
        lists, cache = self.lists, self.cache
        assert cache.num_rows == lists.num_rows
        assert list(cache.lengths) == lists.lengths
        for name in NAMES:
            assert cache.filled(name) == [len(held) for held in lists.slots[name][: lists.num_rows]]
            for row, held in enumerate(lists.slots[name]):
                wanted = torch.tensor(held[: lists.lengths[row]], dtype=torch.float64)[None, :, None]
                for layer, (keys, values) in enumerate(cache.layers(name, row)):
                    shape = (HEADS, wanted.shape[1], DIM)
                    assert torch.equal(keys, (wanted + 0.25 * layer).expand(shape))
                    assert torch.equal(values, (-wanted).expand(shape))


def _write(pair: Pair, draw: Callable[..., Any]) -> None:
    lists = pair.lists
    name = draw(st.sampled_from(NAMES))
    width = draw(st.integers(1, 4))
    starts, valid = [], []
    for row in range(lists.num_rows):
        held = len(lists.slots[name][row])
        starts.append(draw(st.integers(min(held, lists.lengths[row]), held)))
        valid.append(draw(st.integers(1, width)))
    pair.write(name, starts, width, valid)


def _write_row(pair: Pair, draw: Callable[..., Any]) -> None:
    lists = pair.lists
    name, row = draw(st.sampled_from(NAMES)), draw(st.integers(0, lists.num_rows - 1))
    held = len(lists.slots[name][row])
    pair.write_row(name, row, draw(st.integers(min(held, lists.lengths[row]), held)), draw(st.integers(1, 4)))


def _commit(pair: Pair, draw: Callable[..., Any]) -> None:
    lists = pair.lists
    paths = []
    for row in range(lists.num_rows):
        nodes = max(0, len(lists.slots["target"][row]) - lists.lengths[row])
        chosen = draw(st.lists(st.booleans(), min_size=nodes, max_size=nodes))
        paths.append([node for node, keep in enumerate(chosen) if keep])
    if draw(st.booleans()):
        _place(pair, draw)
    pair.cache.commit(paths)
    lists.commit(paths)


def _place(pair: Pair, draw: Callable[..., Any]) -> None:
    """The drafter ran its nodes in another order, or not at all."""
    slots = st.lists(st.integers(-1, 9), max_size=9, unique_by=lambda slot: slot if slot >= 0 else object())
    places: list[list[int]] = [draw(slots) for _ in range(pair.lists.num_rows)]
    pair.lists.places = list(places)
    pair.cache.place("draft", places)


def _rollback(pair: Pair, draw: Callable[..., Any]) -> None:
    lists = pair.lists
    pair.cache.rollback()
    lists.places = None
    for name in NAMES:
        for row in range(lists.num_rows):
            del lists.slots[name][row][lists.lengths[row] :]


def _truncate(pair: Pair, draw: Callable[..., Any]) -> None:
    lists = pair.lists
    row = draw(st.integers(0, lists.num_rows - 1))
    length = draw(st.integers(0, lists.lengths[row]))
    pair.cache.truncate(row, length)
    del lists.text[row][length:]
    if lists.places:
        lists.places[row] = None
    for name in NAMES:
        del lists.slots[name][row][length:]


def _retire(pair: Pair, draw: Callable[..., Any]) -> None:
    if pair.lists.num_rows > 1:
        row = draw(st.integers(0, pair.lists.num_rows - 1))
        pair.cache.retire(row)
        pair.lists.retire(row)


def _forget(pair: Pair, draw: Callable[..., Any]) -> None:
    pair.cache.forget("draft")
    pair.lists.places = None
    pair.lists.slots["draft"] = [[] for _ in pair.lists.text]


def _fork(pair: Pair, draw: Callable[..., Any]) -> None:
    lists = pair.lists
    if lists.num_rows == len(lists.text) <= 3:
        pair.cache.fork(2)
        lists.num_rows *= 2
        lists.text = [list(text) for text in lists.text for _ in range(2)]
        lists.places = lists.places and [own for own in lists.places for _ in range(2)]
        lists.slots = {name: [list(held) for held in rows for _ in range(2)] for name, rows in lists.slots.items()}


STEPS = (_write, _write, _write, _write_row, _commit, _commit, _place, _rollback, _truncate, _retire, _forget, _fork)


@everywhere
@settings(max_examples=150)
@given(data=st.data())
def test_random_histories(kind: str, data: st.DataObject) -> None:
    pair = Pair(kind, data.draw(st.integers(1, 4)))
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=4, max_size=16)):
        step(pair, data.draw)
        pair.check()
        if isinstance(pair.cache, PagedKVCache):
            pair.cache.pool.check_integrity()


@everywhere
def test_a_non_first_branch_is_moved_down_for_both_models(kind: str) -> None:
    pair = Pair(kind, 2)
    for name, width in (("target", 3), ("draft", 3)):
        pair.write(name, [0, 0], width, [width, width])
    for row, length in enumerate((3, 2)):
        pair.cache.set_length(row, length)
        pair.lists.set_length(row, length)
    pair.write("target", [3, 2], 6, [6, 6])
    pair.write("draft", [3, 2], 3, [3, 3])  # a drafter never runs its deepest level
    pair.cache.commit([[0, 2, 5], [0, 1]])
    pair.lists.commit([[0, 2, 5], [0, 1]])
    pair.check()
    assert pair.cache.filled("draft") == [5, 4]  # row 0 lags behind lengths 6: it never ran node 5


@everywhere
def test_a_failed_pass_moves_nothing(kind: str) -> None:
    pair = Pair(kind, 2)
    pair.write("target", [0, 0], 3, [3, 2])
    with pytest.raises(RuntimeError, match="out of something"), pair.cache.writing("target", [3, 2], 4):
        raise RuntimeError("out of something")
    assert pair.cache.filled("target") == [3, 2]


@everywhere
def test_misuse_is_refused(kind: str) -> None:
    cache = CACHES[kind](LAYERS, 2)
    misuses: list[tuple[str, Callable[[], object]]] = [
        ("hole", lambda: cache.writing("target", [1, 0], 2).__enter__()),
        ("one start for each", lambda: cache.writing("target", [0], 2).__enter__()),
        ("one path for each", lambda: cache.commit([[0]])),
        ("slots for each", lambda: cache.place("draft", [[0]])),
        ("cannot truncate", lambda: cache.truncate(0, 1)),
        ("not active", lambda: cache.retire(2)),
    ]
    for message, misuse in misuses:
        with pytest.raises(CacheStateError, match=message):
            misuse()
    assert list(cache.lengths) == [0, 0]


@everywhere
def test_the_contract_test_catches_a_commit_that_skips_the_gather(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls = type(CACHES[kind](LAYERS, 1))
    original = cls.commit
    monkeypatch.setattr(cls, "commit", lambda self, paths: original(self, [list(range(len(path))) for path in paths]))
    with pytest.raises(AssertionError):
        test_a_non_first_branch_is_moved_down_for_both_models(kind)
