"""The Triton kernels, interpreted on the CPU, against float64: run by test_kernels.py in a process of its own.

By hand: TRITON_INTERPRET=1 python -m pytest tests/interpreted_kernels.py
"""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from attention_cases import AttentionCase, complaint, states
from triton_fixes import mend_interpreter

from specdec.verify.attention.launch import Tiles, triton_attention

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 must be set before triton is imported", allow_module_level=True)
mend_interpreter()

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Case = AttentionCase

SHAPES = [
    Case((70,), 1, "chain"),
    Case((70,), 5, "chain", heads=4, kv_heads=4),
    Case((0,), 6, "star"),
    Case((33,), 7, heads=8, kv_heads=1),
    Case((130, 130), 9, "comb"),
    Case((0, 3, 150), 6),
    Case((150, 64, 1, 63), 4, "star", head_dim=16),
    Case((40, 90), 12, heads=6, kv_heads=1, head_dim=64),  # 72 folded queries: several query blocks
    Case((20,), 70, "chain", head_dim=16),  # a tail of more than one block, deep
    Case((20,), 70, "star", head_dim=16),  # wide
    Case((50, 9), 5, head_dim=80),  # not a power of two
    Case((50, 9), 5, head_dim=48, value_dim=16),
    Case((50, 9), 5, head_dim=8),  # below the smallest tile
    Case((45, 10), 3, first=4),  # some levels of the tree are already in the tail
]
PAGED = [
    Case((70,), 6, page=1),
    Case((30, 0, 77), 6, page=7),
    Case((64, 15), 9, "comb", page=16),
    Case((100, 256, 300), 5, page=256, head_dim=16),
    Case((45, 10), 3, page=16, first=4),
]
WINDOWS = [
    Case((90, 4), 8, window=3),
    Case((150, 20), 9, "chain", window=70),
    Case((90, 33), 8, "comb", window=17, page=7),
]


def attend(case: AttentionCase, splits: int, tiles: Tiles | None = None) -> None:
    given = states(case)
    out = triton_attention(
        given.query, given.key, given.value, given.plan, given.scale, given.window, splits=splits, tiles=tiles
    )
    assert (problem := complaint(given, out)) is None, problem


@pytest.mark.parametrize("case", [*SHAPES, *PAGED, *WINDOWS], ids=str)
def test_float32_is_as_exact_as_sdpa(case: AttentionCase) -> None:
    attend(case, 2, Tiles(16, 32, 4, 2))


@pytest.mark.parametrize("case", [*SHAPES[2:6], PAGED[1], WINDOWS[2]], ids=str)
def test_without_splits_too(case: AttentionCase) -> None:
    attend(case, 1, Tiles(16, 32, 4, 2))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("case", [SHAPES[4], SHAPES[5], SHAPES[7], PAGED[1], WINDOWS[2]], ids=str)
def test_16_bit_is_as_exact_as_sdpa(case: AttentionCase, dtype: torch.dtype) -> None:
    attend(dataclasses.replace(case, dtype=dtype), splits=2)


@pytest.mark.parametrize("splits", [2, 8, 32])
def test_any_number_of_splits_gives_the_same(splits: int) -> None:
    """Including more splits than blocks, whose empty parts must weigh nothing."""
    attend(Case((130, 0), 5), splits, Tiles(16, 16, 4, 2))


@pytest.mark.parametrize("tiles", [Tiles(16, 16, 4, 2), Tiles(64, 64, 4, 2), Tiles(32, 128, 8, 3)], ids=str)
def test_any_tiles_give_the_same(tiles: Tiles) -> None:
    attend(Case((130, 31), 11, heads=8, kv_heads=1, head_dim=16), 2, tiles)


def test_default_tiles_and_splits() -> None:
    for dtype in (FP32, BF16):
        given = states(Case((300, 20), 7, heads=8, kv_heads=2, dtype=dtype))
        out = triton_attention(given.query, given.key, given.value, given.plan, given.scale)
        assert (problem := complaint(given, out)) is None, problem


def test_lengths_are_read_when_the_kernel_runs() -> None:
    """The same launch serves other lengths: nothing of them was decided on the host but an upper bound."""
    given = states(Case((40, 40), 4, "chain"))
    plan = dataclasses.replace(given.plan, lengths=given.plan.lengths.clone(), longest=40, equal=False)
    plan.lengths[1] = 21
    moved = dataclasses.replace(given, plan=plan)
    out = triton_attention(given.query, given.key, given.value, plan, given.scale, splits=2)
    assert (problem := complaint(moved, out)) is None, problem


class TestTheJudgeSeesErrors:
    """Negative controls: small mistakes must not pass."""

    def test_an_ancestor_too_many(self) -> None:
        given = states(Case((70,), 6, "star"))
        seen = given.plan.ancestors.clone()
        seen[0, 3, 2] = True
        wrong = dataclasses.replace(given.plan, ancestors=seen)
        out = triton_attention(given.query, given.key, given.value, wrong, given.scale, splits=1)
        assert complaint(given, out) is not None

    def test_a_slot_too_few(self) -> None:
        given = states(Case((70, 12), 3, "chain"))
        wrong = dataclasses.replace(given.plan, lengths=given.plan.lengths - torch.tensor([0, 1], dtype=torch.int32))
        out = triton_attention(given.query, given.key, given.value, wrong, given.scale, splits=1)
        assert complaint(given, out) is not None

    def test_a_window_one_longer(self) -> None:
        given = states(Case((90,), 8, "comb", window=17))
        out = triton_attention(given.query, given.key, given.value, given.plan, given.scale, 18, splits=1)
        assert complaint(given, out) is not None

    def test_another_page(self) -> None:
        given = states(Case((64, 15), 9, "comb", page=16))
        assert given.plan.table is not None
        wrong = dataclasses.replace(given.plan, table=given.plan.table.flip(0))
        out = triton_attention(given.query, given.key.nan_to_num(), given.value.nan_to_num(), wrong, given.scale)
        assert complaint(given, out) is not None
