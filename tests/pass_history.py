"""One history of forward passes, for whatever runs them: what is compared between the ways to run a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import torch
from torch import Tensor

from specdec.verify import DraftTree, Topology
from specdec.verify.passes.forward import Forward


def history(forward: Forward, cache: Any, lengths: Sequence[int]) -> list[Tensor]:
    """Logits of a ragged prefill, a tree, chains behind equal prefixes, columns kept, and one row alone; all K/V."""
    rows = len(lengths)
    text = models.prompts((12,) * rows, int(forward.model.config.vocab_size), 1)[0]
    tree = DraftTree.build(Topology.widths((2, 2)), text[:, :7])
    with torch.no_grad():
        forward.prefill(cache, text, [0] * rows, list(lengths), chunk=4)
        for row, length in enumerate(lengths):
            cache.set_length(row, length)
        out = [forward.tree(cache, tree).logits]
        cache.commit([[0, 1, 3]] * rows)
        starts = [min(cache.lengths)] * rows
        out.append(forward.causal(cache, text[:, :5], starts, None, keep=0).logits)
        out.append(forward.causal(cache, text[:, :5], starts, None, keep=2).logits)
        out.append(forward.causal(cache, text[:, :5], starts, None, keep=1).logits)
        out.append(forward.causal(cache, text[:, :1], starts, None, keep=1).logits)
        out.append(forward.causal(cache.row(0), text[:1, :3], starts[:1], None, keep=0).logits)
        out.append(forward.causal(cache.row(rows - 1), text[-1:, 2:6], starts[:1], None, keep=0).logits)
    for row in range(rows):
        out += [states for layer in cache.layers("target", row) for states in layer]
    return out
