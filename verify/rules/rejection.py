"""Token-by-token rejection sampling on a chain."""

from __future__ import annotations

from torch import Tensor

from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, residual_or, row_at, sample_from, verdict_at
from specdec.verify.rules.chain import check_chain, draft_law, view_chain
from specdec.verify.tree import DraftTree, Verdict


class Rejection(AcceptanceRule):
    """Accept x_i with probability min(1, p(x_i)/q(x_i)); at the first rejection draw from norm((p - q)+).

    Leviathan et al. arXiv 2211.17192, Chen et al. arXiv 2302.01318. Deterministic tokens have q one-hot.

    Example: p=(.1,.5,.4), q=(.5,.4,.1), drafted token 0: kept with probability .2, else token 1 or 2 is drawn
    with weights (.1, .3).
    """

    name = "rejection"

    def check(self, tree: DraftTree) -> None:
        check_chain(self.name, tree)

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        self.check(tree)
        chain = view_chain(tree, p)
        # Strict comparison without a division: p = 0 is never kept, q is positive by contract.
        kept = (noise.accept[:, 1:] * chain.q_x < chain.p_x) & chain.real
        node = kept.long().cumprod(1).sum(1)
        law = row_at(p, node)
        residual = (law - draft_law(tree, node, law)).clamp(min=0)
        return verdict_at(tree, node, sample_from(residual_or(residual, law), noise.residual))
