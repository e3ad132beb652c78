"""Which children the nodes of one level get: the best tokens, sampled ones, or both. Pure functions on scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.verify.rules.base import sample_from

MODES = ("top", "mixed", "sampled")
"""top: the best tokens, deterministic. mixed: the best tokens but one, and one sampled off them. sampled: all of them
drawn without replacement."""

MIN_REST = 2.0**-10
"""Least mass of q from which a further sibling is drawn. Below it float32 rows no longer say what the rest of the
law was, and such a sibling is all but worthless. The mass left depends on the siblings before it only (B.5)."""

NEVER = float("-inf")
NAN = "NaN in the draft model's logits"


class Children(NamedTuple):
    """`count` children of each node, ranked; all `[rows, width, count]`.

    tokens: int64. possible: bool, False where the drafter's own law gives the token no mass.
    sampled: bool, or None when all are deterministic.
    law: float32 `[rows, width, vocab]`, what the sampled ones were drawn from; None without sampled ones.
    peaks: `[rows, width]`, each node's best score where there is no law: NaN if any of its scores is.
    """

    tokens: Tensor
    possible: Tensor
    sampled: Tensor | None = None
    law: Tensor | None = None
    peaks: Tensor | None = None


def top_children(scores: Tensor, count: int) -> Children:
    """The `count` best tokens of every node.

    Args:
        scores: float `[rows, width, vocab]`, processed; count <= vocab.
    """
    peaks, tokens = scores.max(-1, keepdim=True) if count == 1 else scores.topk(count, dim=-1)
    return Children(tokens, peaks != NEVER, peaks=peaks[:, :, 0])  # NaN counts as the largest score


def refuse_nan(peaks: Sequence[Tensor]) -> None:
    """Raises FloatingPointError if any of the `[rows, width]` peaks is NaN.

    Deterministic nodes may be withdrawn for it. Sampled ones may not: their laws are checked with the tree.
    """
    if peaks and bool(torch.cat(list(peaks), dim=1).isnan().any()):
        raise FloatingPointError(NAN)


def mixed_children(scores: Tensor, counts: Tensor, count: int, uniforms: Tensor) -> Children:
    """`counts - 1` best tokens T of every node and one x ~ q' = norm(q off T): the drafts of Hu et al. (2502.18779).

    Where T holds all the mass, q' is one-hot at the next token.

    Args:
        scores: float `[rows, width, vocab]`, processed, after the drafter's own temperature.
        counts: int64 `[width]`, children of each node, at least 1 and at most `count` <= vocab.
        uniforms: float64 `[rows, width]`.

    Returns:
        ranks from `counts` on are to be ignored; `law` is q'.
    """
    peaks, tokens = scores.topk(count, dim=-1)
    rank = torch.arange(count, device=scores.device)
    fixed, last = rank < counts[:, None] - 1, rank == counts[:, None] - 1
    possible = peaks != NEVER
    kept = torch.where(last & ~possible, 0.0, peaks)
    law = scores.scatter(-1, tokens, torch.where(fixed, NEVER, kept)).softmax(-1)
    drawn = sample_from(law, uniforms)
    tokens = torch.where(last, drawn[:, :, None], tokens)
    return Children(tokens, possible, last.expand(tokens.shape), law)


class Draws(NamedTuple):
    """Siblings drawn one after the other without replacement, all `[rows, width, count]`.

    tokens: int64. mass: float64, q of the token. rest: float64, mass of q that was left when it was drawn;
    a draw with `rest < MIN_REST` is void. law: float32 `[rows, width, vocab]`, q itself.
    """

    tokens: Tensor
    mass: Tensor
    rest: Tensor
    law: Tensor


def draw_children(scores: Tensor, count: int, uniforms: Tensor) -> Draws:
    """Sequential draws from q = softmax(scores): each from what the ones before it have left, renormalised.

    Args:
        scores: float `[rows, width, vocab]`; uniforms: float64 `[rows, width, count]`.
    """
    law = scores.softmax(-1)
    left = law if count == 1 else law.clone()
    rest = torch.ones(law.shape[:2], dtype=torch.float64, device=law.device)
    tokens, masses, rests = [], [], []
    for rank in range(count):
        token = sample_from(left, uniforms[:, :, rank])
        mass = left.gather(-1, token[:, :, None])
        if rank + 1 < count:
            left.scatter_(-1, token[:, :, None], 0.0)
        tokens.append(token)
        masses.append(mass[:, :, 0].double())
        rests.append(rest)
        rest = rest - masses[-1]
    return Draws(torch.stack(tokens, -1), torch.stack(masses, -1), torch.stack(rests, -1), law)


def best_draws(scores: Tensor, count: int) -> Draws:
    """The same when nothing is random: every draw takes the likeliest token that is left."""
    law = scores.softmax(-1)
    mass, tokens = law.topk(min(count, law.shape[-1]), dim=-1)
    mass = mass.double()
    return Draws(tokens, mass, 1.0 - mass.cumsum(-1) + mass, law)


def sampled_children(scores: Tensor, count: int, uniforms: Tensor) -> Children:
    """`count` children of every node drawn without replacement (RSD, Sequoia; algorithms A.3).

    Void draws give way to the best tokens not drawn yet, which are deterministic children.

    Args:
        scores: float `[rows, width, vocab]`; uniforms: float64 `[rows, width, count]`, count <= vocab.
    """
    draws = draw_children(scores, count, uniforms)
    good = draws.rest >= MIN_REST
    if count == 1 or bool(good.all()):
        return Children(draws.tokens, torch.ones_like(good), good, draws.law)
    # Voids are the last ranks: the j-th of them takes the j-th best of what was not drawn.
    drawn = torch.where(good, draws.tokens, draws.tokens[:, :, :1])
    spare = draws.law.scatter(-1, drawn, -1.0).topk(
        count, dim=-1
    )  # below those that have no mass: no token comes twice
    at = (~good).long().cumsum(-1).sub(1).clamp(min=0)
    tokens = torch.where(good, draws.tokens, spare.indices.gather(-1, at))
    return Children(tokens, good | (spare.values.gather(-1, at) > 0), good, draws.law)
