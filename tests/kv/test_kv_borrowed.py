"""A model that borrows another's K/V: it reads what the owner committed and leaves no trace in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from specdec.kv import CacheStateError, KVPool, PagedKVCache, SharedKVCache

LAYERS = {"target": 3, "self": 2}
BORROWS = {"self": "target"}
KINDS = ("contiguous", "paged")


def fresh(kind: str, rows: int) -> Any:
    if kind == "paged":
        return PagedKVCache.fresh(LAYERS, rows, 4, BORROWS)
    return SharedKVCache(LAYERS, rows, 8, borrows=BORROWS)


def run(cache: Any, name: str, starts: list[int], values: list[list[float]]) -> list[list[float]]:
    """One pass that writes these numbers; what its last layer read, per row."""
    states = torch.tensor(values, dtype=torch.float64)[:, None, :, None]
    with cache.writing(name, starts, states.shape[2]) as write:
        assert write.num_layers == LAYERS[name]
        for layer in range(LAYERS[name]):
            keys, read = write.update(layer, states, -states)
            assert torch.equal(keys.nan_to_num(), -read.nan_to_num())
    return [row.tolist() for row in keys[:, 0, :, 0]]


def held(cache: Any, name: str, row: int) -> list[list[float]]:
    return [keys[0, :, 0].tolist() for keys, _ in cache.layers(name, row)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_reads_the_targets_text_and_the_verify_pass_overwrites_it(kind: str) -> None:
    cache = fresh(kind, 2)
    run(cache, "target", [0, 0], [[1, 2, 3], [4, 5, 6]])
    for row in range(2):
        cache.set_length(row, 3)
    assert cache.filled("self") == [3, 3]
    assert run(cache, "self", [3, 3], [[10], [20]]) == [[1, 2, 3, 10], [4, 5, 6, 20]]
    assert run(cache, "self", [4, 4], [[11], [21]]) == [[1, 2, 3, 10, 11], [4, 5, 6, 20, 21]]
    assert cache.filled("self") == [5, 5]
    assert cache.filled("target") == [3, 3]
    assert run(cache, "target", [3, 3], [[30, 31, 32], [40, 41, 42]])[0] == [1, 2, 3, 30, 31, 32]
    assert cache.filled("self") == [3, 3]  # its tail is gone
    cache.commit([[0, 2], [0]])
    assert held(cache, "target", 0) == [[1, 2, 3, 30, 32]] * 3
    assert held(cache, "self", 1) == [[4, 5, 6, 40]] * 2
    assert cache.filled("self") == cache.filled("target") == [5, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_no_memory_of_its_own(kind: str) -> None:
    alone = SharedKVCache({"target": 3}, 1, 8) if kind == "contiguous" else PagedKVCache.fresh({"target": 3}, 1, 4)
    both = fresh(kind, 1)
    for cache in (alone, both):
        run(cache, "target", [0], [[1, 2, 3]])
        cache.set_length(0, 3)
    run(both, "self", [3], [[7]])
    assert both.num_bytes() == alone.num_bytes() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_it_may_write_nothing_that_is_committed(kind: str) -> None:
    cache = fresh(kind, 1)
    run(cache, "target", [0], [[1, 2, 3]])
    cache.set_length(0, 3)
    with pytest.raises(CacheStateError, match="behind its 3 committed slots only"):
        run(cache, "self", [2], [[9]])
    with pytest.raises(CacheStateError, match="hole"):
        run(cache, "self", [4], [[9]])
    cache.set_length(0, 4)  # the owner lags: its missing token is for the owner to write
    with pytest.raises(CacheStateError, match="hole"):
        run(cache, "self", [4], [[9]])
    assert held(cache, "target", 0) == [[1, 2, 3]] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_overwrites_is_no_longer_the_targets(kind: str) -> None:
    """Or a commit would keep the drafter's numbers as the target's."""
    cache = fresh(kind, 1)
    run(cache, "target", [0], [[1, 2, 3, 50, 51]])
    cache.set_length(0, 3)
    assert cache.filled("target") == [5]
    run(cache, "self", [3], [[9]])
    assert cache.filled("target") == [3]
    cache.commit([[0]])
    assert cache.filled("target") == [3]
    assert cache.lengths == [4]
    assert cache.filled("self") == [3]


@pytest.mark.parametrize("dropped", ["rollback", "truncate", "forget", "scrub", "forget the owner"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dropped_tail_leaves_nothing(kind: str, dropped: str) -> None:
    cache = fresh(kind, 2)
    run(cache, "target", [0, 0], [[1, 2, 3], [4, 5, 6]])
    for row in range(2):
        cache.set_length(row, 3)
    run(cache, "self", [3, 3], [[float("nan")], [float("nan")]])
    if dropped == "rollback":
        cache.rollback()
    elif dropped == "truncate":
        for row in range(2):
            cache.truncate(row, 2)
    elif dropped == "scrub":
        cache.scrub("self")
    else:
        cache.forget("self" if dropped == "forget" else "target")
    length = {"truncate": 2, "forget the owner": 0}.get(dropped, 3)
    assert cache.filled("self") == [length, length]
    if length == 3:
        assert held(cache, "self", 0) == [[1, 2, 3]] * 2
    if dropped in ("forget", "scrub"):  # hidden slots are multiplied by zero, and 0 * NaN is NaN
        read = run(cache, "target", [3, 3], [[7], [8]])
        assert not torch.tensor(read).isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_tails_move_with_their_rows(kind: str) -> None:
    cache = fresh(kind, 3)
    run(cache, "target", [0, 0, 0], [[1, 2], [3, 4], [5, 6]])
    for row in range(3):
        cache.set_length(row, 2)
    run(cache, "self", [2, 2, 2], [[10], [20], [30]])
    cache.retire(0)  # the last row takes its place
    assert run(cache, "self", [3, 3], [[31], [21]]) == [[5, 6, 30, 31], [3, 4, 20, 21]]
    assert cache.filled("self") == [4, 4]


def test_storage_that_grows_keeps_a_borrowed_tail() -> None:
    cache = SharedKVCache(LAYERS, 1, 4, borrows=BORROWS)
    run(cache, "target", [0], [[1, 2, 3]])
    cache.set_length(0, 3)
    run(cache, "self", [3], [[10]])
    assert run(cache, "self", [4], [[11]]) == [[1, 2, 3, 10, 11]]


def test_the_pool_keeps_its_books() -> None:
    pool = KVPool({**LAYERS, "draft": 1}, num_pages=8, page_size=4, borrows=BORROWS)
    assert pool.names == ("target", "self", "draft")
    rows = [pool.open(), pool.open()]
    cache = PagedKVCache(pool, rows)
    run(cache, "target", [0, 0], [[1, 2, 3, 4, 5]] * 2)
    for row in rows:
        pool.set_length(row, 5)
    pool.publish(rows[0], [1, 2, 3, 4, 5])
    run(cache, "self", [5, 5], [[7, 8, 9, 10]] * 2)
    pool.check_integrity()
    assert pool.filled(rows[0], "self") == 9
    assert pool.sequence(rows[0]).used == 9
    copy = pool.fork(rows[0])
    assert run(PagedKVCache(pool, [copy]), "self", [5], [[6]]) == [[1, 2, 3, 4, 5, 6]]
    pool.check_integrity()
    assert run(cache, "self", [9, 9], [[11]] * 2)[0] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]  # the copy wrote elsewhere
    pool.rollback()
    pool.check_integrity()
    assert pool.filled(rows[1], "self") == 5


@pytest.mark.parametrize("make", [SharedKVCache, KVPool])
@pytest.mark.parametrize(
    ("layers", "borrows"),
    [
        ({"a": 2, "b": 3}, {"b": "a"}),
        ({"a": 2}, {"b": "a"}),
        ({"a": 2, "b": 1}, {"b": "c"}),
        ({"a": 2, "b": 2, "c": 2}, {"b": "a", "c": "b"}),
    ],
)
def test_nobody_borrows_what_is_not_there(make: Any, layers: dict[str, int], borrows: dict[str, str]) -> None:
    rows: tuple[int, ...] = (1,) if make is SharedKVCache else ()
    with pytest.raises(CacheStateError, match="with storage of its own"):
        make(layers, *rows, borrows=borrows)


def test_places_of_a_borrower_are_its_own_business() -> None:
    cache: Any = fresh("contiguous", 1)
    run(cache, "target", [0], [[1]])
    cache.set_length(0, 1)
    cache.place("self", [[1, 0]])
    run(cache, "target", [1], [[5, 6]])
    cache.commit([[0, 1]])
    assert held(cache, "target", 0)[0] == [1, 5, 6]


def lenders(kind: str, rows: int) -> Any:
    """Two models that lend."""
    layers, borrows = {"target": 2, "self": 1, "draft": 2, "other": 2}, {"self": "target", "other": "draft"}
    if kind == "paged":
        return PagedKVCache.fresh(layers, rows, 4, borrows)
    return SharedKVCache(layers, rows, 8, borrows=borrows)


def write(
    cache: Any,
    name: str,
    starts: list[int],
    values: list[list[float]],
    valid: list[int] | None = None,
    broken: bool = False,
) -> list[list[float]]:
    """What the first layer read. broken: the pass fails behind it."""
    states = torch.tensor(values, dtype=torch.float64)[:, None, :, None]
    with cache.writing(name, starts, states.shape[2], valid) as written:
        read = [written.update(layer, states, states)[0][:, 0, :, 0] for layer in range(written.num_layers)]
        if broken:
            raise TypeError
    return [row.tolist() for row in read[0]]


@pytest.mark.parametrize("event", ["pass", "scrub", "forget"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_happens_to_one_lender_is_nothing_to_the_other(kind: str, event: str) -> None:
    cache = lenders(kind, 1)
    for owner in ("target", "draft"):
        write(cache, owner, [0], [[1, 2]])
    cache.set_length(0, 2)
    write(cache, "self", [2], [[10]])
    write(cache, "other", [2], [[20]])
    if event == "pass":
        write(cache, "target", [2], [[3]])
    else:
        getattr(cache, event)("target")
    assert cache.filled("other") == [3]
    assert cache.filled("self") == [0 if event == "forget" else 2]
    assert write(cache, "other", [3], [[21]]) == [[1, 2, 20, 21]]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_sit_a_borrowers_pass_out_keep_no_tail_that_padding_spoiled(kind: str) -> None:
    """Contiguous storage is written to at padding, too: such slots must not count as the owner's."""
    cache = fresh(kind, 2)
    run(cache, "target", [0, 0], [[1, 2], [3, 4]])
    for row in range(2):
        cache.set_length(row, 1)
    write(cache, "self", [1, 1], [[70, 71], [80, 81]], [0, 2])
    assert cache.filled("target") == [1 if kind == "contiguous" else 2, 1]
    cache.commit([[0], []])
    count = cache.filled("target")[0]
    assert held(cache, "target", 0)[0] == [1, 2][:count]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writer", ["target", "self"])
