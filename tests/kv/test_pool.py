"""What a KV pool promises, one test each: pages follow the text, nothing leaks from one holder to the next, limits."""

from __future__ import annotations

import models
import pytest
import torch
from pool_calls import LAYERS, keys_of, prefill, write

from specdec.kv import CacheStateError, KVPool, OutOfPagesError, PagedKVCache, UnsupportedArgumentError
from specdec.kv.versions import cached


def test_pages_follow_the_text() -> None:
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open()
    for length, pages in ((1, 1), (4, 1), (5, 2), (11, 3)):
        prefill(pool, row, length)
        assert pool.num_held_pages == pages
    write(pool, "target", [row], [11], 2.0, 6)
    assert pool.num_held_pages == 5
    PagedKVCache(pool, [row]).commit([[0, 2]])
    assert pool.length(row) == 13
    assert pool.num_held_pages == 4  # the page only the rejected nodes were in is free again
    pool.truncate(row, 3)
    assert pool.num_held_pages == 1
    pool.close(row)
    assert pool.num_held_pages == 0
    pool.check_integrity()


def test_what_was_left_in_a_page_does_not_reach_the_next_holder() -> None:
    """NaN of one sequence (a fault, a sick draft) must not become another's 0 * NaN."""
    pool = KVPool(LAYERS, num_pages=2, page_size=8)
    sick = pool.open()
    for name in LAYERS:
        write(pool, name, [sick], [0], float("nan"), 16)
    pool.close(sick)
    row = pool.open()
    prefill(pool, row, 3)
    write(pool, "draft", [row], [0], 1.0, 1)
    for name in LAYERS:
        start = pool.filled(row, name)
        assert not bool(write(pool, name, [row], [start], 1.0, 9).isnan().any())


def test_scrub_clears_a_sick_tail_and_nothing_of_others() -> None:
    pool = KVPool(LAYERS, page_size=8)
    row = pool.open()
    prefill(pool, row, 5)
    copy = pool.fork(row)
    write(pool, "target", [row], [5], float("nan"), 2)
    PagedKVCache(pool, [row]).scrub("target")
    assert pool.filled(row, "target") == 5
    assert not bool(write(pool, "target", [row], [5], 2.0, 1).isnan().any())
    assert keys_of(pool, copy) == [1.0] * 5


def test_running_out_changes_nothing() -> None:
    pool = KVPool(LAYERS, num_pages=5, page_size=4)
    rows = [pool.open(), pool.open()]
    for row in rows:
        prefill(pool, row, 8)
    before = [(list(pool.sequence(row).pages), pool.filled(row, "target")) for row in rows]
    with pytest.raises(OutOfPagesError, match=r"2 free pages.*1 of 5") as caught:
        write(pool, "target", rows, [8, 8], 2.0, 3)
    assert (caught.value.needed, caught.value.free) == (2, 1)
    with pytest.raises(OutOfPagesError):
        pool.extend(rows[0], 5)
    assert before == [(pool.sequence(row).pages, pool.filled(row, "target")) for row in rows]
    assert pool.pages_wanted(rows[0], 4) == 1
    pool.extend(rows[0], 4)
    assert pool.num_free_pages == 0
    write(pool, "target", rows[:1], [8], 2.0, 4)  # what was reserved is there
    with pytest.raises(OutOfPagesError):
        write(pool, "target", rows[1:], [8], 2.0, 1)
    pool.close(rows[0])
    write(pool, "target", rows[1:], [8], 2.0, 1)
    pool.check_integrity()


