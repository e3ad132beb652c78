"""Pages of a pool when texts part: what others rely on is copied first, what is one's own is written in place."""

from __future__ import annotations

import pytest
import torch
from pool_calls import DIM, HEADS, LAYERS, keys_of, prefill, write

from specdec.kv import KVPool, PagedKVCache
from specdec.kv.pool_pages import SequencePages
from specdec.kv.prefix import PrefixIndex

TEXT = list(range(8))


def published(size: int = 4) -> tuple[KVPool, int]:
    """A pool in which one sequence holds eight published slots with value 1."""
    pool = KVPool(LAYERS, page_size=size)
    row = pool.open(TEXT)
    prefill(pool, row, 8)
    write(pool, "draft", [row], [0], 1.0, 8)
    assert pool.publish(row, TEXT) == 8
    return pool, row


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_other_text_goes_to_a_copy_of_a_published_page(size: int, length: int) -> None:
    """Nobody else holds the page; the index alone relies on it."""
    pool, row = published(size)
    pool.truncate(row, length)
    before = list(pool.sequence(row).pages)
    prefill(pool, row, 8, value=2.0)
    write(pool, "draft", [row], [length], 3.0, 8 - length)
    assert pool.sequence(row).pages[: length // size] == before[: length // size]
    assert keys_of(pool, row) == [1.0] * length + [2.0] * (8 - length)
    assert keys_of(pool, row, "draft") == [1.0] * length + [3.0] * (8 - length)
    other = pool.open(TEXT)
    assert pool.length(other) == 8
    assert keys_of(pool, other) == keys_of(pool, other, "draft") == [1.0] * 8
    pool.check_integrity()


def test_a_published_page_that_is_not_copied_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    original = SequencePages._missing

    def unpublished(self: SequencePages, spans: object) -> object:
        index, self._index = self._index, PrefixIndex(4)
        try:
            return original(self, spans)  # type: ignore[arg-type]
        finally:
            self._index = index

    monkeypatch.setattr(SequencePages, "_missing", unpublished)
    with pytest.raises(AssertionError):
        test_other_text_goes_to_a_copy_of_a_published_page(4, 5)


def test_a_draft_in_a_published_page_is_scrubbed_in_a_copy() -> None:
    pool, row = published()
    pool.truncate(row, 6)
    write(pool, "target", [row], [6], float("nan"), 2)
    PagedKVCache(pool, [row]).scrub("target")
    assert not bool(write(pool, "target", [row], [6], 2.0, 1).isnan().any())
    assert keys_of(pool, pool.open(TEXT)) == [1.0] * 8
    pool.check_integrity()


def test_a_scrub_leaves_published_slots_behind_a_cut() -> None:
    pool, row = published()
    pool.truncate(row, 6)
    PagedKVCache(pool, [row]).scrub("target")
    assert keys_of(pool, pool.open(TEXT)) == [1.0] * 8


def test_what_a_lagging_drafter_adds_to_a_published_page_is_found_with_it() -> None:
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open(TEXT)
    prefill(pool, row, 8)
    pool.publish(row, TEXT)
    write(pool, "draft", [row], [0], 4.0, 8)
    other = pool.open(TEXT)
    assert pool.filled(other, "draft") == 8
    assert keys_of(pool, other, "draft") == [4.0] * 8


def test_the_last_holder_of_a_page_needs_no_copy() -> None:
    """Both part in one pass: one goes to the only page left, the other one stays."""
    pool = KVPool(LAYERS, num_pages=2, page_size=4)
    row = pool.open()
    prefill(pool, row, 3)
    copy = pool.fork(row)
    write(pool, "target", [row, copy], [3, 3], 2.0, 1)
    assert pool.num_held_pages == 2
    pool.check_integrity()


def test_a_dropped_draft_is_no_text_that_others_rely_on() -> None:
    """It lay in a page when that was shared; the token declared for its slot is written all the same."""
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open()
    prefill(pool, row, 3)
    write(pool, "draft", [row], [0], 1.0, 3)
    write(pool, "draft", [row], [3], 7.0, 1)
    pool.fork(row)
    pool.rollback()
    pool.set_length(row, 4)
    pool.fork(row)
    write(pool, "draft", [row], [3], 9.0, 1)
    assert keys_of(pool, row, "draft") == [1.0] * 3 + [9.0]
    pool.check_integrity()


def test_a_kept_branch_is_moved_in_a_copy_of_what_a_fork_holds() -> None:
    """Commit moves slots: in pages that another holder of the same tail still reads."""
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open()
    prefill(pool, row, 3)
    for i in range(3):
        write(pool, "target", [row], [3 + i], 10.0 + i, 1)
    copy = pool.fork(row)
    PagedKVCache(pool, [row]).commit([[0, 2]])
    PagedKVCache(pool, [copy]).commit([[0, 1, 2]])
    assert keys_of(pool, row) == [1.0] * 3 + [10.0, 12.0]
    assert keys_of(pool, copy) == [1.0] * 3 + [10.0, 11.0, 12.0]
    pool.check_integrity()


def test_a_fork_knows_where_the_nodes_of_its_tail_lie() -> None:
    """The drafter ran three nodes in the order 2, 0, 1; both holders of that tail keep another path of it."""
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open()
    prefill(pool, row, 2)
    write(pool, "draft", [row], [0], 1.0, 2)
    for i, node in enumerate((2, 0, 1)):
        write(pool, "target", [row], [2 + i], 20.0 + i, 1)
        write(pool, "draft", [row], [2 + i], 30.0 + node, 1)
    PagedKVCache(pool, [row]).place("draft", [[1, 2, 0]])
    copy = pool.fork(row)
    PagedKVCache(pool, [row]).commit([[0, 2]])
    PagedKVCache(pool, [copy]).commit([[0, 1]])
    assert keys_of(pool, row, "draft") == [1.0, 1.0, 30.0, 32.0]
    assert keys_of(pool, copy, "draft") == [1.0, 1.0, 30.0, 31.0]
    pool.rollback()
    write(pool, "draft", [copy], [4], 9.0, 1)
    PagedKVCache(pool, [copy]).commit([[0]])  # placed no longer
    assert keys_of(pool, copy, "draft")[-1] == 9.0


def test_own_pages_are_written_in_place() -> None:
    pool, row = published()
    pool.close(row)
    own = pool.open()
    prefill(pool, own, 6)
    pages = list(pool.sequence(own).pages)
    pool.truncate(own, 5)
    prefill(pool, own, 7, 2.0)
    assert pool.sequence(own).pages == pages
    copy = pool.fork(own)
    pool.close(copy)  # shared for a while
    pool.truncate(own, 5)
    prefill(pool, own, 7, 3.0)
    assert pool.sequence(own).pages == pages
    assert keys_of(pool, own) == [1.0] * 5 + [3.0] * 2


def test_the_text_used_longest_ago_goes_first_and_its_last_page_before_its_first() -> None:
    pool = KVPool(LAYERS, num_pages=9, page_size=2)
    texts = [[10 * i + j for j in range(6)] for i in range(3)]
    for text in texts:
        row = pool.open(text)
        prefill(pool, row, 6)
        pool.close(row, text)
    reader = pool.open(texts[0][:4])  # the first two pages of the first text are in use again
    pool.close(reader)
    found = []
    for _ in range(9):
        assert pool.evict(1) == 1
        found.append([pool.match_prefix(text) for text in texts])
        pool.check_integrity()
    assert found == [
        [4, 6, 6], [4, 4, 6], [4, 2, 6], [4, 0, 6], [4, 0, 4], [4, 0, 2], [4, 0, 0], [2, 0, 0], [0, 0, 0],
    ]  # fmt: skip


def test_declaring_the_length_there_is_leaves_the_tail() -> None:
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open()
    prefill(pool, row, 3)
    write(pool, "target", [row], [3], 2.0, 3)
    pool.set_length(row, 3)
    assert pool.filled(row, "target") == 6
    pool.set_length(row, 5)
    assert keys_of(pool, row) == [1.0] * 3 + [2.0] * 2


def test_a_row_that_leaves_takes_no_retired_one_along() -> None:
    pool = KVPool(LAYERS, page_size=4)
    rows = [pool.open() for _ in range(4)]
    cache = PagedKVCache(pool, rows)
    cache.retire(3)
    assert cache.leave(0) == rows[0]
    assert cache.sequences == [rows[2], rows[1], rows[3]]
    assert cache.num_rows == 2
    cache.revive()
    assert cache.num_rows == 3


def test_what_was_held_at_most_counts_texts_that_were_found_again() -> None:
    pool = KVPool(LAYERS, page_size=4)
    for text in (TEXT, [50, 51, 52, 53]):
        row = pool.open(text)
        prefill(pool, row, len(text))
        pool.close(row, text)
    assert pool.peak_bytes_held == 2 * pool.page_bytes
    pool.open(TEXT)
    pool.open([50, 51, 52, 53])
    assert pool.peak_bytes_held == 3 * pool.page_bytes == pool.bytes_held


def test_a_model_that_comes_late_has_room_for_every_page() -> None:
    pool = KVPool({"target": 2}, page_size=4, first_pages=1)
    row = pool.open()
    prefill(pool, row, 30)
    pool.add_model("draft", 1)
    assert pool.filled(row, "draft") == 0
    write(pool, "draft", [row], [0], 5.0, 30)
    assert keys_of(pool, row, "draft") == [5.0] * 30


def test_a_page_of_a_gone_text_is_nobodys_settled_text() -> None:
    """A page that was published, evicted and taken again is filled by its new holder, also for those who share it."""
    pool = KVPool(LAYERS, num_pages=2, page_size=4)
    row = pool.open(TEXT)
    prefill(pool, row, 8)
    pool.close(row, TEXT)
    pool.evict()
    own = pool.open()
    prefill(pool, own, 1, 2.0)
    copies = [own, pool.fork(own)]
    for copy in copies:
        pool.set_length(copy, 1)
    write(pool, "draft", copies, [0, 0], 3.0, 1)
    assert [keys_of(pool, copy, "draft") for copy in copies] == [[3.0]] * 2
    pool.check_integrity()


@pytest.mark.parametrize("length", [3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("width", [1, 4, 5])
def test_passes_end_and_begin_anywhere_in_a_page(length: int, width: int) -> None:
    """Two rows, one of them padded to the other's width: what is stored, what is read, and which pages are taken."""
    pool = KVPool(LAYERS, page_size=4)
    rows = [pool.open(), pool.open()]
    for row in rows:
        prefill(pool, row, length, value=float(row))
    cache = PagedKVCache(pool, rows)
    states = torch.arange(2.0 * width, dtype=torch.float64).view(2, 1, width, 1).expand(2, HEADS, width, DIM) + 100
    with cache.writing("target", [length, length - 2], width, [width, 1]) as write:
        for layer in range(2):
            keys, _ = write.update(layer, states, -states)
    assert write.read == length + width
    assert keys[0, 0, :, 0].tolist() == [float(rows[0])] * length + states[0, 0, :, 0].tolist()
    assert keys[1, 0, : length - 1, 0].tolist() == [float(rows[1])] * (length - 2) + [100.0 + width]
    assert pool.filled(rows[1], "target") == length - 1
    assert write.table is not None
    table = write.table.tolist()
    assert table[0] == pool.sequence(rows[0]).pages
    assert [len(pool.sequence(row).pages) for row in rows] == [-(-(length + width) // 4), -(-length // 4)]
    pool.check_integrity()


@pytest.mark.parametrize("reserved", [0, 8])
def test_text_that_no_model_holds_is_not_published(reserved: int) -> None:
    """A length that was declared ahead of the passes, with pages for it or without."""
    pool = KVPool(LAYERS, page_size=4)
    row = pool.open(TEXT)
    pool.extend(row, reserved)
    pool.set_length(row, 8)
    assert pool.publish(row, TEXT) == 0
    write(pool, "draft", [row], [0], 1.0, 5)  # one model, one page and a slot of the next
    assert pool.publish(row, TEXT) == 4
    assert pool.match_prefix(TEXT) == 4
    pool.check_integrity()
