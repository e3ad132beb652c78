"""Top-k and top-p of a large vocabulary on a CPU: the scores that transformers' own processors return, without sorting
the vocabulary or selecting in all of it."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

_COUNTS = 128, 2048
"""How many of the best scores are looked at: first, and where the nucleus is larger."""
_SMALL = 8192
"""Vocabularies up to here are sorted as quickly as looked through."""
_FEW = 8
"""Lists of fewer scores than this are not worth a look at their largest."""
_DOUBT = 2e-5
"""Where the probability of all likelier tokens is this near to top_p, rounding may decide what transformers keeps. Its
law is float32, each entry off by a few units of 6e-8 and the whole by as much; its sums are taken in float64."""


def largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`scores.topk(count)` of `[rows, vocab]`, up to the places of equal ones: values, descending, and places.

    The largest `count` lie in the `count` lists whose own largest are largest, of as many lists as make both searches
    short. torch's selection looks several times at every score: 9 rows of 49,152 take it 2.2 ms, this 0.3.
    """
    vocab = scores.shape[-1]
    size = isqrt(vocab // count)
    if size < _FEW:
        return scores.topk(count)
    number = vocab // size
    lists = scores[:, : size * number].unflatten(1, (size, number))  # members lie `number` apart: read in vectors
    chosen = lists.amax(1).topk(count, sorted=False).indices[:, None]
    members = lists.gather(2, chosen.expand(-1, size, -1)).flatten(1)
    places = (chosen + number * torch.arange(size)[:, None]).flatten(1)
    over = scores[:, size * number :]
    if over.shape[1]:
        rest = torch.arange(size * number, vocab).expand(len(scores), -1)
        members, places = torch.cat([members, over], 1), torch.cat([places, rest], 1)
    best, at = members.topk(count)
    return best, places.gather(1, at)


def _is_large(scores: Tensor) -> bool:
    return scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.shape[-1] > _SMALL


class TopK(hf.LogitsProcessor):
    """Keeps what transformers' own processor keeps: all scores not below the `top_k`-th."""

    def __init__(self, inner: hf.TopKLogitsWarper):
        self.inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `transformers.LogitsProcessor`."""
        if not _is_large(scores):
            return self.inner(input_ids, scores)
        least = largest(scores, min(self.inner.top_k, scores.shape[-1]))[0][:, -1:]
        return scores.masked_fill(scores < least, self.inner.filter_value)


class TopP(hf.LogitsProcessor):
    """Keeps what transformers' own processor keeps, and that one decides wherever rounding could.

    Sorting 49,152 scores takes 4 ms, a small model's whole pass at int8, and a step has the scores of every node.
    """

    def __init__(self, inner: hf.TopPLogitsWarper):
        self.inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `transformers.LogitsProcessor`."""
        if not _is_large(scores):
            return self.inner(input_ids, scores)
        return self._kept(input_ids, scores, _COUNTS)

    def _kept(self, input_ids: Tensor, scores: Tensor, counts: tuple[int, ...]) -> Tensor:
        if not counts:
            return self.inner(input_ids, scores)
        out, clear = self._of_best(scores, counts[0])
        if not bool(clear.all()):
            out[~clear] = self._kept(input_ids, scores[~clear], counts[1:])
        return out

    def _of_best(self, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Scores `[rows, vocab]` with what is kept among the best `count`, and bool `[rows]`: is that certainly all?"""
        top_p, least, fill = self.inner.top_p, self.inner.min_tokens_to_keep, self.inner.filter_value
        best, tokens = largest(scores, count)
        # Less the largest, as softmax does: a logsumexp is as coarse as the scores are large (0.0002 at 5,000).
        peak, exact = best[:, :1], best.double()
        counted = best if bool(best[:, -1].isneginf().all()) else scores  # behind top-k nothing else has any mass
        mass = (exact - exact[:, :1] - (counted - peak).logsumexp(-1, keepdim=True)).exp_()
        before = mass.cumsum(-1).sub_(mass)  # of all likelier tokens; transformers sums the others
        kept = before < top_p
        clear = ((before - top_p).abs_() > _DOUBT).all(-1)  # never where there is NaN
        kept[:, :least] = True
        end = kept.sum(-1, keepdim=True).clamp_(max=count - 1)  # the first that is left out
        clear &= ~kept[:, -1] & (best.gather(1, end) < best.gather(1, end - 1))[:, 0]  # which of equal ones is open
        out = torch.full_like(scores, fill).scatter_(1, tokens, best.masked_fill_(~kept, fill))
        return out, clear
