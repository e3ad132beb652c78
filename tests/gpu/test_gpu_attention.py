"""On a GPU: every backend computes tree attention as exactly as masked SDPA, and the choice takes one that does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from attention_cases import EPS, AttentionCase, clean, complaint, states

from specdec.verify.attention.choose import BACKENDS, CANDIDATES, AttentionChoice
from specdec.verify.attention.launch import triton_attention

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Case = AttentionCase

CASES = [
    Case((70,), 1, "chain", dtype=BF16),
    Case((1024,), 16, "comb", heads=32, kv_heads=8, head_dim=128, dtype=BF16),
    Case((4096, 4096), 64, heads=32, kv_heads=8, head_dim=128, dtype=BF16),
    Case((0, 3, 2000), 9, heads=8, kv_heads=2, head_dim=64, dtype=BF16),
    Case((333, 1), 100, heads=16, kv_heads=2, head_dim=128, dtype=FP16),
    Case((513, 77), 7, head_dim=80, dtype=FP16),
    Case((513, 77), 7, head_dim=128, dtype=FP32),
    Case((300, 0, 77), 6, page=1, dtype=BF16),
    Case((300, 0, 77), 6, page=16, head_dim=128, dtype=BF16),
    Case((300, 1000), 6, page=256, head_dim=128, heads=32, kv_heads=8, dtype=BF16),
    Case((450, 100), 3, page=7, first=4, dtype=FP32),
    Case((900, 33), 8, "comb", window=170, dtype=BF16),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", CANDIDATES)
def test_backends(name: str, case: AttentionCase) -> None:
    given = clean(states(case, "cuda"))
    backend = BACKENDS[name]
    reason = backend.serves(given.query, given.key, given.value, given.plan, given.window)
    if reason is not None:
        pytest.skip(reason)
    out = backend.attend(given.query, given.key, given.value, given.plan, given.scale, given.window)
    # A prefix that comes rounded to 16 bits is rounded once more with the tail.
    assert (problem := complaint(given, out, factor=3.0)) is None, problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_reads_nothing_it_must_not_see(case: AttentionCase) -> None:
    """Everything behind a row's tail, and pages of nobody, is NaN here."""
    given = states(case, "cuda")
    out = triton_attention(given.query, given.key, given.value, given.plan, given.scale, given.window)
    assert (problem := complaint(given, out, factor=3.0)) is None, problem


@pytest.mark.parametrize("splits", [1, 2, 16, 64])
def test_splits(splits: int) -> None:
    given = states(Case((5000, 17, 0), 20, heads=16, kv_heads=4, head_dim=128, dtype=BF16), "cuda")
    out = triton_attention(given.query, given.key, given.value, given.plan, given.scale, splits=splits)
    assert (problem := complaint(given, out)) is None, problem


def test_the_kernel_repeats_itself_to_the_bit() -> None:
    given = states(CASES[2], "cuda")
    first, second = (
        triton_attention(given.query, given.key, given.value, given.plan, given.scale) for _ in range(2)
    )  # fmt: skip
    assert torch.equal(first, second)


def test_the_kernel_in_a_graph_follows_lengths_on_the_device() -> None:
    given = states(Case((900, 900), 8, heads=16, kv_heads=4, head_dim=128, dtype=BF16), "cuda")
    plan = dataclasses.replace(given.plan, lengths=given.plan.lengths.clone(), equal=False)
    triton_attention(given.query, given.key, given.value, plan, given.scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton_attention(given.query, given.key, given.value, plan, given.scale)
    plan.lengths.copy_(torch.tensor([900, 123]))
    graph.replay()
    moved = dataclasses.replace(given, plan=plan)
    assert (problem := complaint(moved, out)) is None, problem


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[8], CASES[11]], ids=str)
def test_the_measured_choice(case: AttentionCase) -> None:
    given = clean(states(case, "cuda"))
    choice = AttentionChoice()
    out = choice(given.query, given.key, given.value, given.plan, given.scale, given.window)
    assert set(choice.chosen.values()) <= set(CANDIDATES)
    assert len(choice.chosen) == 1
    reference = given.reference()
    assert float((out.double() - reference).abs().max()) < 8 * EPS[case.dtype] * float(reference.abs().max())


def test_a_wrong_mask_is_noticed() -> None:
    """The negative control on the device."""
    given = states(Case((70,), 6, "star", dtype=BF16), "cuda")
    seen = given.plan.ancestors.clone()
    seen[0, 3, 2] = True
    wrong = dataclasses.replace(given.plan, ancestors=seen)
    out = triton_attention(given.query, given.key, given.value, wrong, given.scale)
    assert complaint(given, out, factor=3.0) is not None
