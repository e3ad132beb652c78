"""Counter-based noise: the published cipher, uniform, independent across every key word, never torch's own state."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from exact_law import noisy_copy, tiny_llama
from scipy.stats import chi2, norm
from stats import ALPHA

from specdec import Speculator
from specdec.verify import NoiseStream
from specdec.verify.noise import Role, uniform

MASK = 0xFFFFFFFF
CPU = torch.device("cpu")


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox-4x32-10 on Python integers, straight from Salmon et al. (SC'11), section 3.3."""
    x = list(counter)
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return tuple(x)


def scalar_uniform(seed: int, request: int, step: int, role: int, index: int) -> float:
    words = philox((index, step, request, role), (seed & MASK, (seed >> 32) & MASK))
    return ((words[0] >> 6) * 2**26 + (words[1] >> 6)) * 2.0**-52


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    """The known-answer vectors of Random123, for the scalar reference and for the tensor code."""
    assert philox(counter, key) == words
    index, step, request, role = counter
    seed = key[0] | key[1] << 32
    signed = seed - 2**64 if seed >= 2**63 else seed
    drawn = uniform(torch.tensor(signed), request, step, role, torch.tensor([index]))
    assert drawn.tolist() == [((words[0] >> 6) * 2**26 + (words[1] >> 6)) * 2.0**-52]


def test_equals_the_scalar_reference_on_random_keys() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        seed = int(generator.integers(0, 2**62))
        request, step, index = (int(generator.integers(0, 2**31)) for _ in range(3))
        role = int(generator.integers(0, 4))
        assert uniform(seed, request, step, role, torch.tensor([index])).tolist() == [
            scalar_uniform(seed, request, step, role, index)
        ]


def test_table_equals_direct_evaluation_across_blocks_and_widths() -> None:
    seeds, requests = [3, 2**63 + 5, -1], [0, 7, 2]
    stream = NoiseStream(seeds, requests, CPU)
    for step in (0, 1, stream.BLOCK - 1, stream.BLOCK, 3 * stream.BLOCK + 2, 1):
        for rows, count in (([0, 1, 2], 3), ([2, 0], 20), ([1], 1)):
            noise = stream.accept(rows, step, count)
            for i, row in enumerate(rows):
                key = (seeds[row] % 2**64, requests[row], step)
                assert noise.accept[i].tolist() == [scalar_uniform(*key, Role.ACCEPT, n) for n in range(count)]
                assert noise.residual[i].item() == scalar_uniform(*key, Role.RESIDUAL, 0)
                drafted = stream.draft(rows, step, count)[i].tolist()
                assert drafted == [scalar_uniform(*key, Role.DRAFT, n) for n in range(count)]


def test_many_rows_tabulate_fewer_steps_and_the_same_numbers() -> None:
    rows = 3 * NoiseStream.BLOCK_ENTRIES // 2
    big = NoiseStream([9] * rows, range(rows), CPU)
    picked = [0, 5, rows - 1]
    for step in (0, 1, 40):
        small = NoiseStream([9] * 3, picked, CPU)
        assert torch.equal(big.accept(picked, step, 4).accept, small.accept([0, 1, 2], step, 4).accept)


def test_a_row_that_has_joined_draws_under_its_own_key() -> None:
    """Also where all rows are asked about at once, as before it came."""
    stream = NoiseStream([3, 4, 5], [0, 0, 0], CPU)
    before = stream.accept([0, 1, 2], 7, 6)
    stream.join(1, 77, 2)
    wanted = NoiseStream([3, 77, 5], [0, 2, 0], CPU).accept(range(3), 7, 6)
    for rows in (list(range(3)), [1], list(range(3))):
        got = stream.accept(rows, 7, 6)
        assert torch.equal(got.accept, wanted.accept[rows])
        assert torch.equal(got.residual, wanted.residual[rows])
    assert torch.equal(before.accept[[0, 2]], wanted.accept[[0, 2]])


