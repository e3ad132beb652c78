"""Every attention backend computes the same tree attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import AttentionCase, States, clean, complaint, states
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.attention.choose import BACKENDS
from specdec.verify.attention.merge import merge, merged_attention, tail_part
from specdec.verify.attention.plan import TreePlan
from specdec.verify.attention.prefix import fold_heads, package_prefix, torch_prefix

Case = AttentionCase
F64 = torch.float64

CASES = [
    Case((70,), 1, "chain", dtype=F64),
    Case((33,), 7, heads=8, kv_heads=1, dtype=F64),
    Case((0, 3, 150), 6, dtype=F64),
    Case((0, 0), 6, "star", dtype=F64),
    Case((130, 130), 9, "comb", dtype=F64),
    Case((20,), 70, dtype=F64),
    Case((50, 9), 5, head_dim=48, value_dim=16, dtype=F64),
    Case((45, 10), 3, first=4, dtype=F64),
    Case((30, 0, 77), 6, page=7, dtype=F64),
    Case((64, 15), 9, "comb", page=16, dtype=F64),
    Case((70, 70), 4, page=1, dtype=F64),
    Case((45, 10), 3, page=16, first=4),
    Case((300, 20), 7, dtype=torch.bfloat16),
    Case((300, 300), 12, "star", dtype=torch.float16),
]
WINDOWS = [
    Case((90, 4), 8, window=3, dtype=F64),
    Case((150, 20), 9, "chain", window=70, dtype=F64),
    Case((90, 33), 8, "comb", window=17, page=7, dtype=F64),
]


def attend(name: str, given: States) -> Tensor:
    return BACKENDS[name].attend(given.query, given.key, given.value, given.plan, given.scale, given.window)


@pytest.mark.parametrize("case", [*CASES, *WINDOWS], ids=str)
def test_fold(case: AttentionCase) -> None:
    given = clean(states(case))
    assert (problem := complaint(given, attend("fold", given))) is None, problem


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_and_merge(case: AttentionCase) -> None:
    given = clean(states(case))
    assert (problem := complaint(given, attend("split", given))) is None, problem


@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_the_reference_by_hand(case: AttentionCase) -> None:
    """Node by node, head by head, over the list of slots it sees: the definition."""
    given = states(case)
    out = given.reference()
    for row, length in enumerate(case.lengths):
        ancestors = given.plan.ancestors[row if len(given.plan.ancestors) > 1 else 0]
        for node in range(case.nodes):
            slots = [*range(length), *(length + j for j in ancestors[node].nonzero().flatten().tolist())]
            for head in range(case.heads):
                of = head // (case.heads // case.kv_heads)
                weights = torch.softmax(given.key[row, of, slots] @ given.query[row, head, node] * given.scale, 0)
                torch.testing.assert_close(out[row, node, head], weights @ given.value[row, of, slots])


class TestMerge:
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(5)
        scores = torch.randn(3, 9, generator=generator, dtype=F64) * 4
        values = torch.randn(9, 6, generator=generator, dtype=F64)
        whole = torch.softmax(scores, -1) @ values
        first, second = scores[:, :4], scores[:, 4:]
        return (
            torch.softmax(first, -1) @ values[:4], first.logsumexp(-1),
            torch.softmax(second, -1) @ values[4:], second.logsumexp(-1), whole,
        )  # fmt: skip

    def test_two_parts_are_the_whole(self) -> None:
        out1, lse1, out2, lse2, whole = self.parts()
        out, lse = merge(out1, lse1, out2, lse2)
        torch.testing.assert_close(out, whole, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(lse, torch.logaddexp(lse1, lse2), rtol=1e-14, atol=1e-14)

    @pytest.mark.parametrize("nothing", [float("inf"), float("-inf")])
    @pytest.mark.parametrize("junk", [0.0, float("nan")])
    def test_a_part_without_slots_weighs_nothing(self, nothing: float, junk: float) -> None:
        """FlashAttention 2 reports +inf for it, others -inf, and its output may be anything."""
        out1, lse1, out2, lse2, _ = self.parts()
        lse1[1], out1[1] = nothing, junk
        out, lse = merge(out1, lse1, out2, lse2)
        torch.testing.assert_close(out[1], out2[1], rtol=0, atol=0)
        torch.testing.assert_close(lse[1], lse2[1], rtol=0, atol=0)

    def test_scores_far_apart_do_not_overflow(self) -> None:
        out1, lse1, out2, lse2, _ = self.parts()
        out, lse = merge(out1, lse1 + 5000, out2, lse2)
        assert out.isfinite().all()
        torch.testing.assert_close(out, out1)
        torch.testing.assert_close(lse, lse1 + 5000)

    def test_base_2_would_be_noticed(self) -> None:
        out1, lse1, out2, lse2, whole = self.parts()
        wrong, _ = merge(out1, lse1 / torch.log(torch.tensor(2.0)), out2, lse2)
        assert not torch.allclose(wrong, whole, rtol=1e-3)


def test_the_prefix_reports_a_natural_logarithm_with_the_scale_inside() -> None:
    given = states(Case((40, 40), 3, "chain", dtype=F64))
    _, lse = torch_prefix(given.query, given.key, given.value, given.plan, given.scale)
    scores = fold_heads(given.query, 2) @ given.key[:, :, :40].mT * given.scale
    torch.testing.assert_close(lse, scores.exp().sum(-1).log())


def test_the_package_flash_attn_is_called_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with flash-attn's signature and layouts: `[rows, queries, heads, dim]` against `[pages, page_size,
    kv_heads, dim]`, lengths per row, no causal mask."""
    seen: list[tuple[int, ...]] = []

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor | None,
        softmax_scale: float, causal: bool, return_softmax_lse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert not causal
        assert return_softmax_lse
        assert cache_seqlens.dtype == torch.int32
        assert q.shape[2] == k_cache.shape[2], "query heads are folded"
        seen.append(tuple(q.shape))
        plan = dataclasses.replace(given.plan, table=block_table)
        k, v = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
        out, lse = torch_prefix(q.transpose(1, 2), k, v, plan, softmax_scale)
        return out.transpose(1, 2), lse.masked_fill(lse == float("-inf"), float("inf"))

    stand_in = type("flash_attn", (), {"flash_attn_with_kvcache": staticmethod(flash_attn_with_kvcache)})
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", stand_in)
    for case in (Case((30, 0, 77), 6, dtype=F64), Case((30, 0, 77), 6, page=16, dtype=F64)):
        given = clean(states(case))
        out = merged_attention(given.query, given.key, given.value, given.plan, given.scale, package_prefix)
        assert (problem := complaint(given, out)) is None, problem
    assert seen == [(3, 12, 2, 32)] * 2


