"""Token-by-token rejection sampling on a chain."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.draft_kind import DraftKind
from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, Expected, residual_or, row_at, sample_from, verdict_at
from specdec.verify.rules.chain import chains_only, draft_law, view_chain
from specdec.verify.tree import DraftTree, Verdict


class Rejection(AcceptanceRule):
    """Accept x_i with probability min(1, p(x_i)/q(x_i)); at the first rejection draw from norm((p - q)+).

    Leviathan et al. arXiv 2211.17192, Chen et al. arXiv 2302.01318. Deterministic tokens have q one-hot.

    Example: p=(.1,.5,.4), q=(.5,.4,.1), drafted token 0: kept with probability .2, else token 1 or 2 is drawn
    with weights (.1, .3).
    """

    name = "rejection"
    top_down = True

    def refusal(self, kind: DraftKind) -> str | None:
        return chains_only(self.name, kind)

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        self.check(tree)
        chain = view_chain(tree, p)
        # Strict comparison without a division: p = 0 is never kept, q is positive by contract.
        kept = (noise.accept[:, 1:] * chain.q_x < chain.p_x) & chain.real
        node = kept.long().cumprod(1).sum(1)
        law = row_at(p, node)
        residual = (law - draft_law(tree, node, law)).clamp_(min=0)
        return verdict_at(tree, node, sample_from(residual_or(residual, law), noise.residual))

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        self.check(tree)
        chain = view_chain(tree, p)
        one = torch.ones_like(chain.length, dtype=torch.float64)[:, None]
        chance = torch.where(chain.real, (chain.p_x / chain.q_x).clamp(max=1.0), 0.0)
        reached = torch.cat([one, chance.cumprod(1)], dim=1)
        return reached * (1.0 - torch.cat([chance, 0 * one], dim=1))

    def excess(self, tree: DraftTree, p: Tensor, verdict: Verdict) -> Expected:
        """Per position that was reached: kept or not, minus sum_x min(p, q) (p of the token if deterministic)."""
        chain = view_chain(tree, p)
        rows, k = chain.p_x.shape
        overlap = chain.p_x
        if tree.q is not None and tree.q_row is not None and k:
            q = tree.q[torch.arange(rows, device=p.device)[:, None], tree.q_row[:, :k].clamp(min=0)]
            dense = torch.minimum(p[:, :k], q.to(p.dtype)).sum(-1).double()
            overlap = torch.where(tree.sampled[:, 1:], dense, overlap)
        position = torch.arange(k, device=p.device)
        tried = chain.real & (position <= verdict.num_accepted[:, None])
        overlap = torch.where(tried, overlap.clamp(max=1.0), 0.0)
        variance = (overlap * (1.0 - overlap)).sum(1)
        return Expected(verdict.num_accepted.double() - overlap.sum(1), variance)
