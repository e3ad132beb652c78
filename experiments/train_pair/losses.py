"""The losses of both phases."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def joint_losses(target_logits: Tensor, draft_logits: Tensor, ids: Tensor, ce_weight: float) -> tuple[Tensor, ...]:
    """`(target cross-entropy, draft loss, draft cross-entropy)` of logits[rows, length, vocab] on ids[rows, length].

    The draft's loss is the cross-entropy to the target's (detached) law, which differs from KL(p || q) by a constant,
    plus `ce_weight` times the cross-entropy to the text.
    """
    labels = ids[:, 1:].reshape(-1, 1)
    log_p = target_logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
    log_q = draft_logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
    target_ce = -log_p.gather(1, labels).mean()
    draft_ce = -log_q.gather(1, labels).mean()
    soft = -(log_p.detach().exp() * log_q).sum(-1).mean()
    return target_ce, soft + ce_weight * draft_ce, draft_ce


def top_law(logits: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """`(ids int16, log-probabilities float16)` of the `num` likeliest tokens of logits[..., vocab], likeliest first."""
    top, ids = logits.float().topk(num, dim=-1)
    return ids.to(torch.int16), (top - logits.float().logsumexp(-1, keepdim=True)).half()


def top_law_loss(draft_logits: Tensor, ids: Tensor, log_p: Tensor, hard_weight: float) -> tuple[Tensor, Tensor]:
    """`(loss, greedy agreement)` of draft_logits[n, vocab] with the target's top law ids[n, top], log_p[n, top].

    All tokens outside the top are one outcome, so the loss is a lower bound of the full soft cross-entropy and zero
    gradient means the laws agree on the top. `hard_weight` adds the cross-entropy to the target's own argmax, which is
    what greedy acceptance asks for.
    """
    log_q = draft_logits.float().log_softmax(-1)
    chosen = log_q.gather(1, ids.long())
    p = log_p.float().exp()
    rest_p = (1 - p.sum(-1)).clamp_min(0)
    rest_q = torch.log1p(-chosen.exp().sum(-1).clamp(max=1 - 1e-6))
    soft = -((p * chosen).sum(-1) + rest_p * rest_q).mean()
    hard = F.nll_loss(log_q, ids[:, 0].long())
    agreement = (draft_logits.argmax(-1) == ids[:, 0]).float().mean()
    return soft + hard_weight * hard, agreement
