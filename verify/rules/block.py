"""Block verification: the optimal lossless rule for sampled chains."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.kinds import DraftKind
from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, Expected, residual_or, row_at, sample_from, verdict_at
from specdec.verify.rules.chain import ChainView, chains_only, draft_law, view_chain
from specdec.verify.tree import DraftTree, Verdict


class Block(AcceptanceRule):
    """Sun et al. arXiv 2403.10444 (algorithms A.4): judge the block as a whole, keep its longest accepted prefix.

        P_0 = 1;  P_i = min(1, P_{i-1} p(x_i)/q(x_i))
        S_i = sum_y (P_i p(y|x_<=i) - q(y|x_<=i))+;   h_i = S_i / (S_i + 1 - P_i) for i < k,   h_k = P_k
        tau = max{i : u_i <= h_i}  (0 if none) - *not* "stop at the first rejection"
        Y ~ norm((P_tau p - q)+) at x_<=tau, or p when tau = k

    E[tau] = E[sum_i P_i], never below token-wise rejection. A deterministic token has q one-hot, for which
    S_i = P_i (1 - p(x_{i+1})) needs no vocabulary row.
    """

    name = "block"

    def refusal(self, kind: DraftKind) -> str | None:
        return chains_only(self.name, kind)

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        self.check(tree)
        chain = view_chain(tree, p)
        rows, k = chain.p_x.shape
        weight = block_weights(chain)
        index = torch.arange(1, k + 1, device=p.device)
        kept = (noise.accept[:, 1:] < _chances(tree, p, chain, weight)) & chain.real
        node = torch.where(kept, index, 0).amax(1) if k else torch.zeros(rows, dtype=torch.int64, device=p.device)
        law = row_at(p, node)
        scale = weight.gather(1, node[:, None]).to(law.dtype)
        ended = (node >= chain.length)[:, None]
        residual = (torch.where(ended, 1.0, scale) * law - draft_law(tree, node, law)).clamp(min=0)
        return verdict_at(tree, node, sample_from(residual_or(residual, law), noise.residual))

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        self.check(tree)
        chain = view_chain(tree, p)
        one = torch.ones_like(chain.length, dtype=torch.float64)[:, None]
        chance = torch.where(chain.real, _chances(tree, p, chain, block_weights(chain)), 0.0)
        later_refused = torch.cat([(1.0 - chance).flip(1).cumprod(1).flip(1), one], dim=1)[:, 1:]
        return torch.cat([one * (1.0 - chance).prod(1, keepdim=True), chance * later_refused], dim=1)

    def excess(self, tree: DraftTree, p: Tensor, verdict: Verdict) -> Expected:
        """tau - sum_i P_i, zero on average over drafts and coins. Its variance is taken to be its own square."""
        chain = view_chain(tree, p)
        kept = torch.where(chain.real, block_weights(chain)[:, 1:], 0.0).sum(1)
        difference = verdict.num_accepted.double() - kept
        return Expected(difference, difference * difference)


def block_weights(chain: ChainView) -> Tensor:
    """P_0 .. P_k as float64 `[rows, k + 1]`; the loop runs over positions, never over the vocabulary."""
    weights = [torch.ones_like(chain.length, dtype=torch.float64)]
    ratio = chain.p_x / chain.q_x
    for i in range(ratio.shape[1]):
        weights.append((weights[-1] * ratio[:, i]).clamp(max=1.0))
    return torch.stack(weights, dim=1)


def _chances(tree: DraftTree, p: Tensor, chain: ChainView, weight: Tensor) -> Tensor:
    """h_1 .. h_k as float64 `[rows, k]`; meaningless beyond a row's length."""
    k = chain.p_x.shape[1]
    h = weight[:, 1:].clone()
    if k > 1:
        surplus = _surplus(tree, p, chain, weight)
        inner = surplus / (surplus + 1 - weight[:, 1:k]).clamp(min=torch.finfo(torch.float64).tiny)
        index = torch.arange(1, k, device=p.device)
        h[:, : k - 1] = torch.where(index < chain.length[:, None], inner, h[:, : k - 1])
    return h


def _surplus(tree: DraftTree, p: Tensor, chain: ChainView, weight: Tensor) -> Tensor:
    """S_1 .. S_{k-1} as float64 `[rows, k - 1]`."""
    rows, k = chain.p_x.shape
    inner = weight[:, 1:k]
    flat = inner * (1.0 - chain.p_x[:, 1:])
    if tree.q is None or tree.q_row is None:
        return flat
    q = tree.q[torch.arange(rows, device=p.device)[:, None], tree.q_row[:, 1:k].clamp(min=0)]
    dense = (inner[:, :, None].to(p.dtype) * p[:, 1:k] - q.to(p.dtype)).clamp(min=0).sum(-1).to(torch.float64)
    return torch.where(tree.sampled[:, 2:], dense, flat)
