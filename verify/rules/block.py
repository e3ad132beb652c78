"""Block verification: the optimal lossless rule for sampled chains."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from specdec.verify.draft_kind import DraftKind
from specdec.verify.host_integers import entries
from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, Expected, residual_or, row_at, sample_from, verdict_at
from specdec.verify.rules.chain import ChainView, chains_only, draft_law, view_chain
from specdec.verify.topology import indices
from specdec.verify.tree import DraftTree, Verdict

TINY = torch.finfo(torch.float64).tiny


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
        if tree.is_drawn_chain and p.device.type == "cpu":
            node, scale = _kept_on_host(tree, p, noise)
        else:
            node, scale = _kept(tree, p, noise)
        law = row_at(p, node)
        residual = (scale[:, None].to(law.dtype) * law).sub_(draft_law(tree, node, law)).clamp_(min=0)
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


def _kept(tree: DraftTree, p: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """tau, int64 `[rows]`, and P_tau, float64 `[rows]`, 1 where tau is a row's whole chain."""
    chain = view_chain(tree, p)
    rows, k = chain.p_x.shape
    weight = block_weights(chain)
    kept = (noise.accept[:, 1:] < _chances(tree, p, chain, weight)) & chain.real
    depth = indices(k + 1, p.device)[1:]
    node = (kept * depth).amax(1) if k else torch.zeros(rows, dtype=torch.int64, device=p.device)
    scale = weight.gather(1, node[:, None])[:, 0]
    return node, torch.where(node >= chain.length, 1.0, scale)


def _kept_on_host(tree: DraftTree, p: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """`_kept` of drawn chains on a CPU, bit for bit: Python's floats are float64, and a dozen of them take less time
    than launching one operation. Only the sums over the vocabulary are left to tensors."""
    assert tree.q is not None
    rows, k = tree.q.shape[:2]
    places = [(row, i, token) for row, line in enumerate(tree.tokens.tolist()) for i, token in enumerate(line[1:])]
    ratios = iter(x / y if y else math.nan for x, y in zip(entries(p, places), entries(tree.q, places), strict=True))
    weights = []
    for _ in range(rows):
        weight = [1.0]
        for ratio in itertools.islice(ratios, k):
            product = weight[-1] * ratio
            weight.append(1.0 if product > 1.0 else product)  # NaN stays NaN
        weights.append(weight)
    inner = torch.tensor([[[own] for own in weight[1:k]] for weight in weights], dtype=p.dtype)
    surpluses = _dense_surplus(inner, p, tree.q).tolist() if k > 1 else [[]] * rows
    nodes, scales = [], []
    for weight, surplus, coins in zip(weights, surpluses, noise.accept.tolist(), strict=True):
        chances = [s / max(s + 1 - w, TINY) for s, w in zip(surplus, weight[1:k], strict=True)]
        node = max((i for i, h in enumerate([*chances, weight[k]], 1) if coins[i] < h), default=0)
        nodes.append(node)
        scales.append(1.0 if node == k else weight[node])
    return torch.tensor(nodes), torch.tensor(scales, dtype=torch.float64)


def block_weights(chain: ChainView) -> Tensor:
    """P_0 .. P_k as float64 `[rows, k + 1]`; the loop runs over positions, never over the vocabulary."""
    weights = [torch.ones_like(chain.length, dtype=torch.float64)]
    for ratio in (chain.p_x / chain.q_x).unbind(1):
        weights.append((weights[-1] * ratio).clamp_(max=1.0))
    return torch.stack(weights, dim=1)


def _chances(tree: DraftTree, p: Tensor, chain: ChainView, weight: Tensor) -> Tensor:
    """h_1 .. h_k as float64 `[rows, k]`; meaningless beyond a row's length."""
    k = chain.p_x.shape[1]
    if k < 2:
        return weight[:, 1:]
    surplus, inner = _surplus(tree, p, chain, weight), weight[:, 1:k]
    h = surplus / (surplus + 1 - inner).clamp_(min=TINY)
    if not tree.is_drawn_chain:  # rows may end before
        h = torch.where(indices(k, p.device)[1:] < chain.length[:, None], h, inner)
    return torch.cat([h, weight[:, k:]], dim=1)


def _surplus(tree: DraftTree, p: Tensor, chain: ChainView, weight: Tensor) -> Tensor:
    """S_1 .. S_{k-1} as float64 `[rows, k - 1]`."""
    rows, k = chain.p_x.shape
    inner = weight[:, 1:k]
    flat = inner * (1.0 - chain.p_x[:, 1:])
    if tree.q is None or tree.q_row is None:
        return flat
    if tree.is_drawn_chain:
        return _dense_surplus(inner[:, :, None].to(p.dtype), p, tree.q).to(torch.float64)
    q = tree.q[torch.arange(rows, device=p.device)[:, None], tree.q_row[:, :k].clamp(min=0)]
    dense = _dense_surplus(inner[:, :, None].to(p.dtype), p, q).to(torch.float64)
    return torch.where(tree.sampled[:, 2:], dense, flat)


def _dense_surplus(inner: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """S_i of sampled children, `[rows, k - 1]`, from P_1 .. P_{k-1} `[rows, k - 1, 1]` and the laws q of all k."""
    k = q.shape[1]
    return (inner * p.narrow(1, 1, k - 1)).sub_(q.narrow(1, 1, k - 1).to(p.dtype)).clamp_(min=0).sum(-1)
