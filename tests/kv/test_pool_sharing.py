"""Texts that begin alike are kept once: forks, published prefixes, drafters that catch up, what is evicted first."""

from __future__ import annotations

import pytest
import torch
from pool_calls import LAYERS, SLOT_BYTES, keys_of, prefill, write

from specdec.kv import CacheStateError, KVPool, PagedKVCache
from specdec.kv.pool_pages import SequencePages


def test_a_fork_shares_all_pages_until_the_texts_part() -> None:
    pool = KVPool(LAYERS, page_size=4)
    first = pool.open()
    prefill(pool, first, 10)
    copies = [pool.fork(first) for _ in range(7)]
    assert pool.num_held_pages == 3
    for i, copy in enumerate(copies):
        write(pool, "target", [copy], [10], 10.0 + i, 1)
        PagedKVCache(pool, [copy]).commit([[0]])
    assert pool.num_held_pages == 3 + 7  # one half-full page each, two are common to all
    for i, copy in enumerate(copies):
        assert keys_of(pool, copy) == [1.0] * 10 + [10.0 + i]
    assert keys_of(pool, first) == [1.0] * 10
    pool.check_integrity()


def test_a_lagging_drafter_fills_common_pages_once() -> None:
    """Copies of one prompt: its pages stay common when the drafter catches up, in one pass or one after the other."""
    pool = KVPool(LAYERS, page_size=4)
    first = pool.open()
    prefill(pool, first, 8)
    copies = [first, *(pool.fork(first) for _ in range(3))]
    write(pool, "draft", copies[:2], [0, 0], 5.0, 8)
    assert pool.num_held_pages == 2
    write(pool, "draft", copies[2:], [0, 0], 6.0, 8)  # must not touch what others rely on
    assert pool.num_held_pages == 2
    assert [keys_of(pool, copy, "draft") for copy in copies] == [[5.0] * 8] * 4
    assert [pool.filled(copy, "draft") for copy in copies] == [8] * 4
    pool.check_integrity()


def test_a_prompt_of_64_requests_is_stored_once() -> None:
    prompt = list(range(1000, 1160))
    pool = KVPool(LAYERS, num_pages=400, page_size=16)
    leader = pool.open(prompt)
    assert pool.length(leader) == 0
    prefill(pool, leader, 160)
    pool.publish(leader, prompt)
    followers = [pool.open(prompt) for _ in range(63)]
    assert {pool.filled(row, "target") for row in followers} == {160}
    assert pool.num_held_pages == 10
    write(pool, "draft", followers, [0] * 63, 3.0, 160)
    assert pool.num_held_pages == 10
    one_slot = pool.page_bytes // 16
    assert one_slot == SLOT_BYTES
    assert pool.bytes_held == 160 * one_slot
    for i, row in enumerate(followers):
        prefill(pool, row, 163, 100.0 + i)
    assert pool.bytes_held == 160 * one_slot + 63 * pool.page_bytes  # each request adds its own last page
    assert all(keys_of(pool, row) == [1.0] * 160 + [100.0 + i] * 3 for i, row in enumerate(followers))
    pool.check_integrity()


def test_only_full_committed_pages_are_published() -> None:
    pool = KVPool(LAYERS, page_size=4)
    row, text = pool.open(), list(range(20))
    prefill(pool, row, 6)
    write(pool, "target", [row], [6], 2.0, 6)  # a draft: slots 6 to 11
    assert pool.publish(row, text) == 4
    assert pool.match_prefix(text) == 4
    PagedKVCache(pool, [row]).commit([[0, 1]])
    assert pool.publish(row, text) == 8
    assert pool.match_prefix(text) == 8
    assert pool.match_prefix([*text[:7], 99]) == 4
    assert pool.match_prefix(text[1:]) == 0


def test_texts_may_be_tensors() -> None:
    pool, text = KVPool(LAYERS, page_size=4), torch.arange(8)
    row = pool.open(text)
    prefill(pool, row, 8)
    assert pool.publish(row, text) == 8
    assert pool.match_prefix(text) == pool.match_prefix(text.tolist()) == 8


