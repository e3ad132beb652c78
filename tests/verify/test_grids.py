"""Weights on grids of few bits are found and given back bit for bit; a number beside the grid is noticed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from specdec.verify import grids
from specdec.verify.packed import Packed

ROWS, WIDTH = 24, 160


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def half(x: Tensor) -> Tensor:
    return x.half().float()


def in_groups(weight: Tensor, group: int = 32) -> Tensor:
    return weight.unflatten(1, (-1, group))


def q8_0(weight: Tensor) -> Tensor:
    """As GGUF's reference rounds: the largest number of a group has the code 127 or -127."""
    groups = in_groups(weight)
    step = groups.abs().amax(-1, keepdim=True) / 127
    return (half(step) * ((groups / step).round() + 0.0)).flatten(1)


def q4_0(weight: Tensor) -> Tensor:
    """The number furthest from 0 has the code -8, whatever its sign: scales may be negative, zeros too."""
    groups = in_groups(weight)
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    step = furthest / -8
    return (half(step) * ((groups / step + 8.5).floor().clamp(max=15) - 8)).flatten(1)


def q4_1(weight: Tensor) -> Tensor:
    groups = in_groups(weight)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / 15
    return (half(step) * ((groups - low) / step).round().clamp(0, 15) + half(low)).flatten(1)


def whole_rows(weight: Tensor) -> Tensor:
    """int8 by rows, with float32 scales, as quantisers of linear layers make it."""
    step = weight.abs().amax(-1, keepdim=True) / 127
    return step * ((weight / step).round() + 0.0)


def in_128(weight: Tensor) -> Tensor:
    """int4 in groups of 128, from -8 to 7, with float16 scales, as GPTQ has it."""
    groups = weight.unflatten(1, (-1, 128)) if weight.shape[1] % 128 == 0 else weight[:, None]
    step = half(groups.abs().amax(-1, keepdim=True) / 7)
    return (step * ((groups / step).round().clamp(-8, 7) + 0.0)).flatten(1)


FORMATS: dict[str, tuple[Callable[[Tensor], Tensor], int, int, int]] = {  # width, bits and group that are found
    "Q8_0": (q8_0, 160, 8, 32),
    "Q4_0": (q4_0, 160, 4, 32),
    "Q4_1": (q4_1, 160, 4, 32),
    "int8 by rows": (whole_rows, 571, 8, 571),
    "int4 in groups of 128": (in_128, 256, 4, 128),
}


def found(weight: Tensor) -> Packed | None:
    """What is found, held against the weight."""
    packed = grids.exactly(weight)
    if packed is not None:
        assert torch.equal(packed.dequantized().view(torch.int32), weight.contiguous().view(torch.int32))
    return packed


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_on_a_grid_are_found_on_it(name: str) -> None:
    made, width, bits, group = FORMATS[name]
    packed = found(made(numbers(300, width)))
    assert packed is not None
    assert (packed.bits, packed.group) == (bits, group)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_single_number_beside_the_grid_is_noticed(name: str, place: int) -> None:
    """In a row that is not among those looked at first, and in one that is."""
    made, width, *_ = FORMATS[name]
    weight = made(numbers(300, width))
    number = weight[place, place]
    weight[place, place] = torch.nextafter(number, number + 1)
    assert found(weight) is None


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_groups_that_are_not_as_most_are(name: str) -> None:
    """Constant, zero, of few steps, huge and tiny (scales are subnormal float16 numbers)."""
    weight = numbers(ROWS, WIDTH)
    made = FORMATS[name][0]
    weight[3] *= 1e-4
    weight[4] *= 3000
    weight = made(weight)
    weight[0] = 0.0
    weight[1, :32] = 0.25
    weight[2, 32:64] = (torch.arange(32) % 3 - 1) * 0.5
    weight[5, 64:96] = 0.0
    assert found(weight) is not None