def test_running_out_of_memory_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that cannot grow: no page is lost, and the next attempt goes on where this one stopped."""
    pool = KVPool(LAYERS, page_size=4, first_pages=2)
    row = pool.open()
    prefill(pool, row, 8)
    write(pool, "draft", [row], [0], 1.0, 8)
    grown: list[int] = []
    original = torch.Tensor.new_zeros

    def new_zeros(self: torch.Tensor, *shape: int) -> torch.Tensor:
        grown.append(len(grown))
        if len(grown) == 3:
            raise torch.OutOfMemoryError("no memory")
        return original(self, *shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_zeros", new_zeros)
        with pytest.raises(torch.OutOfMemoryError):
            write(pool, "target", [row], [8], 2.0, 5)
    assert pool.num_held_pages == 2
    pool.check_integrity()
    write(pool, "target", [row], [8], 2.0, 5)
    PagedKVCache(pool, [row]).commit([[0, 4]])
    assert keys_of(pool, row) == [1.0] * 8 + [2.0] * 2
    assert keys_of(pool, row, "draft") == [1.0] * 8
    pool.check_integrity()


def test_a_pool_keeps_to_its_bytes() -> None:
    target, draft = models.target("llama-gqa", "fp32"), models.target("llama-mqa", "fp64")
    pool = KVPool.sized({"target": target, "draft": draft}, num_bytes=200_000, page_size=4)
    rows = [pool.open()]
    cache = PagedKVCache(pool, rows)
    for name, model in (("target", target), ("draft", draft)):
        with cache.writing(name, [0], 5) as write, torch.no_grad():
            ids = torch.ones(1, 5, dtype=torch.int64)
            model(input_ids=ids, **cached(model, write.view()))
    assert pool.num_pages is not None
    assert 200_000 - pool.page_bytes < pool.num_bytes() <= 200_000
    assert pool.num_bytes() == (pool.num_pages + 1) * pool.page_bytes
    with pytest.raises(UnsupportedArgumentError, match="room for one page"):
        KVPool.sized({"target": target}, num_bytes=100)


def test_misuse_is_refused() -> None:
    with pytest.raises(UnsupportedArgumentError, match="1 to 256"):
        KVPool(LAYERS, page_size=257)
    with pytest.raises(UnsupportedArgumentError, match="at least 1"):
        KVPool(LAYERS, num_pages=0)
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open()
    prefill(pool, row, 8)
    pool.publish(row, [1, 2, 3, 4, 5, 6, 7, 8])
    with pytest.raises(CacheStateError, match="published before"):
        pool.publish(row, [1, 2, 3, 4, 5, 6, 7, 9])
    with pytest.raises(CacheStateError, match="an open sequence"):
        pool.close(row + 1)
    with pytest.raises(CacheStateError, match="cannot truncate"):
        pool.truncate(row, 9)
    with pytest.raises(CacheStateError, match="one of the pool's models"):
        pool.filled(row, "other")
    with pytest.raises(CacheStateError, match="already has"):
        pool.add_model("draft", 1)
    with pytest.raises(CacheStateError, match="row 0 already"):
        PagedKVCache(pool, [row, row])


def test_models_and_rows_come_and_go() -> None:
    pool = KVPool({"target": 2}, page_size=4)
    rows = [pool.open() for _ in range(3)]
    cache = PagedKVCache(pool, rows, names={"draft": "draft-b"})
    pool.add_model("draft-b", 1)
    assert cache.filled("draft") == [0, 0, 0]
    with cache.writing("draft", [0, 0, 0], 1) as write:
        assert write.num_layers == 1
        write.update(0, torch.ones(3, 1, 1, 2), torch.ones(3, 1, 1, 2))
    assert pool.stores["draft-b"].keys[0] is not None
    cache.rollback()
    assert cache.leave(0) == rows[0]
    assert cache.sequences == [rows[2], rows[1]]
    cache.retire(0)
    assert cache.join(rows[0]) == 1
    assert cache.sequences == [rows[1], rows[0], rows[2]]
    assert cache.num_rows == 2


def test_a_shorter_declared_length_gives_pages_back() -> None:
    pool = KVPool(LAYERS, num_pages=8, page_size=4)
    row = pool.open()
    prefill(pool, row, 14)
    write(pool, "draft", [row], [0], 1.0, 14)
    assert pool.num_held_pages == 4
    pool.set_length(row, 5)
    assert (pool.num_held_pages, pool.num_free_pages) == (2, 6)
    assert (pool.length(row), pool.filled(row, "target"), pool.filled(row, "draft")) == (5, 5, 5)
    pool.check_integrity()
    prefill(pool, row, 9, 2.0)
    assert keys_of(pool, row) == [1.0] * 5 + [2.0] * 4


def test_a_pool_that_was_reset_is_as_good_as_new() -> None:
    pool = KVPool(LAYERS, num_pages=4, page_size=4)
    row = pool.open()
    prefill(pool, row, 8)
    pool.publish(row, range(8))
    write(pool, "target", [row], [8], float("nan"), 4)
    pool.allocator.take(1)  # as if a change had been interrupted
    pool.reset()
    pool.check_integrity()
    assert (pool.num_free_pages, pool.match_prefix(range(8))) == (4, 0)
    with pytest.raises(CacheStateError, match="open sequence"):
        pool.length(row)
    fresh = pool.open()
    keys = write(pool, "target", [fresh], [0], 1.0, 6)
    assert not bool(keys.isnan().any())