def test_a_closed_text_is_found_again_and_forgotten_last_page_first() -> None:
    pool = KVPool(LAYERS, num_pages=6, page_size=4)
    old, new = list(range(8)), list(range(50, 58))
    for text in (old, new):
        row = pool.open(text)
        prefill(pool, row, 8, text[0])
        pool.close(row, text)
    assert (pool.num_held_pages, pool.num_resting_pages, pool.num_free_pages) == (0, 4, 6)
    row = pool.open(old)
    assert keys_of(pool, row) == [0.0] * 8
    pool.close(row)  # the old text is now the one used last
    other = pool.open()
    prefill(pool, other, 12)  # two pages were never used, one must go
    assert (pool.match_prefix(old), pool.match_prefix(new)) == (8, 4)
    prefill(pool, other, 20)
    assert (pool.match_prefix(old), pool.match_prefix(new)) == (4, 0)
    pool.check_integrity()
    assert pool.evict() == 1
    assert pool.match_prefix(old) == 0


def test_a_second_copy_of_a_published_text_is_given_up() -> None:
    pool, text = KVPool(LAYERS, page_size=4), list(range(9))
    rows = [pool.open(text) for _ in range(2)]
    for row in rows:
        prefill(pool, row, 9)
    assert pool.num_held_pages == 6
    for row in rows:
        assert pool.publish(row, text) == 8
    assert pool.num_held_pages == 4
    pool.check_integrity()


def test_a_second_copy_that_knows_more_is_kept() -> None:
    """The published page lacks the drafter's K/V: going over to it would lose work."""
    pool, text = KVPool(LAYERS, page_size=4), list(range(8))
    rows = [pool.open(text) for _ in range(2)]
    for row in rows:
        prefill(pool, row, 8)
    write(pool, "draft", [rows[1]], [0], 5.0, 8)
    assert [pool.publish(row, text) for row in rows] == [8, 0]
    assert pool.filled(rows[1], "draft") == 8
    assert pool.filled(pool.open(text), "draft") == 0
    pool.check_integrity()


def test_a_second_copy_that_a_fork_holds_as_well_is_kept() -> None:
    pool, text = KVPool(LAYERS, page_size=4), list(range(8))
    rows = [pool.open(text) for _ in range(2)]
    for row in rows:
        prefill(pool, row, 8)
    copy = pool.fork(rows[1])
    assert [pool.publish(row, text) for row in (*rows, copy)] == [8, 0, 0]
    assert pool.num_held_pages == 4
    pool.check_integrity()


def _half_agreed(pool: KVPool) -> tuple[int, int]:
    """Two sequences on the same two pages, which agree on the first page only."""
    row = pool.open()
    prefill(pool, row, 4)
    write(pool, "target", [row], [4], 2.0, 4)
    copy = pool.fork(row)
    PagedKVCache(pool, [row]).commit([[0, 1, 2, 3]])
    return row, copy


def test_a_page_on_which_not_all_agree_is_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = KVPool(LAYERS, page_size=4)
    row, copy = _half_agreed(pool)
    assert pool.publish(row, range(8)) == 4
    write(pool, "target", [copy], [4], 9.0, 2)
    assert keys_of(pool, row) == [1.0] * 4 + [2.0] * 4
    pool.check_integrity()
    monkeypatch.setattr(SequencePages, "_all_agree", lambda self, sequence, i: True)
    pool = KVPool(LAYERS, page_size=4)
    row, copy = _half_agreed(pool)
    assert pool.publish(row, range(8)) == 8
    pool.set_length(copy, 8)
    with pytest.raises(CacheStateError, match="does not agree"):
        pool.check_integrity()


def test_forget_reaches_all_who_share_the_pages() -> None:
    pool, text = KVPool(LAYERS, page_size=4), list(range(8))
    row = pool.open(text)
    prefill(pool, row, 8)
    write(pool, "draft", [row], [0], float("nan"), 8)
    pool.publish(row, text)
    sharer, other = pool.open(text), pool.open()
    prefill(pool, other, 4)
    write(pool, "draft", [other], [0], 7.0, 4)
    PagedKVCache(pool, [row]).forget("draft")
    assert [pool.filled(number, "draft") for number in (row, sharer, other)] == [0, 0, 4]
    assert pool.filled(pool.open(text), "draft") == 0
    assert keys_of(pool, other, "draft") == [7.0] * 4
    pool.check_integrity()