def test_codes_that_leave_the_ends_of_their_range_unused() -> None:
    """As rounding with weighted errors leaves them: GGUF's Q4_K, with scales and offsets that are themselves products,
    and Q5_0."""
    seed = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (ROWS, 5, 32), generator=seed)
    codes[::2] = codes[::2].clamp(2, 13)
    scale = half(numbers(ROWS, 1, 1).abs() / 4096) * torch.randint(1, 64, (ROWS, 5, 1), generator=seed)
    offset = half(numbers(ROWS, 1, 1, seed=1).abs() / 4096) * torch.randint(0, 64, (ROWS, 5, 1), generator=seed)
    packed = found((scale * codes - offset).flatten(1))
    assert packed is not None
    assert packed.bits == 4
    assert packed.offsets is not None
    codes = torch.randint(-16, 16, (ROWS, 5, 32), generator=seed)
    packed = found((half(numbers(ROWS, 5, 1)) * codes).flatten(1))
    assert packed is not None
    assert packed.bits == 8
    assert packed.offsets is None


def test_zeros_keep_their_sign() -> None:
    weight = q4_0(numbers(ROWS, WIDTH))
    assert bool((weight.view(torch.int32) == torch.tensor(-0.0).view(torch.int32)).any())
    assert found(weight) is not None
    weight[0] = -0.0
    assert found(weight) is not None
    weight[0, 0] = 0.0  # both in one group, and nothing else
    assert found(weight) is None


@pytest.mark.parametrize("width", [33, 95, 161])
def test_rows_that_end_within_a_group(width: int) -> None:
    for made in (q8_0, q4_1):
        packed = found(made(numbers(ROWS, 192))[:, :width].contiguous())
        assert packed is None or packed.shape == (ROWS, width)
    weight = q8_0(numbers(ROWS, 192))
    weight[:, 160] = weight[:, :32].amax(-1)  # a last group of one number is on every grid
    assert found(weight[:, :161].contiguous()) is not None


def test_a_weight_whose_rows_are_not_side_by_side() -> None:
    assert found(q8_0(numbers(64, 64)).t().contiguous().t()) is not None


def test_what_is_on_no_grid() -> None:
    assert found(numbers(64, 160)) is None
    assert found(numbers(64, 160).bfloat16().float()) is None
    assert found(numbers(64, 31)) is None
    assert found(numbers(64, 160)[:0]) is None
    assert found(q8_0(numbers(64, 160)).bfloat16()) is None
    for sick in (float("nan"), float("inf")):
        for every in (True, False):
            weight = q8_0(numbers(64, 160))
            weight[1 if every else 0, slice(None) if every else 3] = sick
            assert found(weight) is None


def test_where_a_product_would_be_rounded_nothing_is_packed_with_offsets() -> None:
    """A fused product and sum is another number there."""
    scale = numbers(ROWS, 5, 1).abs() + 0.1
    codes = torch.randint(0, 16, (ROWS, 5, 32), generator=torch.Generator().manual_seed(2))
    weight = (scale * codes + numbers(ROWS, 5, 1, seed=3)).flatten(1)
    packed = found(weight)
    assert packed is None or packed.offsets is None
    weight = (half(scale) * codes + half(numbers(ROWS, 5, 1, seed=3))).flatten(1)
    packed = found(weight)
    assert packed is not None
    assert packed.offsets is not None
    exact = packed.integers().double().unflatten(1, (-1, 32)) * packed.scales.double()[..., None]
    assert torch.equal(exact, exact.float().double())


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_the_formats_of_gguf_by_its_own_package(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    kinds = pytest.importorskip("gguf").GGMLQuantizationType
    given = numbers(64, 256).numpy()
    data = quants.quantize(given, kinds[kind])
    weight = torch.from_numpy(np.array(quants.dequantize(data, kinds[kind])))
    packed = found(weight)
    assert packed is not None
    assert packed.bits == (4 if kind.startswith("Q4") else 8)
    assert packed.num_bytes < 0.32 * weight.nbytes
