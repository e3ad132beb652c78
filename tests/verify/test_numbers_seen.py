"""A look at some numbers sees every row and every column."""

from __future__ import annotations

import pytest
import torch

from specdec.verify.numbers_seen import Sampled, Summed


@pytest.mark.parametrize("shape", [(96, 72), (283, 1000), (300, 40), (129, 33), (7000,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float64])
def test_rows_columns_and_signs_are_seen(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    for axis, size in enumerate(shape[:2]):
        for place in {0, size // 3, size - 1}:
            look = Sampled(tensor)
            assert look.same()
            tensor.select(axis, place).neg_() if len(shape) > 1 else tensor.neg_()
            assert not look.same()


def test_nan_is_equal_to_itself() -> None:
    tensor = torch.full((100, 100), float("nan"))
    assert Sampled(tensor).same()


def test_a_part_of_a_weight_is_looked_at_where_it_lies() -> None:
    whole = torch.randn(200, 100)
    look = Sampled(whole[100:])
    whole[:100] = 0
    assert look.same()
    whole[150] = 0
    assert not look.same()


@pytest.mark.parametrize("shape", [(5, 8), (7, 9), (40, 96)])
def test_every_single_number_is_seen(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    look = Summed(weight)
    for place in range(weight.numel()):
        before = weight.view(-1)[place].clone()
        weight.view(-1)[place] = -before
        assert not look.same()
        weight.view(-1)[place] = before
    assert look.same()


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("shape", [(64, 576), (61, 83)])
def test_changes_that_leave_sums_of_rows_are_seen(shape: tuple[int, int], offset: int) -> None:
    size = shape[0] * shape[1]
    weight = torch.randn(offset + size, generator=torch.Generator().manual_seed(0))[offset:].view(shape)
    for exchanged in ([1, 3, 0, 2], [2, 3, 0, 1]):
        look = Summed(weight)
        weight[:, :4] = weight[:, exchanged]
        assert not look.same()
    for signs in (weight[3, 1:4:2], weight[3], weight[:, 5], weight[:2, 7]):
        look = Summed(weight)
        signs.neg_()
        assert not look.same()
        assert Summed(weight).same()
