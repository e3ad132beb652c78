"""The target's passes in strict mode: every row alone, every tree pass of one width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.kv.base import PassCache
from specdec.kv.errors import InvalidTreeError
from specdec.verify.attention.blocks import BlockPlan
from specdec.verify.attention.register import attending
from specdec.verify.forward import TreeForward
from specdec.verify.linear import own_linears
from specdec.verify.tree import DraftTree


def refuse_wider(tree: DraftTree, width: int) -> None:
    """Raises InvalidTreeError for a tree of more nodes than a strict pass may have."""
    nodes = tree.tokens.shape[1]
    if nodes > width:
        raise InvalidTreeError(f"expected a tree of at most {width} nodes (strict_width), got {nodes}")


class StrictForward(TreeForward):
    """A `TreeForward` whose logits and K/V of a node do not depend, to the bit, on the draft around it.

    Matrix products of one size give a row the same bits wherever it stands and whatever the other rows hold; products
    of different sizes do not. So each row of the batch has a pass of its own, always `width` nodes wide, and attention
    is that of a `BlockPlan`. A row's prefill is its own pass, too: nothing depends on the batch.

    Args:
        width: nodes per pass, padding included.
    """

    reads_prompts = False
    needs_modules = True

    def __init__(self, model: PreTrainedModel, name: str, width: int):
        super().__init__(model, name)
        self.width = width

    def prefill(self, cache: PassCache, text: Tensor, starts: Sequence[int], stops: Sequence[int], chunk: int) -> None:
        with own_linears():
            for row in range(cache.num_rows):
                super().prefill(cache.row(row), text[row : row + 1], [starts[row]], [stops[row]], chunk)

    def tree(self, cache: PassCache, tree: DraftTree, unread: Tensor | None = None) -> Tensor:
        assert unread is None, "a strict pass reads its tree alone"
        nodes = tree.tokens.shape[1]
        refuse_wider(tree, self.width)
        self._check_positions([length + 1 for length in cache.lengths[: cache.num_rows]])
        counts = tree.num_nodes.tolist()
        if tree.topology is not None:
            shapes = [tree.topology.parents[:count] for count in counts]
        else:
            shapes = [tuple(row[:count]) for row, count in zip(tree.parents.tolist(), counts, strict=True)]
        logits = [self._alone(cache.row(row), tree.tokens[row], shape) for row, shape in enumerate(shapes)]
        return torch.cat(logits)[:, :nodes]

    def _alone(self, cache: PassCache, tokens: Tensor, parents: tuple[int, ...]) -> Tensor:
        """One row's pass; logits `[1, width, vocab]`, of which those behind the tree mean nothing."""
        length, count = cache.lengths[0], len(parents)
        plan = BlockPlan.build(length, parents, self.width, tokens.device)
        padded = torch.cat([tokens[:count], tokens[:1].expand(self.width - count)])
        with (
            cache.writing(self.name, [length], self.width, [count]) as read,
            own_linears(),
            attending(self.model, plan, self._windows) as mask,
        ):
            return self._run(self._part(cache, padded[None], plan.positions[None], mask, 0, read))
