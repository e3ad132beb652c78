"""Greedy matching: the temperature-zero limit of every rule."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec.verify.host_integers import argmax, on_host
from specdec.verify.noise import Noise
from specdec.verify.rules.base import AcceptanceRule, chain_paths, verdict_at
from specdec.verify.tree import DraftTree, Verdict


class Greedy(AcceptanceRule):
    """Follow the target's argmax: keep a node when its token is the argmax at its parent.

    Ties go to the first index, as `torch.argmax` in plain decoding. Takes any tree; uses no noise.
    """

    name = "greedy"
    top_down = True

    def __call__(self, tree: DraftTree, p: Tensor, noise: Noise) -> Verdict:
        choice = argmax(p)
        if tree.is_shared_chain and choice.device.type == "cpu":
            return _followed_on_host(tree, choice)
        node = _followed(tree, choice)
        return verdict_at(tree, node, choice.gather(1, node[:, None])[:, 0])

    def end_law(self, tree: DraftTree, p: Tensor) -> Tensor:
        law = torch.zeros(tree.tokens.shape, dtype=torch.float64, device=p.device)
        return law.scatter_(1, _followed(tree, p.argmax(-1))[:, None], 1.0)


def _followed(tree: DraftTree, choice: Tensor) -> Tensor:
    """The last node on the line of argmax tokens, int64 `[rows]`."""
    if tree.is_chain:
        matches = (tree.tokens[:, 1:] == choice[:, :-1]) & tree.valid[:, 1:]
        return matches.long().cumprod(1).sum(1)
    wanted = choice.gather(1, tree.parents.clamp(min=0))
    matches = (tree.tokens == wanted) & tree.valid
    matches[:, 0] = True
    return deepest_reached(tree, matches)


def _followed_on_host(tree: DraftTree, choice: Tensor) -> Verdict:
    """That verdict for chains on a CPU: comparing some integers takes less time than launching operations on them."""
    ends, tokens = [], []
    for drafted, wanted, count in zip(*on_host(tree.tokens, choice, tree.num_nodes), strict=True):
        node = 0
        while node + 1 < count and drafted[node + 1] == wanted[node]:
            node += 1
        ends.append(node)
        tokens.append(wanted[node])
    last = torch.tensor(ends)
    return Verdict(chain_paths(tree.tokens.shape[1], choice.device).index_select(0, last), last, torch.tensor(tokens))


def deepest_reached(tree: DraftTree, kept: Tensor) -> Tensor:
    """The deepest node all of whose ancestors (and itself) are `kept`; int64 `[rows]`.

    Args:
        kept: bool `[rows, nodes]` with the root kept and at most one line of kept nodes (equal siblings count
            as one: the deeper line wins).
    """
    if tree.is_chain:
        return kept[:, 1:].long().cumprod(1).sum(1)
    broken = (tree.ancestor_mask & ~kept[:, None, :]).any(-1)
    return torch.where(broken, -1, tree.depths).argmax(1)
