"""The buffers of running rows against lists: padded prompts, growth, rows that come, finish and leave."""

from __future__ import annotations

import random

import pytest
import torch

from specdec.verify.rows import Rows


def check(rows: Rows, texts: dict[int, list[int]], padded: dict[int, list[int]]) -> None:
    """Every face of the live rows says the same as the lists; keys are original rows."""
    assert sorted(rows.live) == sorted(texts)
    live = [texts[row] for row in rows.live]
    assert rows.lengths() == [len(text) for text in live]
    if live:
        assert rows.roots().tolist() == [text[-1] for text in live]
        for width in (1, 2, 9):
            starts = [max(0, len(text) - width) for text in live]
            found = rows.window(starts, width)
            assert found.shape == (len(live), width)
            for own, text, start in zip(found.tolist(), live, starts, strict=True):
                assert own[: len(text) - start] == text[start:]
    for row, text in padded.items():
        assert rows.prefix(row).tolist() == text
        columns = rows.columns()[row, : len(texts.get(row, []))]
        if row in texts:
            assert rows.ids[row, columns].tolist() == texts[row]


@pytest.mark.parametrize("seed", range(12))
def test_a_padded_batch_grows_and_loses_rows(seed: int) -> None:
    """Text and columns differ by the pads; a buffer of exactly the prompt must grow in the first step."""
    draw = random.Random(seed)
    count, columns = draw.randint(1, 5), draw.randint(1, 6)
    prompt = torch.tensor([[draw.randint(1, 50) for _ in range(columns)] for _ in range(count)])
    real = torch.tensor([[i >= draw.choice([0, columns - 1]) for i in range(columns)] for _ in range(count)])
    real[:, -1] = True
    rows = Rows(prompt, real, capacity=draw.choice([0, columns, columns + 3]))
    padded = {row: prompt[row].tolist() for row in range(count)}
    texts = {row: prompt[row, real[row]].tolist() for row in range(count)}
    check(rows, texts, padded)
    for _ in range(14):
        if not rows.live:
            break
        runs = [[draw.randint(1, 50) for _ in range(draw.randint(0, 4))] for _ in rows.live]
        rows.extend(runs)
        for row, run in zip(rows.live, runs, strict=True):
            texts[row] += run
            padded[row] += run
        check(rows, texts, padded)
        if draw.random() < 0.2:
            place = draw.randrange(len(rows.live))
            gone, last = rows.live[place], rows.live[-1]
            rows.retire(place)
            del texts[gone]
            if gone != last:
                assert rows.live[place] == last  # as in the cache
            check(rows, texts, padded)


@pytest.mark.parametrize("seed", range(8))
def test_rows_join_and_leave(seed: int) -> None:
    draw = random.Random(seed)
    rows = Rows.empty(torch.device("cpu"), capacity=4)
    texts: dict[int, list[int]] = {}
    most = 0
    for _ in range(40):
        if len(texts) < 9 and draw.random() < 0.5:
            text = [draw.randint(1, 50) for _ in range(draw.randint(1, 12))]
            row = rows.join(text)
            assert row not in texts
            assert rows.live[-1] == row
            texts[row] = text
        elif texts and draw.random() < 0.5:
            place = draw.randrange(len(rows.live))
            del texts[rows.live[place]]
            rows.leave(place)
        elif texts:
            runs = [[draw.randint(1, 50) for _ in range(draw.randint(0, 3))] for _ in rows.live]
            rows.extend(runs)
            for row, run in zip(rows.live, runs, strict=True):
                texts[row] = texts[row] + run
        check(rows, texts, dict(texts))
        most = max(most, len(texts))
    assert rows.batch_size <= 2 * most + 4, "indices of rows that left are used again"


def test_every_index_is_handed_out_before_the_buffer_grows() -> None:
    rows = Rows.empty(torch.device("cpu"))
    assert sorted(rows.join([7]) for _ in range(4)) == [0, 1, 2, 3]
    assert rows.batch_size == 4
    assert sorted(rows.join([7]) for _ in range(4)) == [4, 5, 6, 7]
    assert rows.batch_size == 8
    for _ in range(5):
        rows.leave(0)
        rows.join([7])
    assert rows.batch_size == 8