def test_a_row_does_not_depend_on_its_companions() -> None:
    alone = NoiseStream([11], [4], CPU)
    among = NoiseStream([1, 11, 2], [0, 4, 9], CPU)
    for step in range(5):
        assert torch.equal(alone.draft([0], step, 6)[0], among.draft([2, 1, 0], step, 6)[1])


def test_uniform_on_the_unit_interval() -> None:
    drawn = uniform(123, 0, 0, Role.DRAFT, torch.arange(200_000)).numpy()
    assert drawn.min() >= 0.0
    assert drawn.max() < 1.0
    counts = np.bincount((drawn * 256).astype(int), minlength=256)
    assert chi2.sf(((counts - counts.mean()) ** 2 / counts.mean()).sum(), 255) > ALPHA
    low = np.bincount((drawn * 2**40 % 256).astype(int), minlength=256)  # bits that single precision would not have
    assert chi2.sf(((low - low.mean()) ** 2 / low.mean()).sum(), 255) > ALPHA


def test_independent_across_seeds_requests_steps_roles_and_indices() -> None:
    """Neighbouring keys, changed in one word, give uncorrelated numbers, jointly uniform in pairs."""
    count = 20_000
    index = torch.arange(count)
    base = uniform(5, 1, 1, Role.ACCEPT, index)
    others = {
        "seed": uniform(6, 1, 1, Role.ACCEPT, index),
        "high seed word": uniform(5 + 2**32, 1, 1, Role.ACCEPT, index),
        "request": uniform(5, 2, 1, Role.ACCEPT, index),
        "step": uniform(5, 1, 2, Role.ACCEPT, index),
        "residual": uniform(5, 1, 1, Role.RESIDUAL, index),
        "draft": uniform(5, 1, 1, Role.DRAFT, index),
        "coupled": uniform(5, 1, 1, Role.COUPLED, index),
        "index": uniform(5, 1, 1, Role.ACCEPT, index + 1),
        "far index": uniform(5, 1, 1, Role.ACCEPT, index + count),
    }
    for (name, a), (other, b) in itertools.combinations({"base": base, **others}.items(), 2):
        cells = torch.bincount((a * 8).long() * 8 + (b * 8).long(), minlength=64).numpy()
        if {name, other} == {"base", "index"}:  # the same numbers shifted by one: correlation at lag 1
            assert abs(np.corrcoef(a[:-1], b[:-1])[0, 1]) * count**0.5 < norm.isf(ALPHA)
        assert chi2.sf(((cells - count / 64) ** 2 / (count / 64)).sum(), 63) > ALPHA, (name, other)


def test_no_two_keys_of_a_call_share_a_number() -> None:
    steps, roles, requests = range(20), (Role.DRAFT, Role.ACCEPT, Role.RESIDUAL), range(8)
    drawn = [
        uniform(1, request, step, role, torch.arange(8)) for request in requests for step in steps for role in roles
    ]
    assert torch.cat(drawn).unique().numel() == len(drawn) * 8


@pytest.mark.parametrize("draft", ["model", "tree", "ngram"])
def test_a_seeded_call_leaves_every_global_generator_alone(draft: str) -> None:
    target = tiny_llama(0)
    drafter = "ngram" if draft == "ngram" else noisy_copy(target, 1)
    spec = Speculator(target, drafter, tree=(2, 1) if draft == "tree" else None)
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    torch.manual_seed(77)
    before = torch.get_rng_state()
    numpy_before: Any = np.random.get_state(legacy=True)
    first: Any = spec.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=12, seed=3
    )
    assert torch.equal(torch.get_rng_state(), before)
    numpy_after: Any = np.random.get_state(legacy=True)
    assert (numpy_after[1] == numpy_before[1]).all()
    assert numpy_after[2:] == numpy_before[2:]
    torch.manual_seed(78)
    again: Any = spec.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=12, seed=3
    )
    assert torch.equal(first, again)


def test_without_a_seed_torchs_generator_decides() -> None:
    target = tiny_llama(0)
    spec = Speculator(target, noisy_copy(target, 1))
    prompt = torch.tensor([[1, 2, 3, 1, 2]])
    texts: list[Any] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(spec.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=16))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
