"""Ragged trees of any shape, and what plain passes say of their nodes."""

from __future__ import annotations

from typing import Any

import models
import torch

from specdec.verify import DraftTree


def ancestors(parents: tuple[int, ...], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def tree_of(parents: list[tuple[int, ...]], seed: int = 0, vocab: int = models.VOCAB) -> DraftTree:
    """A ragged deterministic tree, one parent list per row, padded to one width."""
    width = max(map(len, parents))
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (len(parents), width), generator=generator)
    padded = torch.tensor([[*row, *[0] * (width - len(row))] for row in parents])
    counts = torch.tensor([len(row) for row in parents])
    return DraftTree(tokens, padded, counts, torch.zeros_like(tokens, dtype=torch.bool))


def per_path_logits(
    model: Any, text: torch.Tensor, tree: DraftTree, row: int, parents: tuple[int, ...]
) -> torch.Tensor:
    """Logits `[nodes, vocab]` by one plain forward pass per node over its own whole text."""
    out = []
    for node in range(len(parents)):
        path = tree.tokens[row, ancestors(parents, node)]
        with torch.no_grad():
            out.append(model(input_ids=torch.cat([text, path])[None], use_cache=False).logits[0, -1])
    return torch.stack(out)
