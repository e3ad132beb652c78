"""Top-k and top-p without sorting: the very scores that transformers' processors return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as hf

from specdec.verify import nucleus
from specdec.verify.nucleus import TopK, TopP, largest

VOCAB = 9000
INF = float("inf")
IDS = torch.zeros(1, 1, dtype=torch.int64)


class Counted(hf.TopPLogitsWarper):
    """Counts the rows that transformers' own code decided."""

    rows = 0

    def __call__(self, input_ids, scores):
        self.rows += len(scores)
        return super().__call__(input_ids, scores)


def compared(scores: Tensor, **options) -> int:
    """Rows that were left to transformers; the scores must be its own."""
    given, inner = scores.clone(), Counted(**options)
    ids = torch.zeros(len(scores), 1, dtype=torch.int64)
    found = TopP(inner)(ids, scores)
    left = inner.rows
    torch.testing.assert_close(found, inner(ids, scores), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores, given, rtol=0, atol=0, equal_nan=True)  # not written to
    return left


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.99])
@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])
def test_same_scores(scale, top_p):
    scores = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(1)) * scale
    left = compared(scores, top_p=top_p)
    if scale == 6.0:
        assert left < 10, "of laws as peaked as a language model's, few may be left to transformers"
    compared(hf.TopKLogitsWarper(50)(None, scores), top_p=top_p)
    compared(scores, top_p=top_p, min_tokens_to_keep=3, filter_value=-50.0)
    compared(scores, top_p=top_p, min_tokens_to_keep=500)


def test_large_nucleus_is_found_by_a_second_look():
    scores = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(2)) * 3
    assert int(hf.TopPLogitsWarper(0.9)(None, scores).isfinite().sum(-1).max()) > nucleus._COUNTS[0]
    assert compared(scores, top_p=0.9) < 20


def test_scores_far_from_zero():
    """Whose sum's logarithm has steps wider than the doubt: low temperatures make such ones."""
    scores = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    for offset in (-5000.0, 5000.0, 30000.0):
        compared(scores + offset, top_p=0.5)
        compared(scores + offset, top_p=0.9)


def test_where_rounding_decides_transformers_does(monkeypatch):
    """Laws whose sums meet top_p, up to rounding; and equal scores at the edge, of which the sort keeps any."""
    masses = torch.full((30, VOCAB), 0.0)
    masses[:, :30] = torch.rand(30, 30, generator=torch.Generator().manual_seed(3)) + 0.1
    masses /= masses.sum(-1, keepdim=True)
    edges = masses.sort(-1, descending=True).values.cumsum(-1)
    for row in range(10):
        compared(masses.log()[row : row + 1], top_p=float(edges[row, 7]))
    equal = torch.zeros(1, VOCAB)
    equal[:, :40] = 12.0
    assert compared(equal, top_p=0.51) == 1
    monkeypatch.setattr(nucleus, "_DOUBT", -1.0)
    wrong = 0
    for row in range(30):  # the control: without a doubt some of them come out otherwise
        for at in range(3, 20):
            scores, inner = masses.log()[row : row + 1], hf.TopPLogitsWarper(float(edges[row, at]))
            wrong += not torch.equal(TopP(inner)(IDS, scores), inner(IDS, scores))
    assert wrong > 0


def test_scores_that_are_no_numbers():
    scores = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(4)) * 6
    scores[0, 5], scores[1, 7], scores[2], scores[3, 9] = float("nan"), INF, -INF, -INF
    scores[4, 1:] = -INF
    compared(scores, top_p=0.9)


def test_small_vocabularies_and_other_dtypes_are_left_alone():
    assert compared(torch.randn(3, 500), top_p=0.9) == 3
    assert compared(torch.randn(3, VOCAB, dtype=torch.float64), top_p=0.9) == 3


@pytest.mark.parametrize("vocab", [9000, 9001, 49_152])
@pytest.mark.parametrize("count", [1, 7, 50, 2048, 9000])
def test_the_largest_are_those_that_torch_selects(vocab, count):
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(5, vocab, generator=generator)
    scores[0, : vocab - 1 : 3] = 2.5  # more equal ones than are asked for
    scores[1], scores[2, 5], scores[3, 60:] = 0.0, float("inf"), -INF
    scores[4, -1] = 9.0  # beyond the last whole list
    values, places = largest(scores, count)
    assert torch.equal(values, scores.topk(count).values)
    assert torch.equal(values, scores.gather(1, places))
    assert all(len(set(row)) == count for row in places.tolist())
    assert int(places[4, 0]) == vocab - 1


@pytest.mark.parametrize("top_k", [1, 50, 20_000])
def test_top_k_keeps_what_transformers_keeps(top_k):
    scores = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(7)) * 3
    scores[1], scores[2, ::2], scores[3, 9], scores[4] = 0.0, scores[2].amax(), float("nan"), -INF
    scores[5, 4] = INF
    given = scores.clone()
    for fill in (-INF, -50.0):
        inner = hf.TopKLogitsWarper(top_k, filter_value=fill)
        torch.testing.assert_close(TopK(inner)(IDS, scores), inner(IDS, scores), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scores, given, rtol=0, atol=0, equal_nan=True)  # not written to


def test_top_k_asks_torch_where_there_is_little_to_look_through(monkeypatch):
    monkeypatch.setattr(nucleus, "largest", None)
    inner = hf.TopKLogitsWarper(3)
    for scores in (torch.randn(3, 500), torch.randn(3, VOCAB, dtype=torch.float64)):
        assert torch.equal(TopK(inner)(IDS, scores), inner(IDS, scores))
    with pytest.raises(TypeError):  # the control
        TopK(inner)(IDS, torch.randn(3, VOCAB))