def test_a_pass_that_fails_costs_the_others_what_it_wrote_over(kind: str, writer: str) -> None:
    cache, other = fresh(kind, 1), "self" if writer == "target" else "target"
    run(cache, "target", [0], [[1, 2, 3]])
    cache.set_length(0, 3)
    run(cache, other, [3], [[50, 51]])
    with pytest.raises(TypeError):
        write(cache, writer, [3], [[9]], broken=True)
    assert cache.filled(other) == [3]
    assert cache.filled(writer) == [3]


def test_who_shares_pages_loses_the_tail_that_is_forgotten() -> None:
    cache = fresh("paged", 1)
    run(cache, "target", [0], [[1, 2]])
    cache.set_length(0, 2)
    run(cache, "self", [2], [[10]])
    copy = PagedKVCache(cache.pool, [cache.pool.fork(cache.sequences[0])])
    assert copy.filled("self") == [3]
    cache.forget("target")  # zeroes the page of both
    assert copy.filled("target") == copy.filled("self") == [0]
    cache.pool.check_integrity()


def test_a_borrowers_name_is_taken() -> None:
    pool = KVPool(LAYERS, page_size=4, borrows=BORROWS)
    with pytest.raises(CacheStateError, match="already has a model 'self'"):
        pool.add_model("self", 2)