def test_a_prefix_may_come_in_any_layout() -> None:
    """FlashAttention's results are `[rows, queries, heads, dim]` in memory."""

    def strided(*args: Any) -> tuple[Tensor, Tensor]:
        out, lse = torch_prefix(*args)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse

    given = clean(states(Case((40, 9), 5, dtype=F64)))
    out = merged_attention(given.query, given.key, given.value, given.plan, given.scale, strided)
    assert (problem := complaint(given, out)) is None, problem


class TestThePlanRefusesMismatches:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: {"query": s.query[:, :, :2]}, "of 2 rows of 3 nodes, the queries of 2 rows of 2"),
            (lambda s: {"query": s.query[:, :3]}, "3 query heads do not share 2 key"),
            (lambda s: {"key": s.key[..., :16]}, "queries have head_dim 32, keys 16"),
            (lambda s: {"key": s.key[:, :, :20]}, "expected K/V of 2 rows and 23 slots, got 2 and 20"),
        ],
        ids=["nodes", "heads", "head_dim", "slots"],
    )
    def test_states(self, change: Callable[[States], dict[str, Any]], message: str) -> None:
        given = states(Case((20, 9), 3))
        wrong = dataclasses.replace(given, **change(given))
        for name in ("fold", "split"):
            with pytest.raises(UnsupportedArgumentError, match=message):
                attend(name, wrong)

    def test_too_few_pages(self) -> None:
        given = states(Case((20, 9), 3, page=4))
        assert given.plan.table is not None
        plan = dataclasses.replace(given.plan, table=given.plan.table[:, :3])
        with pytest.raises(UnsupportedArgumentError, match="3 pages of 4 slots do not hold 23 slots"):
            attend("fold", dataclasses.replace(given, plan=plan))


def test_masks_are_made_once_a_pass() -> None:
    given = states(Case((20, 9), 3))
    assert given.plan.mask(23, torch.float32) is given.plan.mask(23, torch.float32)
    assert given.plan.mask(23, torch.float32).stride(2) % 16 == 0


def test_a_tail_alone() -> None:
    """Depth-first over the tree with no committed slot: the first token of a text."""
    given = states(Case((0,), 9, "comb", dtype=F64))
    out, lse = tail_part(given.query, given.key, given.value, given.plan, given.scale)
    assert out.shape == (1, 2, 18, 32)
    assert lse.isfinite().all()


def test_plans_follow_the_device_of_the_layer() -> None:
    """A model spread over devices asks for its plan on each; the meta device stands in for a second GPU."""
    plan: TreePlan = states(Case((20, 9), 3, page=4)).plan
    there = plan.on(torch.device("meta"))
    assert {t.device.type for t in (there.lengths, there.ancestors, there.depths, there.table) if t is not None} == {
        "meta"
    }
    assert there is plan.on(torch.device("meta"))
    assert plan.on(torch.device("cpu")) is plan
