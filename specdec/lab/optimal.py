"""The most any rule could accept at one node: the min-cut of Hu et al. (arXiv 2502.18779), by a prefix scan."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.verify import DraftTree

LOG_TIME, STEP = 36.0, 0.1
"""The time grid of the exponential race, in ln t: symmetric range and spacing."""
SMALLEST = 1e-13
"""Mass outside a set below which it counts as everything."""
MAX_VOCAB = 16_384
"""Drafts without replacement are scanned token by token: larger vocabularies would take seconds per row."""


def optimal_acceptance(p: Tensor, q: Tensor, count: int, replacement: bool = False) -> float:
    """alpha* = 1 + min_H (P(H) - Pr[all drafts in H]): the best acceptance of `count` drafts from q against p.

    The minimum is attained by a prefix H of the tokens in ascending order of p/q, so V + 1 sets are enough.

    Args:
        p, q: float64 `[vocab]`; replacement: drafts are independent (else drawn without replacement).

    Example: p = (.1, .5, .4), q = (.5, .4, .1), two drafts: .79 with replacement, .8667 without.

    Raises:
        ValueError: fewer than one draft, or without replacement more than q has tokens.
    """
    support = int((q > 0).sum())
    if count < 1 or (not replacement and count > support):
        raise ValueError(f"expected 1 <= count <= {support} drafts, got {count}")
    ratio = torch.where(q > 0, p / q.clamp(min=torch.finfo(torch.float64).tiny), torch.inf)
    order = ratio.argsort()
    p, q = p[order], (q[order] / q.sum())
    target = torch.cat([p.new_zeros(1), p.cumsum(0)])
    if count == 1 or replacement:
        inside = torch.cat([q.new_zeros(1), q.cumsum(0)]).clamp(max=1.0) ** count
    else:
        inside = _first_arrivals_inside(q, count)
    return float((1 + (target - inside).min()).clamp(0.0, 1.0))


def _first_arrivals_inside(q: Tensor, count: int) -> Tensor:
    """Pr[the first `count` arrivals of a race with rates q all lie in the first h tokens], for h = 0 .. vocab.

    All arrive before the first token outside, which arrives at rate s = 1 - q(H): the integral over t of
    s exp(-s t) Pr[at least `count` of H by t]. In ln t its integrand falls off on both sides so fast that the plain
    trapezoid rule is exact to rounding, and one grid serves every h.
    """
    times = np.exp(np.arange(-LOG_TIME, LOG_TIME, STEP))
    rates = q.numpy()
    outside = np.append(np.cumsum(rates[::-1])[::-1][1:], 0.0)
    fewer = np.zeros((count, len(times)))  # Pr[exactly i of H by t]
    fewer[0] = 1.0
    found = np.zeros(len(rates) + 1)
    for h, rate in enumerate(rates, start=1):
        if rate > 0:
            late = np.exp(-rate * times)
            fewer[1:] = fewer[1:] * late + fewer[:-1] * (1 - late)
            fewer[0] *= late
        s = outside[h - 1]
        if s <= SMALLEST:
            found[h] = 1.0
        elif h >= count:
            scaled = s * times
            found[h] = STEP * (scaled * np.exp(-scaled) * (1 - fewer.sum(0))).sum()
    return torch.from_numpy(found)


class Root(NamedTuple):
    """What was drafted at one root. p, q: float64 `[vocab]`, q None if no child was sampled; fixed: int64, tokens of
    the deterministic children; num_sampled: how many were drawn; replacement: independently of each other."""

    p: Tensor
    q: Tensor | None
    fixed: Tensor
    num_sampled: int
    replacement: bool


def root_of(tree: DraftTree, p: Tensor, row: int) -> Root:
    """The root of a row's draft. p: float `[rows, nodes, vocab]`, the law after each node."""
    child = (tree.parents[row] == 0) & tree.valid[row]
    drawn = child & tree.sampled[row]
    q = None
    if tree.q is not None and tree.q_row is not None and bool(drawn.any()):
        q = tree.q[row, tree.q_row[row, 0]].double().cpu()
    fixed = tree.tokens[row][child & ~tree.sampled[row]].unique().cpu()
    return Root(p[row, 0].double().cpu(), q, fixed, int(drawn.sum()), tree.replacement)


def optimum(root: Root) -> float:
    """alpha*: the most any lossless rule could accept at this root, for the law its children were drafted from.

    One sampled child beside fixed ones: p(fixed) + sum off them of min(p, q). Several sampled children: the min-cut.
    NaN where no formula covers the draft.
    """
    fixed = float(root.p[root.fixed].sum())
    if root.q is None:
        return fixed
    if root.num_sampled == 1:  # a fixed token that is drawn as well adds nothing
        overlap = torch.minimum(root.p, root.q)
        overlap[root.fixed] = 0.0
        return fixed + float(overlap.sum())
    if len(root.fixed) or not scannable(root.q, root.num_sampled):
        return math.nan
    return optimal_acceptance(root.p, root.q, root.num_sampled, root.replacement)


def scannable(q: Tensor, count: int) -> bool:
    """Is the optimum of `count` drafts from q worked out in a time that can be waited for?"""
    return count == 1 or (len(q) <= MAX_VOCAB and int((q > 0).sum()) >= count)
