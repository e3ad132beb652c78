"""Random problems of one size for every kind of draft, and what no enumeration covers: races, by sampling."""

from __future__ import annotations

import numpy as np
import torch

from oracle.instances import Instance, Spec, prefixes


def dirichlet_instance(rng: np.random.Generator, draft: str, vocab: int, width: int, depth: int) -> Instance:
    """p and q after every prefix, and what is drafted there. The same numbers are drawn for every kind of draft."""
    p: dict[tuple[int, ...], tuple[float, ...]] = {}
    q: dict[tuple[int, ...], tuple[float, ...]] = {}
    specs: dict[tuple[int, ...], Spec] = {}
    for prefix in prefixes(vocab, depth):
        p[prefix] = tuple(rng.dirichlet(np.ones(vocab)).tolist())
        law = rng.dirichlet(np.ones(vocab))
        order = np.argsort(-law, kind="stable").tolist()
        specs[prefix] = Spec() if len(prefix) == depth else _spec(draft, order, width)
        if draft == "mixed" and len(prefix) < depth:
            law[order[: width - 1]] = 0.0
        q[prefix] = tuple((law / law.sum()).tolist())
    return Instance(vocab, depth, p, q, specs)


def _spec(draft: str, order: list[int], width: int) -> Spec:
    if "chain" in draft:
        return Spec(draws=1)
    if draft == "sampled":
        return Spec(draws=width)
    if draft == "fixed":
        return Spec(fixed=tuple(order[:width]))
    return Spec(fixed=tuple(order[: width - 1]), draws=1)


def race_accepted(instance: Instance, width: int, races: int, seed: int) -> float:
    """E[accepted] of rule coupled by sampling: the target's winner is followed while it is among the drafter's first
    `width` to arrive in the same race."""
    generator = torch.Generator().manual_seed(seed)
    states: dict[tuple[int, ...], int] = {(): races}
    total = 0.0
    for _ in range(instance.depth):
        following: dict[tuple[int, ...], int] = {}
        for prefix, count in states.items():
            noise = torch.empty(count, instance.vocab, dtype=torch.float64).exponential_(generator=generator)
            p, q = (torch.tensor([float(x) for x in laws[prefix]]) for laws in (instance.p, instance.q))
            winner = (noise / p).argmin(-1)
            first = (noise / q).topk(width, largest=False).indices
            kept = winner[(first == winner[:, None]).any(-1)]
            total += len(kept)
            for token, hits in enumerate(torch.bincount(kept, minlength=instance.vocab).tolist()):
                if hits:
                    following[(*prefix, token)] = hits
        states = following
    return total / races
