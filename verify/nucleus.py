"""Top-p of a large vocabulary on a CPU: the scores that `TopPLogitsWarper` returns, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation import logits_process as hf

_COUNTS = 128, 2048
"""How many of the best scores are looked at: first, and where the nucleus is larger."""
_SMALL = 8192
"""Vocabularies up to here are sorted as quickly as looked through."""
_DOUBT = 2e-5
"""Where the probability of all likelier tokens is this near to top_p, rounding may decide what transformers keeps. Its
law is float32, each entry off by a few units of 6e-8 and the whole by as much; its sums are taken in float64."""


class TopP(hf.LogitsProcessor):
    """Keeps what transformers' own processor keeps, and that one decides wherever rounding could.

    Sorting 49,152 scores takes 4 ms, a small model's whole pass at int8, and a step has the scores of every node.
    """

    def __init__(self, inner: hf.TopPLogitsWarper):
        self.inner = inner

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See `transformers.LogitsProcessor`."""
        if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.shape[-1] <= _SMALL:
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
        best, tokens = scores.topk(count)
        # Less the largest, as softmax does: a logsumexp is as coarse as the scores are large (0.0002 at 5,000).
        peak, exact = best[:, :1], best.double()
        mass = (exact - exact[:, :1] - (scores - peak).logsumexp(-1, keepdim=True)).exp_()
        before = mass.cumsum(-1).sub_(mass)  # of all likelier tokens; transformers sums the others
        kept = before < top_p
        clear = ((before - top_p).abs_() > _DOUBT).all(-1)  # never where there is NaN
        kept[:, :least] = True
        end = kept.sum(-1, keepdim=True).clamp_(max=count - 1)  # the first that is left out
        clear &= ~kept[:, -1] & (best.gather(1, end) < best.gather(1, end - 1))[:, 0]  # which of equal ones is open
        out = torch.full_like(scores, fill).scatter_(1, tokens, best.masked_fill_(~kept, fill))
        return out, clear
