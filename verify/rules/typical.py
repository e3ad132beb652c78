"""Typical acceptance: keeps drafted tokens that the target finds plausible. Lossy, hence only on request."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.kv.errors import UnsupportedArgumentError
from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, row_at, sample_from, verdict_at
from specdec.verify.tree import DraftTree, Verdict

ROUNDING = 1e-5
"""Paths whose probabilities differ by less, relatively, are equally likely: what remains is float32 rounding."""


class Typical(AcceptanceRule):
    """Medusa's rule (Cai et al. arXiv 2401.10774, section 2.3.1; algorithms A.10). NOT lossless.

        keep a child x when p(x) > min(epsilon, delta * exp(-H(p))), H the entropy of p in nats
        of the nodes reached so, the deepest; of those, the first whose path is likeliest; then Y ~ p there

    The token after the kept path is always drawn from p, so a step that keeps nothing is plain sampling. What is kept
    was chosen by the drafter: unlikely tokens are never kept and likely ones too often, so the text is less diverse
    than the target's. A one-hot p makes it greedy matching.

    Args:
        epsilon, delta: absolute and entropy-dependent threshold; the defaults are those of Medusa's code.
    """

    name = "typical"
    lossless = False
    changes = "keeps drafted tokens because they are plausible, so the text no longer follows the target's law"

    def __init__(self, epsilon: float = 0.09, delta: float = 0.3):
        if not 0 <= epsilon <= 1 or not delta >= 0:
            raise UnsupportedArgumentError(
                f"rule 'typical': expected 0 <= epsilon <= 1 and delta >= 0, got epsilon={epsilon}, delta={delta}"
            )
        self.epsilon, self.delta = epsilon, delta

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        rows = torch.arange(p.shape[0], device=p.device)[:, None]
        parents = tree.parents.clamp(min=0)
        entropy = torch.special.entr(p).sum(-1, dtype=torch.float64)
        threshold = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        mass = p[rows, parents, tree.tokens].to(torch.float64)
        kept = (mass > threshold.gather(1, parents)) & tree.valid
        kept[:, 0], mass[:, 0] = True, 1.0
        reached = ~(tree.ancestor_mask & ~kept[:, None, :]).any(-1)
        depth = torch.where(reached, tree.depths, -1)
        deepest = depth == depth.amax(1, keepdim=True)
        path = torch.where(tree.ancestor_mask, mass[:, None, :], 1.0).prod(-1)
        path = torch.where(deepest, path, -1.0)
        likeliest = path >= path.amax(1, keepdim=True) * (1 - ROUNDING)
        node = likeliest.to(torch.int8).argmax(1)
        return verdict_at(tree, node, sample_from(row_at(p, node), noise.residual))
