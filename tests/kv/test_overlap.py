"""Changes that several blocks rely on: in force from the first to the last of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from specdec.kv.overlap import overlapping


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1)])
def test_the_last_block_undoes_it_whichever_that_is(order: tuple[int, ...]) -> None:
    told: list[str] = []

    @contextmanager
    def change() -> Iterator[None]:
        told.append("made")
        yield
        told.append("undone")

    blocks = [ExitStack() for _ in order]
    for block in blocks:
        block.enter_context(overlapping("one", change))
    blocks[order[0]].close()
    blocks[order[1]].close()
    assert told == ["made"]
    with overlapping("another", change):
        assert told == ["made", "made"]
    blocks[order[2]].close()
    assert told == ["made", "made", "undone", "undone"]
    with overlapping("one", change):  # it can be made again
        assert told[4:] == ["made"]


def test_what_fails_is_not_counted() -> None:
    def fails() -> ExitStack:
        raise ValueError("no")

    @contextmanager
    def works() -> Iterator[None]:
        told.append("made")
        yield

    told: list[str] = []
    with pytest.raises(ValueError, match="no"), overlapping("it", fails):
        pass
    with overlapping("it", works):
        assert told == ["made"]
    with pytest.raises(KeyError), overlapping("it", works):  # an exception undoes it, too
        raise KeyError
    with overlapping("it", works):
        assert told == ["made"] * 3
